"""Prompts in, answers out: batched generation that equals `generate` on one prompt at a time.

How a model is batched depends on what it can do (probe.py), never on its name:

- Keys and values of plain attention stand in slots of our own, from which finished rows go and into
  which new ones come. This is the fast way, and that of most models.
- A model that remembers in another form (recurrent states, indexed keys) is run by transformers'
  own `generate`, with the cache that belongs to it, on prompts of equal length: they need no
  padding, which such models cannot skip.
- Without a cache, whole sequences are computed anew for each token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from config import GenerateParams, UserError
from data import Prompt, pad_prompts
from device import Device
from extras.probe import generate_plainly, plain_cache
from model import AnswerModel

REFILL_SHARE = 4  # free places are refilled when they are a quarter of the batch
PREFILL_TOKENS = 1024  # of the prompts that are read in one go, with their padding
SHIFT_EVERY = 64


@dataclass
class Answer:
    """tokens: generated ids without the EOS; ended: an EOS came before `max_new_tokens`."""

    prompt: Prompt
    tokens: list[int]
    ended: bool


class _Slots(DynamicLayer):
    """One layer's keys and values, [B, H, capacity, D], written in place.

    transformers' own layer copies everything at each token (torch.cat). Here rows are
    right-aligned: all end at column `end`, and the columns [begin, end) are in use.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.is_initialized = True
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.rows = self.begin = self.end = 0

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append key, value [B, H, 1, D]; returns views of all columns in use."""
        place = slice(self.end, self.end + key.shape[2])
        self.keys[: self.rows, :, place] = key
        self.values[: self.rows, :, place] = value
        used = slice(self.begin, place.stop)
        return self.keys[: self.rows, :, used], self.values[: self.rows, :, used]

    def get_seq_length(self, *_: Any) -> int:
        return self.end - self.begin


class _SlotCache:
    """The key-value cache of a batch whose rows come and go.

    lengths: int [rows], how many of the newest columns belong to each row.
    """

    def __init__(self, batch_size: int, room: int) -> None:
        self.batch_size, self.room = batch_size, room
        self.cache: DynamicCache | None = None
        self.lengths = np.zeros(0, dtype=np.int64)
        self.end = 0

    @property
    def layers(self) -> list[_Slots]:
        assert self.cache is not None
        return self.cache.layers

    def add(self, filled: DynamicCache, lengths: np.ndarray, side: str) -> None:
        """Take over the rows of a prefilled cache, padded on `side`."""
        width = filled.layers[0].keys.shape[2]
        if self.cache is None:
            # Rows are shifted back to the left once in so many tokens.
            capacity = max(self.room, width) + SHIFT_EVERY
            self.cache = plain_cache()
            self.cache.layers = []
            for layer in filled.layers:
                shape = (self.batch_size, layer.keys.shape[1], capacity)
                keys = layer.keys.new_zeros((*shape, layer.keys.shape[3]))
                self.cache.layers.append(
                    _Slots(keys, keys.new_zeros((*shape, layer.values.shape[3])))
                )
        first = len(self.lengths)
        self._move_end(max(self.end if first else 0, int(lengths.max())))
        for layer, new in zip(self.layers, filled.layers):
            for i, length in enumerate(lengths.tolist()):
                start = 0 if side == "right" else width - length
                source, place = slice(start, start + length), slice(self.end - length, self.end)
                layer.keys[first + i, :, place] = new.keys[i, :, source]
                layer.values[first + i, :, place] = new.values[i, :, source]
        self.lengths = np.concatenate([self.lengths, lengths])
        self._set_view()

    def keep(self, rows: list[int]) -> None:
        """Make `rows`, in this order, all there is; a row that keeps its place is not copied."""
        used = slice(self.layers[0].begin, self.layers[0].end)
        for place, row in enumerate(rows):
            if place != row:
                for layer in self.layers:
                    layer.keys[place, :, used] = layer.keys[row, :, used]
                    layer.values[place, :, used] = layer.values[row, :, used]
        self.lengths = self.lengths[rows]
        self._set_view()

    def advance(self) -> None:
        """One more token stands in every row."""
        self.end += 1
        self.lengths += 1
        self._set_view()

    def attention_mask(self) -> Tensor | None:
        """int64 [rows, columns + 1] for the next token; None when no row has padding."""
        if (self.lengths == self.lengths.max()).all():
            return None
        width = int(self.lengths.max()) + 1
        columns = np.arange(width)[None] >= width - 1 - self.lengths[:, None]
        return torch.from_numpy(columns.astype(np.int64))

    def _set_view(self) -> None:
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        if self.layers and self.end == self.layers[0].keys.shape[2]:
            self._move_end(longest)
        for layer in self.layers:
            layer.rows, layer.begin, layer.end = len(self.lengths), self.end - longest, self.end

    def _move_end(self, end: int) -> None:
        """Shift the rows so that they end at column `end`."""
        longest, rows = int(self.lengths.max()) if len(self.lengths) else 0, len(self.lengths)
        if longest and end != self.end:
            source, place = slice(self.end - longest, self.end), slice(end - longest, end)
            for layer in self.layers:
                layer.keys[:rows, :, place] = layer.keys[:rows, :, source].clone()
                layer.values[:rows, :, place] = layer.values[:rows, :, source].clone()
        self.end = end


@dataclass
class _Row:
    """An answer in the making; ended: whether by a token that ends it, None while it goes on."""

    prompt: Prompt
    end_ids: set[int]
    max_new_tokens: int
    choose: Callable[[Tensor], int] | None
    processors: LogitsProcessorList | None
    on_token: Callable[[Prompt, list[int]], None]
    tokens: list[int] = field(default_factory=list)
    ended: bool | None = None

    def sequence(self) -> list[int]:
        return self.prompt.input_ids + self.tokens

    def take(self, token: int) -> None:
        """Add the next token, or end with it."""
        if token in self.end_ids:
            self.ended = True
            return
        self.tokens.append(token)
        self.on_token(self.prompt, self.tokens)
        if len(self.tokens) >= self.max_new_tokens:
            self.ended = False

    def answer(self) -> Answer:
        return Answer(self.prompt, self.tokens, bool(self.ended))


@dataclass(frozen=True)
class Decoding:
    """What decides an answer, beside the model and the prompt."""

    params: GenerateParams
    seed: int


@dataclass(frozen=True)
class Batching:
    """How prompts are run together, which changes no answer.

    padding_side: where padding stands. A model that would give other answers with padding in front
    gets it behind, whatever is asked for. pad_to: pad prompts to at least this length; None: to the
    longest of those that enter together.
    """

    batch_size: int = 16
    use_cache: bool = True
    padding_side: str = "left"
    pad_to: int | None = None


@torch.no_grad()  # not inference_mode: FSDP's parameters would be of no use to training afterwards
def generate(
    model: AnswerModel,
    prompts: Sequence[Prompt],
    device: Device,
    decoding: Decoding,
    batching: Batching,
    should_stop: Callable[[], bool] = lambda: False,
    on_token: Callable[[Prompt, list[int]], None] = lambda prompt, tokens: None,
) -> Iterator[Answer]:
    """Answer prompts, a batch at a time, yielding each as it is finished.

    Rows that are finished leave the batch and new prompts take their places, longest first. An
    answer depends on its own prompt, row number and `seed` only: the batch, the padding and the
    order change nothing but float rounding.

    Args:
        should_stop: asked before each token; true ends the iteration.
        on_token: told of each new token, with all the tokens of that answer so far.

    Where shapes are static, every forward pass is one over whole sequences, [batch_size, pad_to +
    max_new_tokens], without the cache: one graph in all, at the cost of computing them anew for
    each token.
    """
    params, batch_size, pad_to = decoding.params, batching.batch_size, batching.pad_to
    end_ids = set(model.end_ids)
    if params.eos_token_id is not None:
        end_ids = set(_as_list(params.eos_token_id))

    def start(prompt: Prompt) -> _Row:
        return _new_row(prompt, decoding, end_ids, on_token)

    waiting = sorted(prompts, key=lambda prompt: len(prompt.input_ids))
    longest = len(waiting[-1].input_ids) if waiting else 0
    # Static shapes leave no room for a cache that grows.
    cache_kind = model.cache if batching.use_cache and not device.static_shapes else "none"
    # Slices of a model (FSDP) come together inside its own forward pass only, not in `generate`.
    if cache_kind in ("groups", "single") and not device.lockstep:
        rows = map(start, reversed(waiting))
        new = params.max_new_tokens
        yield from _by_transformers(model, rows, new, device, batch_size, should_stop)
        return
    use_cache = cache_kind == "slots"
    padding_side = batching.padding_side if model.pads_left else "right"
    height = None
    if device.static_shapes:
        height, pad_to = batch_size, max(longest, pad_to or 0) + params.max_new_tokens
    cache = _SlotCache(batch_size, max(longest, pad_to or 0) + params.max_new_tokens)
    active: list[_Row] = []
    filling = False
    while device.goes_on(bool(waiting or active) and not should_stop()):
        if not waiting and not active:
            _idle(model, device)  # the other ranks need this one's slices
            continue
        free = batch_size - len(active)
        filling = bool(waiting and free) and (
            filling or not active or free * REFILL_SHARE >= batch_size
        )
        entered: list[_Row] = []
        if filling:
            count = min(free, len(waiting))
            if use_cache:  # prompts of like lengths at a time: little padding, little memory
                width = max(pad_to or 0, len(waiting[-1].input_ids))
                count = min(count, max(1, PREFILL_TOKENS // width))
            entered = [start(waiting.pop()) for _ in range(count)]
        chosen: Sequence[int | None]
        with device.autocast():
            if not use_cache:
                active += entered
                logits = _whole(model, active, device, padding_side, pad_to, None, height)
                chosen = _next(active, logits)
            elif entered:
                # The rows that are already there wait for the prefill; they go on just after it.
                filled = plain_cache()
                logits = _whole(model, entered, device, padding_side, pad_to, filled)
                lengths = np.array([len(row.prompt.input_ids) for row in entered])
                cache.add(filled, lengths, padding_side)
                active += entered
                chosen = (*[None] * (len(active) - len(entered)), *_next(entered, logits))
            else:
                chosen = _next(active, _one_token(model, active, cache, device))
                cache.advance()
        staying: list[int] = []
        for i, (row, token) in enumerate(zip(active, chosen)):
            if token is not None:
                row.take(token)
            if row.ended is None:
                staying.append(i)
            else:
                yield row.answer()
        if len(staying) < len(active):
            # The last rows move into the places that became free.
            holes = [i for i in range(len(staying)) if i not in staying]
            order = [
                i if i in staying else staying[-1 - holes.index(i)] for i in range(len(staying))
            ]
            active = [active[i] for i in order]
            if use_cache:
                cache.keep(order)


def _as_list(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


class _Group:
    """Rows that transformers' `generate` runs together, while the tokens are chosen here."""

    def __init__(self, rows: list[_Row], should_stop: Callable[[], bool]) -> None:
        self.rows, self.should_stop = rows, should_stop

    def choose(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor: scores [B, V] in which only the chosen tokens are possible."""
        going = [i for i, row in enumerate(self.rows) if row.ended is None]
        chosen = torch.zeros(len(self.rows), dtype=torch.long)
        for i, token in zip(going, _next([self.rows[i] for i in going], scores[going].float())):
            chosen[i] = token
            self.rows[i].take(token)
        only = torch.full_like(scores, float("-inf"))
        return only.scatter_(1, chosen[:, None].to(scores.device), 0.0)

    def done(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """A stopping criterion: which rows are finished, bool [B]."""
        stop = self.should_stop()
        ended = [stop or row.ended is not None for row in self.rows]
        return torch.tensor(ended, device=input_ids.device)


def _by_transformers(
    model: AnswerModel,
    rows: Iterable[_Row],
    max_new_tokens: int,
    device: Device,
    batch_size: int,
    should_stop: Callable[[], bool],
) -> Iterator[Answer]:
    """Answers of a model whose memory only its own cache classes can hold.

    rows: longest first. Those of equal length need no padding and go together.
    """
    batch_size = batch_size if model.cache == "groups" else 1
    settings = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=0)
    for _, members in itertools.groupby(rows, key=lambda row: len(row.prompt.input_ids)):
        while (part := list(itertools.islice(members, batch_size))) and not should_stop():
            group = _Group(part, should_stop)
            input_ids = device.move(torch.tensor([row.prompt.input_ids for row in part]))
            with device.autocast():
                generate_plainly(
                    model.model,
                    input_ids,
                    settings,
                    logits_processor=LogitsProcessorList([group.choose]),
                    stopping_criteria=StoppingCriteriaList([group.done]),
                )
            yield from (row.answer() for row in part if row.ended is not None)


def _idle(model: AnswerModel, device: Device) -> None:
    """A forward pass for nothing."""
    model.next_logits(
        device.move(torch.zeros(1, 1, dtype=torch.long)),
        device.move(torch.zeros(1, dtype=torch.long)),
    )


def _whole(
    model: AnswerModel,
    rows: list[_Row],
    device: Device,
    side: str,
    pad_to: int | None,
    cache: DynamicCache | None,
    height: int | None = None,
) -> Tensor:
    """Logits [B, V] after whole sequences, which also fills `cache` if there is one.

    With `height`, B is that, whatever the number of rows.
    """
    sequences = [row.sequence() for row in rows]
    sequences += [[0]] * ((height or 0) - len(rows))
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = pad_prompts(sequences, side, pad_to)
    width = padded["input_ids"].shape[1]
    start = torch.zeros_like(lengths) if side == "right" else width - lengths
    # Padding stays within the positions that the model knows, whatever it is padded to.
    positions = (torch.arange(width)[None] - start[:, None]).clamp(min=0)
    positions = positions.minimum(lengths[:, None] - 1)
    kwargs: dict[str, Any] = {}
    if bool(start.any()):  # padding behind a row is out of its sight
        kwargs["attention_mask"] = device.move(padded["attention_mask"])
    if cache is not None:
        kwargs["cache"] = cache
    # Without padding in front, positions are what the model counts by itself.
    if model.pads_left:
        kwargs["position_ids"] = device.move(positions)
    last = device.move(start + lengths - 1)
    return model.next_logits(device.move(padded["input_ids"]), last, **kwargs)


def _one_token(model: AnswerModel, rows: list[_Row], cache: _SlotCache, device: Device) -> Tensor:
    """Logits [B, V] after each row's newest token, which enters the cache."""
    ids = torch.tensor([[row.tokens[-1]] for row in rows])
    mask = cache.attention_mask()
    positions = torch.from_numpy(cache.lengths.copy())[:, None]
    return model.next_logits(
        device.move(ids),
        device.move(torch.zeros(len(rows), dtype=torch.long)),
        cache.cache,
        None if mask is None else device.move(mask),
        device.move(positions),
    )


def _next(rows: list[_Row], logits: Tensor) -> list[int]:
    if all(row.choose is None and row.processors is None for row in rows):
        return list(logits.argmax(-1).tolist())
    chosen: list[int] = []
    for row, scores in zip(rows, logits.cpu()):
        scores = scores[None]
        if row.processors is not None:
            scores = row.processors(torch.tensor([row.sequence()]), scores)
        chosen.append(int(scores.argmax(-1)) if row.choose is None else row.choose(scores[0]))
    return chosen


def _new_row(
    prompt: Prompt,
    decoding: Decoding,
    end_ids: set[int],
    on_token: Callable[[Prompt, list[int]], None],
) -> _Row:
    params = decoding.params
    processors = _processors(params, len(prompt.input_ids), sorted(end_ids))
    state = np.random.SeedSequence([decoding.seed, prompt.row]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state) & (2**63 - 1))

    def choose(scores: Tensor) -> int:
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))

    chooser = choose if params.do_sample else None
    return _Row(prompt, end_ids, params.max_new_tokens, chooser, processors, on_token)


