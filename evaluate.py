"""Answers and how good they are: batched generation, scores, the `test` command."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

import checkpoint
import metrics
import report
from config import (
    DEFAULT_TEMPLATE,
    GenerateParams,
    TestConfig,
    TrainConfig,
    UserError,
    compact,
    resolved,
)
from data import DataSource, Encoder, Prompt, Samples, collate, pad_prompts, prepare_inference
from device import Device
from model import (
    AnswerModel,
    check_fits,
    context_length,
    load_model,
    load_tokenizer,
    parameters_in,
)
from track import Console, WandbWriter, duration

REFILL_SHARE = 4  # free places are refilled when they are a quarter of the batch
SHIFT_EVERY = 64


@dataclass
class Answer:
    """tokens: generated ids without the EOS; ended: an EOS came before `max_new_tokens`."""

    prompt: Prompt
    tokens: list[int]
    ended: bool


# ---------------------------------------------------------------------------------- generation


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
            self.cache = DynamicCache()
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
    prompt: Prompt
    tokens: list[int]
    choose: Callable[[Tensor], int] | None
    processors: LogitsProcessorList | None

    def sequence(self) -> list[int]:
        return self.prompt.input_ids + self.tokens


@torch.inference_mode()
def generate(
    model: AnswerModel,
    prompts: Sequence[Prompt],
    params: GenerateParams,
    device: Device,
    *,
    eos: int,
    seed: int,
    batch_size: int = 16,
    use_cache: bool = True,
    padding_side: str = "left",
    pad_to: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Answer]:
    """Answer prompts, `batch_size` at a time, yielding each as it is finished.

    Rows that are finished leave the batch and new prompts take their places, longest first. An
    answer depends on its own prompt, row number and `seed` only: the batch, the padding and the
    order change nothing but float rounding.

    Args:
        eos: what ends an answer unless `params.eos_token_id` says otherwise.
        pad_to: pad prompts to at least this length; None: to the longest of those that enter
            together.
        should_stop: asked before each token; true ends the iteration.
    """
    ends = params.eos_token_id if params.eos_token_id is not None else eos
    end_ids = set(ends) if isinstance(ends, list) else {ends}
    waiting = sorted(prompts, key=lambda prompt: len(prompt.input_ids))
    longest = len(waiting[-1].input_ids) if waiting else 0
    use_cache = use_cache and model.takes_cache
    cache = _SlotCache(batch_size, max(longest, pad_to or 0) + params.max_new_tokens)
    active: list[_Row] = []
    while (waiting or active) and not should_stop():
        entered: list[_Row] = []
        free = batch_size - len(active)
        if waiting and (free * REFILL_SHARE >= batch_size or not active):
            entered = [
                _new_row(waiting.pop(), params, end_ids, seed)
                for _ in range(min(free, len(waiting)))
            ]
        with device.autocast():
            if not use_cache:
                active += entered
                chosen = _next(active, _whole(model, active, device, padding_side, pad_to, None))
            elif entered:
                # The rows that are already there wait for one prefill; they go on just after it.
                filled = DynamicCache()
                logits = _whole(model, entered, device, padding_side, pad_to, filled)
                lengths = np.array([len(row.prompt.input_ids) for row in entered])
                cache.add(filled, lengths, padding_side)
                active += entered
                chosen = [*[None] * (len(active) - len(entered)), *_next(entered, logits)]
            else:
                chosen = _next(active, _one_token(model, active, cache, device))
                cache.advance()
        staying: list[int] = []
        for i, (row, token) in enumerate(zip(active, chosen)):
            if token is not None and token in end_ids:
                yield Answer(row.prompt, row.tokens, True)
                continue
            if token is not None:
                row.tokens.append(token)
            if len(row.tokens) >= params.max_new_tokens:
                yield Answer(row.prompt, row.tokens, False)
                continue
            staying.append(i)
        if len(staying) < len(active):
            # The last rows move into the places that became free.
            holes = [i for i in range(len(staying)) if i not in staying]
            order = [
                i if i in staying else staying[-1 - holes.index(i)] for i in range(len(staying))
            ]
            active = [active[i] for i in order]
            if use_cache:
                cache.keep(order)


def _whole(
    model: AnswerModel,
    rows: list[_Row],
    device: Device,
    side: str,
    pad_to: int | None,
    cache: DynamicCache | None,
) -> Tensor:
    """Logits [B, V] after whole sequences, which also fills `cache` if there is one."""
    sequences = [row.sequence() for row in rows]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = pad_prompts(sequences, side, pad_to)
    mask = padded["attention_mask"]
    width = mask.shape[1]
    kwargs: dict[str, Any] = {}
    if side == "left" and bool((mask == 0).any()):
        kwargs["attention_mask"] = device.move(mask)
    if cache is not None:
        kwargs["past_key_values"] = cache
    last = lengths - 1 if side == "right" else torch.full_like(lengths, width - 1)
    start = torch.zeros_like(lengths) if side == "right" else width - lengths
    # Padding stays within the positions that the model knows, whatever it is padded to.
    positions = (torch.arange(width)[None] - start[:, None]).clamp(min=0)
    positions = positions.minimum(lengths[:, None] - 1)
    if model.takes_positions:
        kwargs["position_ids"] = device.move(positions)
    logits, _ = model.next_logits(device.move(padded["input_ids"]), device.move(last), **kwargs)
    return logits


def _one_token(model: AnswerModel, rows: list[_Row], cache: _SlotCache, device: Device) -> Tensor:
    """Logits [B, V] after each row's newest token, which enters the cache."""
    ids = torch.tensor([[row.tokens[-1]] for row in rows])
    kwargs: dict[str, Any] = {"past_key_values": cache.cache}
    mask = cache.attention_mask()
    if mask is not None:
        kwargs["attention_mask"] = device.move(mask)
    if model.takes_positions:
        kwargs["position_ids"] = device.move(torch.from_numpy(cache.lengths.copy())[:, None])
    last = torch.zeros(len(rows), dtype=torch.long)
    logits, _ = model.next_logits(device.move(ids), device.move(last), **kwargs)
    return logits


