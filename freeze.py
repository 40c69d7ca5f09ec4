"""Which parameters train.

Every parameter is of one kind, found from what the modules around it are called and from where
they stand, and not from one architecture's parameter names:

    emb      token and position embeddings, and an output head that is tied to them
    ln       every norm, the final one and those inside attention included
    attn     attention, and what a block has in its place: state-space and recurrent mixers, whole
    ff       feed-forward maps, experts and their routers
    other    the rest: an untied output head, what a model adds to the residual stream itself, ...
    adapter  what lora.py adds to projections; the rest is frozen then, but layers_not_to_freeze
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from config import ModelParams, UserError

KINDS = ("emb", "ln", "attn", "ff", "other")
NORM = re.compile(r"norm(gated|\d\w?)?$", re.IGNORECASE)  # RMSNorm, RMSNormGated, LayerNorm1P
WORDS = {
    "attn": "att attn attention mixer mamba ssm conv delta lstm recurrent",
    "ff": "ff ffn mlp fc feed feedforward moe expert router intermediate output",
    # What goes around attention and feed-forward alike: learned residual connections.
    "other": "residual connection message",
    # These hold more than their names say: a block inside a block has parts of its own
    # (Zamba's AttentionDecoderLayer), and `post_attention_layernorm` is no attention.
    "mixed": "decoder norm layernorm",
}
KIND_OF = {word: kind for kind, words in WORDS.items() for word in words.split()}


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """All stacks of blocks: lists of modules that have parts themselves, in no other such list."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or name.startswith(tuple(f"{s}." for s in stacks)):
            continue
        if len(module) > 0 and all(list(block.children()) for block in module):
            stacks[name] = module
    return stacks


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's transformer blocks, as `layers_not_to_freeze` counts them.

    They are those of the outermost, then longest stack. Other stacks count, one after the other,
    if the module that holds them is of the same class: HRM's low and then high level, XLM's
    attentions and then feed-forward maps, but no vision tower's blocks.

    Raises:
        UserError: the model has none.
    """
    if not (stacks := _stacks(model)):
        raise UserError(f"{type(model).__name__}: no stack of blocks found; freezing needs one")

    def holder(name: str) -> type[nn.Module]:
        return type(model.get_submodule(name.rpartition(".")[0]))

    main = min(stacks, key=lambda name: (name.count("."), -len(stacks[name])))
    equals = [stack for name, stack in stacks.items() if holder(name) is holder(main)]
    return [block for stack in equals for block in stack]


def classify(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(name, kind, parameter) of each parameter; a shared one comes once, as its embedding."""
    stacks = {id(stack) for stack in _stacks(model).values()}
    named = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = [("", model)]
        for attribute in name.split(".")[:-1]:
            path.append((attribute, getattr(path[-1][1], attribute)))
        named.append((name, _kind(path, stacks), parameter))
    seen: set[nn.Parameter] = set()
    # Embeddings first, so that a tied output head is one of them wherever it is registered.
    for name, kind, parameter in sorted(named, key=lambda item: item[1] != "emb"):
        if parameter not in seen:
            seen.add(parameter)
            yield name, kind, parameter


def _kind(path: list[tuple[str, nn.Module]], stacks: set[int]) -> str:
    """`path` leads from the model to the parameter's owner: each module, and its name there."""
    if isinstance(path[-1][1], nn.ParameterList):
        path = path[:-1]
    attribute, owner = path[-1]
    named = type(owner).__name__
    if attribute in ("lora_A", "lora_B"):
        return "adapter"
    if isinstance(owner, nn.Embedding) or named.endswith(("Embedding", "Embeddings")):
        return "emb"
    norms = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    if isinstance(owner, norms) or NORM.search(named) or NORM.search(attribute):
        return "ln"
    inside = next((i for i, (_, module) in enumerate(path) if id(module) in stacks), None)
    if inside is None:
        return "other"
    # The part of the block that a parameter lies in decides, whatever else is in there: experts in
    # attention are attention. XLM, though, has a stack of `attentions` and one of `ffns`.
    parts = [_meaning(type(part).__name__) or _meaning(name) for name, part in path[inside + 2 :]]
    kind = next((part for part in parts if part != "mixed"), "") or _meaning(path[inside][0])
    return kind if kind in KINDS else "other"


def _meaning(name: str) -> str:
    """The kind, or "mixed", that a class or attribute name says, or "".

    As in all English compounds the last word counts: GraniteMoeHybridMambaLayer is a Mamba.
    """
    name = re.sub("MLP|MoE|FFN", lambda found: found[0].title(), name)  # splits HMLP into H and Mlp
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    kinds = [KIND_OF[w] for word in words if (w := word.lower().rstrip("s")) in KIND_OF]
    return kinds[-1] if kinds else ""


def apply(model: nn.Module, params: ModelParams) -> None:
    """Set `requires_grad` of every parameter as the `freeze_*` keys say.

    Of a model that is to get an adapter, only the blocks in `layers_not_to_freeze` train.

    Raises:
        UserError: a block index that the model does not have, or nothing left to train.
    """
    adapter = params.adapter is not None
    if not adapter and not params.do_freeze:
        return
    stack = blocks(model) if params.do_freeze or params.layers_not_to_freeze else []
    open_blocks = set()
    for index in params.layers_not_to_freeze:
        if not -len(stack) <= index < len(stack):
            raise UserError(
                f"model_params.layers_not_to_freeze: found {index}; allowed: {-len(stack)} to "
                f"{len(stack) - 1}, the model has {len(stack)} blocks"
            )
        open_blocks.add(index % len(stack))
    kept = {id(p) for index in open_blocks for p in stack[index].parameters()}
    for _, kind, parameter in classify(model):
        frozen = (adapter or getattr(params, f"freeze_{kind}")) and id(parameter) not in kept
        parameter.requires_grad_(not frozen)
    if not adapter and not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            "model_params: do_freeze leaves nothing to train; set one freeze_* key to false or "
            "name blocks in layers_not_to_freeze"
        )


def size(parameter: Tensor) -> int:
    """How many numbers it stands for; those of 4 bits lie two in a byte (extras/quantize.py)."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def report(model: nn.Module) -> list[tuple[str, int, int]]:
    """(kind, parameters, trainable parameters) for each kind that the model has."""
    totals = {kind: [0, 0] for kind in (*KINDS, "adapter")}
    for _, kind, parameter in classify(model):
        totals[kind][0] += size(parameter)
        totals[kind][1] += size(parameter) * parameter.requires_grad
    return [(kind, total, trained) for kind, (total, trained) in totals.items() if total]
