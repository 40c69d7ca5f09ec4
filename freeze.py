"""Which parameters train.

Every parameter is of one kind, found from what the modules around it are called and from where
they stand, and not from one architecture's parameter names:

    emb    token and position embeddings, and an output head that is tied to them
    ln     every norm, the final one and those inside attention included
    attn   attention, and what a block has in its place: state-space and recurrent mixers, whole
    ff     feed-forward maps, experts and their routers
    other  the rest: an untied output head, what a model adds to the residual stream itself, ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from config import ModelParams, UserError
from data import Batch, Samples, collate

KINDS = ("emb", "ln", "attn", "ff", "other")
NORM = re.compile(r"norm(gated|\d\w?)?$", re.IGNORECASE)  # RMSNorm, RMSNormGated, LayerNorm1P
WORDS = {
    "attn": "att attn attention mixer mamba ssm conv delta lstm recurrent",
    "ff": "ff ffn mlp fc feed feedforward moe expert router intermediate output",
    # What goes around attention and feed-forward alike: learned residual connections.
    "other": "residual connection message",
    # These hold more than they are called after: a block inside a block has parts of its own
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
    name = re.sub("MLP|MoE|FFN", lambda found: found[0].title(), name)  # HMLP is two
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    kinds = [KIND_OF[w] for word in words if (w := word.lower().rstrip("s")) in KIND_OF]
    return kinds[-1] if kinds else ""


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


class PrefixCache:
    """Outputs of the frozen lowest blocks, computed once for each sample.

    While nothing in front of block `depth` trains and no dropout acts there, the input of that
    block is the same in every epoch. It is computed for all samples before training, in an order
    and in batches that depend on the data only (so a resumed run has the same bits), and then
    stands in for embeddings and blocks. It lives as long as the process and can therefore never
    be out of date.

    Args:
        model: the causal LM, frozen already.
        probe: int64 [1, T] ids to find the depth with.

    Raises:
        UserError: the first block already depends on something that trains or on dropout.
    """

    def __init__(self, model: PreTrainedModel, probe: Tensor) -> None:
        self.model = model
        self.blocks = list(blocks(model))
        self.current: Tensor | None = None  # [B, T, C], stands in for the prefix in a forward
        self.seen: list[Tensor] = []
        self.output: Any = None  # what a block returns beside the hidden states, if anything
        self.depth = self._frozen_depth(probe)
        if self.depth == 0:
            raise UserError(
                "model_params.cache_frozen_prefix: the input of the first block depends on "
                "something that trains, or on dropout; freeze_emb and the freeze_* keys must "
                "freeze the lowest blocks whole, and the model's dropouts must be 0 in its "
                "config.json"
            )
        for index, block in enumerate(self.blocks[: self.depth]):
            block.forward = self._bypass(block.forward, last=index == self.depth - 1)

    def _inputs(self, probe: Tensor) -> list[Tensor]:
        """The input of every block in one forward, as training runs it."""
        inputs: list[Tensor] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(args[0] if args else kwargs["hidden_states"])

        hooks = [b.register_forward_pre_hook(record, with_kwargs=True) for b in self.blocks]
        training = self.model.training
        try:
            self.model.train()
            self.model.base_model(probe, use_cache=False)
        finally:
            self.model.train(training)
            for hook in hooks:
                hook.remove()
        return inputs

    def _frozen_depth(self, probe: Tensor) -> int:
        first, second = self._inputs(probe), self._inputs(probe)
        if len(first) != len(self.blocks):
            raise UserError(
                "model_params.cache_frozen_prefix: the blocks of this model do not run once each "
                "and in their order; set it to null"
            )
        depth = 0
        # What dropout touches differs from one time to the next.
        for index, (a, b) in enumerate(zip(first, second)):
            # What needs no gradient has nothing that trains in front of it.
            if a.requires_grad or not torch.equal(a, b):
                break
            depth = index
        return depth

    def _bypass(self, original: Callable[..., Any], last: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.current is None:
                output = original(*args, **kwargs)
                several = isinstance(output, (tuple, list))
                self.output = type(output)([None] * len(output)) if several else None
                if last:
                    self.seen = [(output[0] if several else output).detach()]
                return output
            hidden = self.current if last else (args[0] if args else kwargs["hidden_states"])
            if self.output is None:
                return hidden
            return type(self.output)([hidden, *self.output[1:]])

        return forward

    @torch.no_grad()
    def fill(self, samples: Samples, device: Any, directory: Path | None) -> None:
        """Run the prefix over all samples; `directory` keeps the result in a file there."""
        self.starts = np.concatenate([[0], np.cumsum(samples.lengths)])
        order = np.argsort(-samples.lengths, kind="stable")
        self.store: np.ndarray | None = None
        for i in range(0, len(order), FILL_BATCH):
            rows = order[i : i + FILL_BATCH]
            batch = device.place(collate(samples, rows))
            with device.autocast():
                self.model.base_model(batch.input_ids, use_cache=False)
            hidden = self.seen.pop().to("cpu")
            self.dtype = hidden.dtype
            if self.store is None:
                self.store = self._allocate(int(self.starts[-1]), hidden.shape[-1], directory)
            for b, row in enumerate(rows):
                start, stop = self.starts[row], self.starts[row + 1]
                self.store[start:stop] = _bits(hidden[b, : stop - start])

    def _allocate(self, tokens: int, width: int, directory: Path | None) -> np.ndarray:
        dtype = _bits(torch.zeros(1, dtype=self.dtype)).dtype
        if directory is None:
            return np.empty((tokens, width), dtype=dtype)
        path = directory / ".prefix-cache"
        array = np.memmap(path, dtype=dtype, mode="w+", shape=(tokens, width))
        path.unlink()  # the mapping keeps it; nothing is left behind, whatever happens
        return array

    def gather(self, batch: Batch) -> Tensor:
        """The cached hidden states in the batch's own layout, [B, T, C], zeros on padding."""
        assert self.store is not None
        height, width = batch.input_ids.shape
        hidden = np.zeros((height * width, self.store.shape[1]), dtype=self.store.dtype)
        place = 0
        for b, row in enumerate(batch.rows):
            start, stop = self.starts[row], self.starts[row + 1]
            place = place if batch.lengths else b * width
            hidden[place : place + stop - start] = self.store[start:stop]
            place += stop - start
        return torch.from_numpy(hidden).view(self.dtype).view(height, width, -1)


FILL_BATCH = 8


def _bits(tensor: Tensor) -> np.ndarray:
    """The tensor's values, or its bits where NumPy has no such type (bfloat16)."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
