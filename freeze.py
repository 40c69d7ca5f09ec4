"""Which parameters train.

Every parameter is of one kind, found from the types of the modules around it and not from one
architecture's parameter names:

    emb    token and position embeddings, and an output head that is tied to them
    ln     every norm, the final one included
    attn   inside an attention module of a block
    ff     any other linear map of a block
    other  the rest: an untied output head, convolutions of recurrent mixers, ...
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from config import ModelParams, UserError

KINDS = ("emb", "ln", "attn", "ff", "other")
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
FEED_FORWARD_NAMES = ("MLP", "FeedForward", "FFN", "Moe", "MoE", "Expert")


def blocks(model: nn.Module) -> nn.ModuleList:
    """The model's stack of transformer blocks: its outermost, then longest uniform ModuleList.

    Raises:
        UserError: the model has none.
    """
    found = [
        (name.count("."), -len(module), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    ]
    if not found:
        raise UserError(f"{type(model).__name__}: no stack of blocks found; freezing needs one")
    return min(found, key=lambda item: item[:2])[2]


def classify(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(name, kind, parameter) of each parameter; a shared one comes once, as its embedding."""
    stack = {id(block) for block in blocks(model)}
    seen: set[nn.Parameter] = set()
    named = list(_with_ancestors(model, "", []))
    # Embeddings first, so that a tied output head is one of them wherever it is registered.
    for wanted_embedding in (True, False):
        for name, ancestors, parameter in named:
            kind = _kind(ancestors, stack)
            if (kind == "emb") == wanted_embedding and parameter not in seen:
                seen.add(parameter)
                yield name, kind, parameter


def _with_ancestors(
    module: nn.Module, prefix: str, ancestors: list[nn.Module]
) -> Iterator[tuple[str, list[nn.Module], nn.Parameter]]:
    chain = [*ancestors, module]
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, chain, parameter
    for name, child in module.named_children():
        yield from _with_ancestors(child, f"{prefix}{name}.", chain)


def _kind(ancestors: list[nn.Module], stack: set[int]) -> str:
    owner = ancestors[-1]
    if isinstance(owner, nn.Embedding):
        return "emb"
    if isinstance(owner, NORMS) or type(owner).__name__.endswith("Norm"):
        return "ln"
    inside = next((i for i, module in enumerate(ancestors) if id(module) in stack), None)
    if inside is None:
        return "other"
    names = [type(module).__name__ for module in ancestors[inside + 1 :]]
    if any("Attention" in name for name in names):
        return "attn"
    # A block may hold its feed-forward maps itself, without a module of their own (OPT).
    if len(names) <= 1 or any(part in name for name in names for part in FEED_FORWARD_NAMES):
        return "ff"
    return "other"


def apply(model: nn.Module, params: ModelParams) -> None:
    """Set `requires_grad` of every parameter as the `freeze_*` keys say.

    Raises:
        UserError: a block index that the model does not have, or nothing left to train.
    """
    if not params.do_freeze:
        return
    stack = blocks(model)
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
        frozen = getattr(params, f"freeze_{kind}") and id(parameter) not in kept
        parameter.requires_grad_(not frozen)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            "model_params: do_freeze leaves nothing to train; set one freeze_* key to false or "
            "name blocks in layers_not_to_freeze"
        )


def report(model: nn.Module) -> list[tuple[str, int, int]]:
    """(kind, parameters, trainable parameters) for each kind that the model has."""
    totals = {kind: [0, 0] for kind in KINDS}
    for _, kind, parameter in classify(model):
        totals[kind][0] += parameter.numel()
        totals[kind][1] += parameter.numel() * parameter.requires_grad
    return [(kind, total, trained) for kind, (total, trained) in totals.items() if total]