def _next(rows: list[_Row], logits: Tensor) -> list[int | None]:
    if all(row.choose is None and row.processors is None for row in rows):
        return list(logits.argmax(-1).tolist())
    chosen: list[int | None] = []
    for row, scores in zip(rows, logits.cpu()):
        scores = scores[None]
        if row.processors is not None:
            scores = row.processors(torch.tensor([row.sequence()]), scores)
        chosen.append(int(scores.argmax(-1)) if row.choose is None else row.choose(scores[0]))
    return chosen


def _new_row(prompt: Prompt, params: GenerateParams, end_ids: set[int], seed: int) -> _Row:
    processors = _processors(params, len(prompt.input_ids), sorted(end_ids))
    if not params.do_sample:
        return _Row(prompt, [], None, processors)
    state = np.random.SeedSequence([seed, prompt.row]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state) & (2**63 - 1))

    def choose(scores: Tensor) -> int:
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))

    return _Row(prompt, [], choose, processors)


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


# ---------------------------------------------------------------------------------- validation


def summed_loss(
    model: AnswerModel,
    samples: Samples,
    device: Device,
    batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
    shape: tuple[int, int] | None = None,
    max_batches: int | None = None,
) -> tuple[float, int] | None:
    """(summed loss, number of targets) over samples, longest first; None if stopped.

    The quotient of the two is the validation loss; it does not depend on the batch size.
    """
    order = np.argsort(-samples.lengths, kind="stable")
    starts = range(0, len(order), batch_size)
    batches = [order[i : i + batch_size] for i in starts][:max_batches]
    total, targets = torch.zeros((), dtype=torch.float64), 0
    with torch.no_grad(), _evaluating(model):
        made = (collate(samples, rows, static_shape=shape, packed=model.packs) for rows in batches)
        for batch in device.feed(made):
            if should_stop():
                return None
            with device.autocast():
                total += model(batch).cpu().double()
            targets += int(samples.target_lengths[batch.rows].sum())
    return float(total), targets


