"""The cache of frozen blocks: their outputs are computed once for all epochs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from config import UserError
from data import Batch, Samples, collate, micro_batches
from device import Device
from extras.console import duration
from freeze import blocks

if TYPE_CHECKING:
    from model import AnswerModel

FILL_BATCH = 8  # samples that go through the frozen blocks together


def fill_cache(model: AnswerModel, samples: Samples, device: Device, directory: Path | None) -> str:
    """Let `model` train with cached outputs of its frozen lowest blocks; returns a remark on it.

    Args:
        directory: keeps the outputs in a file there, not in memory.

    Raises:
        UserError: the first block already depends on something that trains or on dropout.
    """
    probe = device.move(torch.from_numpy(samples.sample(0)[0].astype(np.int64))[None])
    generators = device.rng_state()
    cache = PrefixCache(model.model, model.backbone, probe)
    device.set_rng_state(generators)
    began = time.monotonic()
    cache.fill(samples, device, directory)
    model.prefix_cache = cache
    return (
        f"{cache.depth} frozen blocks run once for all epochs: {len(samples):,} samples in "
        f"{duration(time.monotonic() - began)}, kept {'on disk' if directory else 'in memory'}"
    )


class PrefixCache:
    """Outputs of the frozen lowest blocks, computed once for each sample.

    While nothing in front of block `depth` trains and no dropout acts there, the input of that
    block is the same in every epoch. It is computed for all samples before training, in an order
    and in batches that depend on the data only (so a resumed run has the same bits), and then
    stands in for embeddings and blocks. It lives as long as the process and can therefore never
    be out of date.

    Args:
        model: the causal LM, frozen already.
        backbone: what stands in front of its output head.
        sample_ids: int64 [1, T] to find the depth with.

    Raises:
        UserError: the first block already depends on something that trains or on dropout.
    """

    def __init__(self, model: PreTrainedModel, backbone: nn.Module, sample_ids: Tensor) -> None:
        self.model, self.backbone = model, backbone
        self.blocks = list(blocks(model))
        self.current: Tensor | None = None  # [B, T, C], stands in for the prefix in a forward
        self.seen: list[Tensor] = []
        self.output: Any = None  # what a block returns beside the hidden states, if anything
        self.depth = self._frozen_depth(sample_ids)
        if self.depth == 0:
            raise UserError(
                "model_params.cache_frozen_prefix: the input of the first block depends on "
                "something that trains, or on dropout; freeze_emb and the freeze_* keys must "
                "freeze the lowest blocks whole (an adapter must leave them out), and the model's "
                "dropouts must be 0 in its config.json"
            )
        for index, block in enumerate(self.blocks[: self.depth]):
            block.forward = self._bypass(block.forward, last=index == self.depth - 1)

    def _inputs(self, sample_ids: Tensor) -> list[Tensor]:
        """The input of every block in one forward, as training runs it."""
        inputs: list[Tensor] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(args[0] if args else kwargs["hidden_states"])

        hooks = [b.register_forward_pre_hook(record, with_kwargs=True) for b in self.blocks]
        training = self.model.training
        try:
            self.model.train()
            self.backbone(sample_ids, use_cache=False)
        finally:
            self.model.train(training)
            for hook in hooks:
                hook.remove()
        return inputs

    def _frozen_depth(self, sample_ids: Tensor) -> int:
        first, second = self._inputs(sample_ids), self._inputs(sample_ids)
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
    def fill(self, samples: Samples, device: Device, directory: Path | None) -> None:
        """Run the prefix over all samples; `directory` keeps the result in a file there."""
        self.starts = np.concatenate([[0], np.cumsum(samples.lengths)])
        self.store: np.ndarray | None = None
        for rows in micro_batches(np.arange(len(samples)), FILL_BATCH, -samples.lengths):
            batch = device.upload(collate(samples, rows))
            with device.autocast():
                self.backbone(batch.input_ids, use_cache=False)
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


def _bits(tensor: Tensor) -> np.ndarray:
    """The tensor's values, or its bits where NumPy has no such type (bfloat16)."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
