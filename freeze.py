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
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
FEED_FORWARD_NAMES = ("MLP", "FeedForward", "FFN", "Moe", "MoE", "Expert")


def blocks(model: nn.Module) -> nn.ModuleList:
    """The model's stack of transformer blocks: its outermost, then longest ModuleList.

    Raises:
        UserError: the model has none.
    """
    found = [
        (name.count("."), -len(module), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
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
        self.tuple_length: int | None = None
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
        depth = 0
        # Twice: what dropout touches differs.
        for index, (a, b) in enumerate(zip(self._inputs(probe), self._inputs(probe))):
            # What needs no gradient has nothing that trains in front of it.
            if a.requires_grad or not torch.equal(a, b):
                break
            depth = index
        return depth

    def _bypass(self, original: Callable[..., Any], last: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.current is None:
                output = original(*args, **kwargs)
                hidden = output[0] if isinstance(output, tuple) else output
                self.tuple_length = len(output) if isinstance(output, tuple) else None
                if last:
                    self.seen = [hidden.detach()]
                return output
            hidden = self.current if last else (args[0] if args else kwargs["hidden_states"])
            if self.tuple_length is None:
                return hidden
            return (hidden, *[None] * (self.tuple_length - 1))

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