def _processors(
    params: GenerateParams, prompt_length: int, end_ids: list[int]
) -> LogitsProcessorList | None:
    """transformers' own processors, in the order in which its `generate` applies them."""
    p = params
    chain: list[Any] = []
    if p.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.no_repeat_ngram_size:
        chain.append(NoRepeatNGramLogitsProcessor(p.no_repeat_ngram_size))
    if p.bad_words_ids:
        chain.append(NoBadWordsLogitsProcessor(p.bad_words_ids, eos_token_id=end_ids))
    if p.min_new_tokens:
        chain.append(
            MinNewTokensLengthLogitsProcessor(
                prompt_length, p.min_new_tokens, end_ids, device="cpu"
            )
        )
    if p.suppress_tokens:
        chain.append(SuppressTokensLogitsProcessor(p.suppress_tokens, device="cpu"))
    if p.begin_suppress_tokens:
        chain.append(
            SuppressTokensAtBeginLogitsProcessor(
                p.begin_suppress_tokens, prompt_length, device="cpu"
            )
        )
    if p.do_sample:
        if p.temperature != 1.0:
            chain.append(TemperatureLogitsWarper(p.temperature))
        if p.top_k:
            chain.append(TopKLogitsWarper(p.top_k))
        if p.top_p < 1.0:
            chain.append(TopPLogitsWarper(p.top_p))
        if p.min_p is not None:
            chain.append(MinPLogitsWarper(p.min_p))
        if p.typical_p < 1.0:
            chain.append(TypicalLogitsWarper(mass=p.typical_p))
        if p.epsilon_cutoff > 0.0:
            chain.append(EpsilonLogitsWarper(p.epsilon_cutoff))
        if p.eta_cutoff > 0.0:
            chain.append(EtaLogitsWarper(p.eta_cutoff, device="cpu"))
    return LogitsProcessorList(chain) if chain else None


def check_token_ids(params: GenerateParams, model: AnswerModel, where: str) -> None:
    """Raise a UserError for a token id that the model does not have."""
    known = model.model.get_input_embeddings().num_embeddings
    named = {
        "bad_words_ids": [token for word in params.bad_words_ids or [] for token in word],
        "suppress_tokens": params.suppress_tokens or [],
        "begin_suppress_tokens": params.begin_suppress_tokens or [],
        "eos_token_id": _as_list(params.eos_token_id),
    }
    for name, tokens in named.items():
        if tokens and max(tokens) >= known:
            raise UserError(
                f"{where}.{name}: found token {max(tokens)}; allowed: 0 to {known - 1}, the model's"
            )
