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
ROUNDING = 3e-6  # of the largest value, what float32 rounding was seen to make in deep models
PERIOD = 2**20 - 3  # random numbers that are drawn; larger parameters repeat them
DIFFERENT = 7  # token ids in one trial
ALIGNED = 16  # float32 numbers in the 64 bytes that kernels like a tensor to begin at
# What transformers' models raise when they are called in a way that they do not know.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
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

    On a CPU in float32, parameters are views of three short-lived buffers, so that the memory that
    this takes is that of the largest parameter and not that of the model. Matrices get the spread
    that keeps activations at their size; norms are around one and biases around zero, since all
    tokens become one where they have much in common.
    """
    named = {p: name for name, p in module.named_parameters() if p.is_floating_point()}
    kept = [p.data for p in named]
    matrices = [p for p in named if p.ndim > 1]
    width = matrices[0].shape[-1] if matrices else 1
    noise = _noise()
    slack = 64 * ALIGNED

    def sort(p: nn.Parameter) -> str:
        return "matrix" if p.ndim > 1 else "bias" if named[p].endswith("bias") else "norm"

    made = {"matrix": noise * (1.5 / width**0.5), "bias": noise / 4, "norm": 1 + noise / 4}
    for name, values in made.items():
        size = max((p.numel() for p in named if sort(p) == name), default=0) + slack
        made[name] = values.repeat(-(-size // PERIOD))[:size]
    try:
        for i, p in enumerate(named):
            start = (i * ALIGNED) % slack  # so that no two neighbours are the same
            values = made[sort(p)][start : start + p.numel()].view(p.shape)
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            p.data = values.to(p.device, dtype)
        yield
    finally:
        for p, data in zip(named, kept):
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


def _dtype(model: AnswerModel) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def check_causal(model: AnswerModel) -> float:
    """Find out that later tokens do not change what comes before them.

    Returns:
        How far another first tokens move the last logits, relative to the largest. A deep model
        may hardly look back with random weights; what is wrong then shows no more than this.

    Raises:
        UserError: they do, or the model cannot be run on text.
    """
    kind = model.model.config.model_type
    ids, others = _ids(model, 29), _ids(model, 4, seed=1)
    try:
        whole = model.logits(ids[0])
        moved = model.logits(torch.cat([others[0], ids[0][:, 4:]], dim=1))
        alone = [model.logits(ids[0][:, :n]) for n in (9, 12, 20)]
    except FAILURES as error:
        if out_of_memory(error):
            raise
        reason = (
            f"{str(next(model.parameters()).dtype).removeprefix('torch.')}: {first_line(error)}"
        )
        raise UserError(f"model_name: {kind} cannot be run on text alone in {reason}") from None
    largest = whole.double().abs().max()
    reach = float((moved[:, 12:] - whole[:, 12:]).double().abs().max() / largest)
    within = min(TOLERANCE, reach / 3)
    if not all(close(whole[:, : part.shape[1]], part, max(within, ROUNDING)) for part in alone):
        raise UserError(
            f"model_name: this {kind} is no causal language model: tokens change the outputs "
            "of the tokens before them, so it sees the answer that it is to predict (of BERT "
            "and its kin, is_decoder: true in config.json makes one)"
        )
    return reach


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


def can_pack(model: AnswerModel) -> bool:
    """Whether samples in one row are to each other as if they were not there."""
    if not model.takes_positions or not model.sees_everything or not model.tolerance:
        return False
    parts, others = _ids(model, 7, 5, 11), _ids(model, 7, 5, 11, seed=1)
    lengths = [part.shape[1] for part in parts]
    alone = [model.hidden_states(part) for part in parts]
    packed = model.hidden_states(torch.cat(parts, dim=1), lengths)
    # Another first sample must not change the others by a bit.
    changed = model.hidden_states(torch.cat([others[0], *parts[1:]], dim=1), lengths)
    same = torch.equal(packed[:, lengths[0] :], changed[:, lengths[0] :])
    return same and close(packed, torch.cat(alone, dim=1), model.tolerance)


def pads_left(model: AnswerModel, cached: int = 0) -> bool:
    """Whether rows with padding in front get the logits that they get alone.

    cached: so many tokens more, each by itself, with the keys and values of those before it in one
    plain cache.
    """
    if not model.tolerance:
        return False
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
    return close(found, torch.cat(alone), model.tolerance)


def takes_slots(model: AnswerModel) -> bool:
    """Whether keys and values of rows of different lengths may stand in one plain cache."""
    return model.cache_name is not None and pads_left(model, cached=2)


def own_cache(model: AnswerModel) -> str:
    """How far transformers' `generate` can be used: "groups", "single" or "none"."""
    rows = torch.cat(_ids(model, 9, 9))
    settings = GenerationConfig(max_new_tokens=3, pad_token_id=0)
    settings.output_logits = settings.return_dict_in_generate = True

    def agrees(*parts: Tensor) -> bool:
        for part in parts:
            made = generate_plainly(model.model, part, settings)
            # What the model that is trained here says, of one text after the other.
            expected = [
                model.logits(row[None, :-1])[0, rows.shape[1] - 1 :] for row in made.sequences
            ]
            found = torch.stack(made.logits, dim=1)
            if not close(found, torch.stack(expected), model.tolerance):
                return False
        return True

    if not model.tolerance or not succeeds(agrees, *rows.split(1)):
        return "none"
    return "groups" if succeeds(agrees, rows) else "single"


def takes_masks(model: AnswerModel) -> bool:
    """Whether a whole mask of ours, bool [B, 1, T, T], says what the model's own would."""
    (ids,) = _ids(model, 29)
    expected = model.hidden_states(ids)
    model.makes_masks = True
    try:
        return close(model.hidden_states(ids), expected, model.tolerance)
    finally:
        model.makes_masks = False


def check_trainable(model: AnswerModel) -> bool:
    """Whether a text reaches every parameter that is to train (an image encoder is not reached).

    One sample of an odd length goes forward and back, with dropout as in training.

    Raises:
        UserError: transformers can run the model, but not train it.
    """
    (ids,) = _ids(model, 11)
    trained = [p for p in model.parameters() if p.requires_grad]
    positions = torch.arange(4, 10, device=ids.device)
    batch = Batch(ids, positions, ids[0, 5:], np.zeros(1, dtype=np.int64))
    training = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            model.train()
            grads = torch.autograd.grad(model(batch), trained, allow_unused=True)
    except FAILURES as error:
        if out_of_memory(error):
            raise
        kind = model.model.config.model_type
        raise UserError(
            f"model_name: {kind} cannot be trained, in {_dtype(model)}: {first_line(error)}"
        ) from None
    finally:
        model.train(training)
    return all(grad is not None for grad in grads)


# ------------------------------------------------------------- what moves in transformers


def plain_cache() -> DynamicCache:
    """transformers' cache of keys and values alone, without what a config may add to it."""
    return DynamicCache()


def generate_plainly(
    model: PreTrainedModel, input_ids: Tensor, settings: GenerationConfig, **hooks: Any
) -> Any:
    """transformers' `generate` on rows [B, T] without padding, with these settings and no others.

    It fills up what settings leave open from the model's own; and without settings it refuses
    models whose config.json has some.
    """
    own, model.generation_config = model.generation_config, settings
    mask = torch.ones_like(input_ids)
    try:
        return model.generate(input_ids, attention_mask=mask, generation_config=settings, **hooks)
    finally:
        model.generation_config = own
