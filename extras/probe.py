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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from config import UserError, first_line
from data import Batch

if TYPE_CHECKING:
    from model import AnswerModel

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
# What configs call a factor on the logits; some multiply by it and some divide.
LOGIT_FACTORS = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "logits_mup_width_multiplier",
    "dim_model_base",  # MiniCPM's is this over the hidden size
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


def succeeds(trial: Callable[..., bool], *arguments: Any) -> bool:
    """Whether the trial says yes; one that fails says no."""
    try:
        return trial(*arguments)
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


# --------------------------------------------------------------------------------- the trials


def _ids(model: AnswerModel, *lengths: int, seed: int = 0) -> list[Tensor]:
    device = next(model.parameters()).device
    size = model.model.get_input_embeddings().num_embeddings
    return [ids.to(device) for ids in ids_of(*lengths, vocab_size=size, seed=seed)]


def check_causal(model: AnswerModel) -> None:
    """Raise a UserError if later tokens change what comes before them."""
    kind = model.model.config.model_type
    (ids,) = _ids(model, 29)
    try:
        whole = model.logits(ids)
        alone = [model.logits(ids[:, :n]) for n in (9, 12, 20)]
    except FAILURES as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"model_name: {kind} cannot be run on text alone: {first_line(error)}"
        ) from None
    if not all(close(whole[:, : part.shape[1]], part) for part in alone):
        raise UserError(
            f"model_name: this {kind} is no causal language model: tokens change the outputs "
            "of the tokens before them, so it sees the answer that it is to predict (of BERT "
            "and its kin, is_decoder: true in config.json makes one)"
        )


def logit_factor(model: AnswerModel) -> float | None:
    """f, if logits are f * head(backbone(x)), but for the soft cap; None if they are not."""
    if not model.head_is_plain():
        return None
    text = model.model.config.get_text_config()
    named = [getattr(text, name, None) for name in LOGIT_FACTORS]
    factors = [factor for v in named if v for factor in (v, 1 / v, v / text.hidden_size)]
    (ids,) = _ids(model, 9)

    def explains(factor: float) -> bool:
        return close(model.head(model.hidden_states(ids), factor), model.logits(ids))

    return next((factor for factor in (1.0, *factors) if succeeds(explains, factor)), None)


def packs(model: AnswerModel) -> bool:
    """Whether samples in one row are to each other as if they were not there."""
    if not model.takes_positions or not model.sees_everything:
        return False
    parts, others = _ids(model, 7, 5, 11), _ids(model, 7, 5, 11, seed=1)
    lengths = [part.shape[1] for part in parts]
    alone = [model.hidden_states(part) for part in parts]
    packed = model.hidden_states(torch.cat(parts, dim=1), lengths)
    # Another first sample must not change the others by a bit.
    changed = model.hidden_states(torch.cat([others[0], *parts[1:]], dim=1), lengths)
    same = torch.equal(packed[:, lengths[0] :], changed[:, lengths[0] :])
    return same and close(packed, torch.cat(alone, dim=1))


def pads_left(model: AnswerModel, cached: int = 0) -> bool:
    """Whether rows with padding in front get the logits that they get alone.

    cached: so many tokens more, each by itself, with the keys and values of those before it in one
    plain cache.
    """
    short, long = _ids(model, 6, 13)
    width = long.shape[1]
    rows = torch.cat([F.pad(short, (width - short.shape[1], 0)), long])
    mask = torch.ones_like(rows)
    mask[0, : width - short.shape[1]] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    more = torch.cat(_ids(model, cached, cached, seed=2)) if cached else rows[:, :0]
    alone = [
        model.logits(torch.cat([ids[None], extra[None]], dim=1))[:, -1]
        for ids, extra in zip((short[0], long[0]), more)
    ]
    cache = plain_cache() if cached else None
    last = torch.full((2,), width - 1, device=rows.device)
    found = model.next_logits(rows, last, cache, mask, positions)
    for i in range(cached):
        mask = F.pad(mask, (0, 1), value=1)
        positions, token = positions[:, -1:] + 1, more[:, i : i + 1]
        found = model.next_logits(token, torch.zeros_like(last), cache, mask, positions)
    return close(found, torch.cat(alone))


def takes_slots(model: AnswerModel) -> bool:
    """Whether keys and values of rows of different lengths may stand in one plain cache."""
    return model.cache_name is not None and pads_left(model, cached=2)


def own_cache(model: AnswerModel) -> str:
    """How far transformers' `generate` can be used: "groups", "single" or "none"."""
    plain, rows = model.model, torch.cat(_ids(model, 9, 9))
    settings = GenerationConfig(max_new_tokens=3, pad_token_id=0)
    expected = rows
    for _ in range(3):  # what the model that is trained here says, one token after the other
        chosen = [model.logits(row[None])[:, -1].argmax(-1) for row in expected]
        expected = torch.cat([expected, torch.stack(chosen)], dim=1)

    def agrees(*parts: Tensor) -> bool:
        with generation_settings(plain, settings):
            found = [
                plain.generate(p, attention_mask=torch.ones_like(p), generation_config=settings)
                for p in parts
            ]
        return torch.equal(torch.cat(found), expected)

    if not succeeds(agrees, *rows.split(1)):
        return "none"
    return "groups" if succeeds(agrees, rows) else "single"


def check_trainable(model: AnswerModel) -> None:
    """Raise a UserError for a model that transformers can run, but not train.

    One sample of an odd length goes forward and back, with dropout as in training.
    """
    (ids,) = _ids(model, 11)
    first = next(p for p in model.parameters() if p.requires_grad)
    positions = torch.arange(4, 10, device=ids.device)
    batch = Batch(ids, positions, ids[0, 5:], np.zeros(1, dtype=np.int64))
    training = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            model.train()
            torch.autograd.grad(model(batch), first, allow_unused=True)
    except FAILURES as error:
        if out_of_memory(error):
            raise
        kind = model.model.config.model_type
        raise UserError(f"model_name: {kind} cannot be trained: {first_line(error)}") from None
    finally:
        model.train(training)


# ------------------------------------------------------------- what moves in transformers


def plain_cache() -> DynamicCache:
    """transformers' cache of keys and values alone, without what a config may add to it."""
    return DynamicCache()


@contextmanager
def generation_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """These settings inside, in place of the model's own, of which `generate` would add some."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own