def static_shape(config: TrainConfig) -> tuple[int, int] | None:
    """(B, T) that every batch is padded to with `data.on_tpu`, else None."""
    return (config.data.batch_size, config.data.max_length) if config.data.on_tpu else None


def check_token_ids(params: GenerateParams, model: AnswerModel, where: str) -> None:
    """Raise a UserError for a token id that the model does not have."""
    known = model.model.get_input_embeddings().num_embeddings
    ends = params.eos_token_id or []
    named = {
        "bad_words_ids": [token for word in params.bad_words_ids or [] for token in word],
        "suppress_tokens": params.suppress_tokens or [],
        "begin_suppress_tokens": params.begin_suppress_tokens or [],
        "eos_token_id": ends if isinstance(ends, list) else [ends],
    }
    for name, tokens in named.items():
        if tokens and max(tokens) >= known:
            raise UserError(
                f"{where}.{name}: found token {max(tokens)}; allowed: 0 to {known - 1}, the model's"
            )


@contextmanager
def _evaluating(model: AnswerModel) -> Iterator[None]:
    """Dropout off inside, as it was before outside."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def validate(
    model: AnswerModel,
    samples: Samples,
    prompts: Sequence[Prompt],
    encoder: Encoder,
    config: TrainConfig,
    device: Device,
    should_stop: Callable[[], bool],
) -> tuple[dict[str, float], list[dict[str, Any]]] | None:
    """Validation metrics, and the answered `prompts` with their scores; None if stopped.

    Draws from no generator that training uses, so training goes on as if this had not been.
    """
    size, shape = config.data.batch_size, static_shape(config)
    result = summed_loss(model, samples, device, size, should_stop, shape)
    if result is None:
        return None
    loss = result[0] / result[1]
    values = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}
    if not prompts:
        return values, []
    with _evaluating(model):
        answers = list(
            generate(
                model,
                prompts,
                config.model_params.val_generate_params,
                device,
                eos=encoder.eos,
                seed=config.seed,
                batch_size=2 * config.data.batch_size,
                use_cache=config.model_params.use_cache,
                should_stop=should_stop,
            )
        )
    if len(answers) < len(prompts):
        return None
    answers.sort(key=lambda answer: answer.prompt.row)
    records = [describe(answer, encoder, texts=True) for answer in answers]
    summary = metrics.summarize(records, seed=config.seed, resamples=0)
    values |= {f"val_{n}": summary[n]["value"] for n in SCORES}
    return values, records


SCORES = ("bleu", "rouge1", "rouge2", "rougeL", "exact_match", "token_f1")


def describe(answer: Answer, encoder: Encoder, texts: bool) -> dict[str, Any]:
    """An answer as one line of the log; `texts` adds BLEU and ROUGE."""
    generated = encoder.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
    reference = answer.prompt.reference.strip()
    scores = metrics.score_sample(generated, reference)
    if not texts:
        scores = {name: scores[name] for name in ("exact_match", "token_f1")}
    return {
        "row": answer.prompt.row,
        "question": answer.prompt.question,
        "reference": reference,
        "generated": generated,
        **scores,
        "generated_tokens": len(answer.tokens),
        "ended": answer.ended,
    }


# -------------------------------------------------------------------------------- the test run


def test(config: TestConfig, console: Console, should_stop: Callable[[], bool]) -> bool:
    """Test one model, or several and compare them; false if it was stopped."""
    paths, log = config.test_params.test_model_path, Path(config.test_params.log_file)
    if not isinstance(paths, list):
        return test_model(config, paths, log, console, should_stop)
    logs = [log.with_name(f"{log.stem}.{i}{log.suffix}") for i in range(1, len(paths) + 1)]
    for path, one in zip(paths, logs):
        if not test_model(config, path, one, console, should_stop):
            return False
        console.say()
    console.say(compare(logs, config.seed))
    return True


def test_model(
    config: TestConfig,
    path: str | None,
    log_file: Path,
    console: Console,
    should_stop: Callable[[], bool],
) -> bool:
    """Answer the questions of a split and score the answers; false if it was stopped.

    Answers are written in windows of `save_steps` samples. A window does not share batches with
    the next one, so a run that was killed and is started again computes exactly what it would have
    computed, down to the last bit.

    Raises:
        UserError: anything that is wrong with model, data or an existing log.
    """
    device = Device("cuda" if config.cuda else "cpu", key="cuda")
    place = find_model(path or config.model_name, console)
    about = checkpoint.details(place) if isinstance(place, Path) else {}
    template = about.get("prompt_template", config.data.prompt_template or DEFAULT_TEMPLATE)
    if config.data.prompt_template not in (None, template):
        raise UserError(
            f"data.prompt_template: found {config.data.prompt_template!r}, but {place} was "
            f"trained with {template!r}; remove the key or put that one"
        )
    source = DataSource.configured(config.data)
    tokenizer = load_tokenizer(str(place))
    encoder = Encoder(tokenizer, template)
    prompts, counts = prepare_inference(
        source.pairs(config.data.split, empty_answers=True),
        encoder,
        config.data.max_prompt_length,
        config.data.truncate_promt,
    )
    plain, remarks = load_model(
        str(place), from_scratch=config.test_params.from_scratch, seed=config.seed
    )
    longest = max(len(prompt.input_ids) for prompt in prompts)
    check_fits(
        plain,
        tokenizer,
        longest + config.generate_params.max_new_tokens,
        "data.max_prompt_length + generate_params.max_new_tokens",
    )
    model = AnswerModel(plain.to(device.torch_device)).eval()
    check_token_ids(config.generate_params, model, "generate_params")
    console.say(compact(config) + "\n")
    console.say(f"model     {place}, {parameters_in(plain.parameters()):,} parameters")
    for remark in remarks:
        console.say(f"          {remark}")
    console.say(f"device    {device.describe()}, 32-true")
    console.say(
        f"data      {config.data.data_dir} [{config.data.split}]: {counts.describe()}, "
        f"longest prompt {longest} tokens"
    )
    log = AnswerLog(log_file, identity(config, place, source, template))
    records = log.open(len(prompts), config.test_params.save_steps)
    if records:
        console.say(f"resume    {len(records)} of {len(prompts)} answers are there already")
    console.say(f"answers   {log.path}")
    first, started, tokens = len(records), time.monotonic(), 0
    while len(records) < len(prompts):
        window = prompts[len(records) : len(records) + config.test_params.save_steps]
        done = answer_window(model, encoder, window, config, device, should_stop)
        if done is None:
            console.say(
                f"stopped: {len(records)} of {len(prompts)} answers are kept in {log.path}; the "
                "same command goes on from there"
            )
            return False
        log.append(done)
        records += done
        tokens += sum(record["generated_tokens"] for record in done)
        spent = time.monotonic() - started
        left = spent / (len(records) - first) * (len(prompts) - len(records))
        console.say(
            f"{len(records):6,} of {len(prompts):,} answers, {tokens / spent:,.0f} tokens/s, "
            f"{duration(left)} left"
        )
    summary = metrics.summarize(records, seed=config.seed)
    log.write_summary(summary, len(records))
    title = f"{place} on {config.data.data_dir} [{config.data.split}]"
    report.write_report(log.beside(".html"), title, summary, records)
    console.say(table(summary))
    console.say(f"scores    {log.beside('.summary.json')}")
    console.say(f"report    {log.beside('.html')}")
    if config.wandb is not None:
        values = {f"test/{name}": entry["value"] for name, entry in summary.items()}
        writer = WandbWriter(
            config.wandb, log.path.parent, resolved(config), uuid.uuid4().hex[:8], console, "test"
        )
        writer.log(values)
        writer.finish()
    return True


def answer_window(
    model: AnswerModel,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    config: TestConfig,
    device: Device,
    should_stop: Callable[[], bool],
) -> list[dict[str, Any]] | None:
    """The finished log records of `prompts`, in their order; None if stopped before the end."""
    answers = list(
        generate(
            model,
            prompts,
            config.generate_params,
            device,
            eos=encoder.eos,
            seed=config.seed,
            batch_size=config.test_params.batch_size,
            use_cache=config.test_params.use_cache,
            padding_side=config.data.padding_side,
            pad_to=config.data.max_prompt_length if config.data.padding else None,
            should_stop=should_stop,
        )
    )
    if len(answers) < len(prompts):
        return None
    answers.sort(key=lambda answer: answer.prompt.row)
    records = [
        describe(answer, encoder, texts=config.test_params.do_compute_metrics) for answer in answers
    ]
    references = reference_losses(model, encoder, prompts, device, config.test_params.batch_size)
    for record, (loss, count) in zip(records, references):
        record |= {"reference_nll": round(loss, 6), "reference_tokens": count}
    return records


def reference_losses(
    model: AnswerModel,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    device: Device,
    batch_size: int,
) -> list[tuple[float, int]]:
    """(-log p of the reference answer and its EOS, number of these tokens) for each prompt.

    A reference that does not fit behind its prompt loses its tail.
    """
    context = context_length(model.model)
    parts = []
    for prompt, target in zip(prompts, encoder.targets([p.reference for p in prompts])):
        room = len(target) if context is None else context - len(prompt.input_ids)
        parts.append((prompt.input_ids, target[:room]))
    samples = Samples(
        np.array([token for ids, target in parts for token in (*ids, *target)], dtype=np.int32),
        np.cumsum([0, *(len(ids) + len(target) for ids, target in parts)]),
        np.array([len(ids) for ids, _ in parts], dtype=np.int32),
        np.array([prompt.row for prompt in prompts], dtype=np.int32),
    )
    results: list[tuple[float, int]] = [(0.0, 0)] * len(prompts)
    order = np.argsort(-samples.lengths, kind="stable")
    batches = (order[i : i + batch_size] for i in range(0, len(order), batch_size))
    for batch in device.feed(collate(samples, rows) for rows in batches):
        losses = model.target_losses(batch).cpu().double()
        counts = samples.target_lengths[batch.rows].tolist()
        for row, part in zip(batch.rows, losses.split(counts)):
            results[int(row)] = (float(part.sum()), len(part))
    return results


def find_model(name: str, console: Console) -> Path | str:
    """A run directory's best (or newest intact) model, a model directory, or a hub id.

    Raises:
        UserError: a run directory without a model. Damaged: a checkpoint of ours is not intact.
    """
    path = Path(name)
    if not path.is_dir():
        return name
    if not (path / "config.json").exists():
        best = path / "best"
        if best.is_dir():
            path = best
        else:
            path, remarks = checkpoint.find(str(path), path)
            for remark in remarks:
                console.warn(remark)
            console.warn(f"{best}: there is none yet; {path} is tested")
    if (path / checkpoint.MANIFEST).exists():
        checkpoint.verify(path)
    return path


def identity(
    config: TestConfig, place: Path | str, source: DataSource, template: str
) -> dict[str, Any]:
    """Everything that decides what the log will hold, by names for messages."""
    digest = hashlib.sha256(str(place).encode() if isinstance(place, str) else b"")
    if isinstance(place, Path):
        for file in sorted(place.glob("*")):
            if file.suffix in (".safetensors", ".bin") or file.name in _MODEL_FILES:
                digest.update(file.name.encode() + file.read_bytes())
    values: dict[str, Any] = {
        "model": digest.hexdigest()[:16],
        "data": source.fingerprint()[:16],
        "template": template,
        "seed": config.seed,
        "do_compute_metrics": config.test_params.do_compute_metrics,
        "from_scratch": config.test_params.from_scratch,
        "save_steps": config.test_params.save_steps,
    }
    for name in ("split", "max_prompt_length", "truncate_promt"):
        values[f"data.{name}"] = getattr(config.data, name)
    for name, value in config.generate_params.model_dump().items():
        values[f"generate_params.{name}"] = value
    return values


_MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass
class AnswerLog:
    """The log file, and beside it the settings that its answers belong to."""

    path: Path
    identity: dict[str, Any]

    def beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.stem + suffix)

    def open(self, total: int, window: int) -> list[dict[str, Any]]:
        """Create the log, or read the whole windows that an earlier run of the same test wrote.

        Raises:
            UserError: the log belongs to another test, or cannot be written.
        """
        settings = self.beside(".settings.json")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                settings.write_text(json.dumps(self.identity, indent=1))
                self.path.touch()
                return []
            before = json.loads(settings.read_text()) if settings.exists() else {}
            lines = self.path.read_bytes().splitlines(keepends=True)
        except (OSError, ValueError) as error:
            raise UserError(f"test_params.log_file: {self.path}: cannot be used: {error}") from None
        different = [
            f"  {name}: there {before.get(name)!r}, now {value!r}"
            for name, value in self.identity.items()
            if before.get(name) != value
        ]
        if different:
            raise UserError(
                f"test_params.log_file: {self.path} holds answers of another test:\n"
                + "\n".join(different)
                + "\n  name another log_file, or move that one away"
            )
        records: list[dict[str, Any]] = []
        for line in lines:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if not isinstance(record, dict):
                break  # half-written when the run was killed: from here on it is done again
            records.append(record)
        if len(records) < total:
            records = records[: len(records) // window * window]
        with self.path.open("r+b") as handle:
            handle.truncate(sum(map(len, lines[: len(records)])))
        return records

    def append(self, records: list[dict[str, Any]]) -> None:
        """Write records and wait until they are on the disk."""
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        try:
            with self.path.open("ab") as handle:
                handle.write(text.encode())
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written: {error.strerror}; make room, then the same "
                "command goes on from the answers that are kept"
            ) from None

    def write_summary(self, summary: dict[str, Any], samples: int) -> None:
        content = {"samples": samples, "scores": summary, "settings": self.identity}
        target = self.beside(".summary.json")
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(json.dumps(content, indent=1))
        temporary.replace(target)


def table(summary: dict[str, Any]) -> str:
    """The corpus scores with their 95 % intervals, for the console."""
    rows = [f"{'metric':<18}{'value':>9}   95 % interval"]
    for name, entry in summary.items():
        interval = f"{entry['low']:.4g} to {entry['high']:.4g}"
        rows.append(f"{name:<18}{entry['value']:>9.4g}   {interval}")
    return "\n".join(rows)


COMPARED_SAMPLES = 5


def compare(logs: list[Path], seed: int) -> str:
    """Finished logs side by side, each against the first by a paired bootstrap.

    Raises:
        UserError: a log that cannot be read, or logs of different questions.
    """
    contents = [_read_log(log) for log in logs]
    names = [f"{letter}: {log}" for letter, log in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", logs)]
    parts = [*names, ""]
    for name, other in zip(names[1:], contents[1:]):
        letter = name[0]
        try:
            differences = metrics.compare(contents[0], other, seed=seed)
            changed = metrics.most_changed(contents[0], other, COMPARED_SAMPLES)
        except ValueError as error:
            raise UserError(f"{logs[0]} and {name[3:]} cannot be compared: {error}") from None
        parts.append(
            f"{'metric':<14}{'A':>9}{letter:>9}{letter + ' - A':>11}   95 % interval        p"
        )
        for metric, entry in differences.items():
            interval = f"{entry['low']:+.4g} to {entry['high']:+.4g}"
            parts.append(
                f"{metric:<14}{entry['value_a']:>9.4g}{entry['value_b']:>9.4g}"
                f"{entry['difference']:>+11.4g}   {interval:<20} {entry['p']:.3f}"
            )
        for kind in ("better", "worse"):
            parts.append(
                f"\n{letter} is {kind} most in:"
                if changed[kind]
                else f"\n{letter} is {kind} in none"
            )
            for entry in changed[kind]:
                parts.append(
                    f"  {entry['question']}\n    expected {entry['reference']!r}; A "
                    f"{entry['generated_a']!r}; {letter} {entry['generated_b']!r}"
                )
        parts.append("")
    return "\n".join(parts).rstrip()


def _read_log(path: Path) -> list[dict[str, Any]]:
    try:
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        records = [None]
    needed = {"question", "reference", "generated", "token_f1"}
    if not all(isinstance(record, dict) and needed <= record.keys() for record in records):
        raise UserError(f"{path}: not a log of answers, as `test` writes one")
    return records
