"""What a model can do, found out by trying it.

The faster paths of this project hold for most models and not for all of them, and a wrong one gives
wrong numbers without a word. So each is tried on a few tokens when a model is opened, and taken
only where it gives what the plain path gives. A model's own weights may hide a difference (an
untrained head is zero, small weights make every path alike), so the trials run with random ones,
which are as large as weights are and make every token count.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4  # of the largest value: float32 rounding stays well below, a fault well above
PERIOD = 2**20 - 3  # random numbers that are drawn; larger parameters repeat them
DIFFERENT = 7  # token ids in one trial
ALIGNED = 16  # float32 numbers in the 64 bytes that kernels like a tensor to begin at
# What transformers' models raise when they are called in a way that they do not know.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
# transformers' names for how far back a layer sees, or how long the pieces are that it works in.
LIMITED_SIGHT = re.compile(
    r"(sliding_window|window_size|attention_window|attention_chunk_size|local_attention"
    r"|index_topk|attn_chunk_length)"
)


@functools.cache
def _noise() -> Tensor:
    return torch.randn(PERIOD, generator=torch.Generator().manual_seed(0))


@contextmanager
def random_weights(module: nn.Module) -> Iterator[None]:
    """Other weights inside, from a fixed seed; afterwards the module has its own, untouched.

    All parameters are views of two short-lived buffers, so the memory that this takes is that of
    the largest parameter and not that of the model. Matrices get the spread that keeps activations
    at their size, vectors (norms, biases) values around one half.
    """
    parameters = [p for p in dict.fromkeys(module.parameters()) if p.is_floating_point()]
    kept = [p.data for p in parameters]
    matrices = [p for p in parameters if p.ndim > 1]
    width = matrices[0].shape[-1] if matrices else 1
    noise = _noise()
    slack = 64 * ALIGNED
    buffers = {}
    for is_matrix, values in ((True, noise * (1.5 / width**0.5)), (False, 0.5 + noise / 4)):
        sizes = [p.numel() for p in parameters if (p.ndim > 1) == is_matrix]
        size = max(sizes, default=0) + slack
        buffers[is_matrix] = values.repeat(-(-size // PERIOD))[:size]
    try:
        for i, p in enumerate(parameters):
            start = (i * ALIGNED) % slack  # so that no two neighbours are the same
            values = buffers[p.ndim > 1][start : start + p.numel()].view(p.shape)
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            p.data = values.to(p.device, dtype)
        yield
    finally:
        for p, data in zip(parameters, kept):
            p.data = data


def succeeds(trial: Callable[[], bool]) -> bool:
    """Whether the trial says yes; one that fails says no."""
    try:
        return trial()
    except FAILURES as error:
        if out_of_memory(error):
            raise
        return False


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether two tensors are equal but for rounding, measured by the largest expected value."""
    if found.shape != expected.shape:
        return False
    distance = (found.double() - expected.double()).abs().max()
    return bool(distance <= tolerance * expected.double().abs().max())


def ids_of(*lengths: int, vocab_size: int, seed: int = 0) -> list[Tensor]:
    """Random ids, int64 [1, T] each, without the lowest, which often are padding and its like.

    As in a text, few of them come again and again: choices among equal things must not depend on
    what stands behind.
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(min(8, vocab_size - 1), vocab_size, (DIFFERENT,), generator=generator)
    chosen = [torch.randint(DIFFERENT, (1, n), generator=generator) for n in lengths]
    return [words[places] for places in chosen]


def sees_everything(text_config: Any) -> bool:
    """Whether every layer attends to all that came before, as far as the configuration tells.

    A window or a chunk can be longer than anything that could be tried here.
    """
    kinds = set(getattr(text_config, "layer_types", None) or ())
    limits = [name for name in vars(text_config) if LIMITED_SIGHT.search(name)]
    return kinds <= {"full_attention"} and not any(getattr(text_config, n) for n in limits)


def argument(module: nn.Module, *names: str) -> str | None:
    """The first of these names that the module's `forward` takes."""
    accepted = inspect.signature(module.forward).parameters
    return next((name for name in names if name in accepted), None)
