"""How good a model is: validation, scored answers, the `test` command."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import checkpoint
from config import (
    TestConfig,
    TrainConfig,
    UserError,
    resolved,
)
from data import (
    Counts,
    Encoder,
    Prompt,
    Samples,
    Splits,
    by_length,
    collate,
    micro_batches,
    prepare_inference,
    validation_prompts,
)
from device import Device, open_device
from extras import metrics, report
from extras.answer_log import AnswerLog, identity
from extras.console import Console, duration
from extras.formats import DataSource
from extras.generation import Answer, Batching, Decoding, check_token_ids, generate
from extras.model_checks import check_ids, check_length, context_length
from extras.wandb_log import WandbWriter
from model import (
    AnswerModel,
    Opened,
    evaluating,
    open_model,
    parameters_in,
)

# ---------------------------------------------------------------------------------- validation


@dataclass(frozen=True)
class Validation:
    """What a validation works with.

    prompts: questions to answer as well, none without `do_compute_metrics`. batch_size,
    static_shape: of the batches that the loss is computed in.
    """

    samples: Samples
    prompts: list[Prompt]
    decoding: Decoding
    batching: Batching
    batch_size: int
    static_shape: tuple[int, int] | None

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        splits: Splits,
        source: DataSource,
        model: AnswerModel,
        batch_size: int,
        static_shape: tuple[int, int] | None,
    ) -> Validation:
        """Put together what the configuration asks for.

        Raises:
            UserError: answers would not fit into the model's context, or name unknown tokens.
        """
        params, prompts = config.model_params, list[Prompt]()
        if params.do_compute_metrics:
            count = params.val_generate_samples
            prompts = validation_prompts(splits.val, count, source, splits.val_name)
            where = "model_params.val_generate_params"
            check_token_ids(params.val_generate_params, model, where)
            longest = max(len(prompt.input_ids) for prompt in prompts)
            context = context_length(model.model)
            new = params.val_generate_params.max_new_tokens
            if context is not None and longest + new > context:
                raise UserError(
                    f"{where}.max_new_tokens: found {new}; allowed: at most {context - longest}, "
                    f"the model's context ({context}) less the longest prompt"
                )
        decoding = Decoding(params.val_generate_params, config.seed)
        pad_to = static_shape[1] if static_shape else None
        batching = Batching(2 * batch_size, params.use_cache, pad_to=pad_to)
        return cls(splits.val, prompts, decoding, batching, batch_size, static_shape)


def summed_loss(
    model: AnswerModel,
    validation: Validation,
    device: Device,
    should_stop: Callable[[], bool] = lambda: False,
    max_batches: int | None = None,
) -> tuple[float, int] | None:
    """(summed loss, number of targets) over samples, longest first; None if stopped.

    The quotient of the two is the validation loss; it does not depend on the batch size. The
    ranks share the samples, and all of them get the sums over all.

    Args:
        max_batches: of each rank.
    """
    ranks, samples, size = device.ranks, validation.samples, validation.batch_size
    order = by_length(-samples.lengths)
    if max_batches is not None:
        order = order[: max_batches * size * ranks.world_size]
    parts = micro_batches(order, size, -samples.lengths, ranks.rank, ranks.world_size)
    shape = validation.static_shape
    total = device.zero()
    with torch.no_grad(), evaluating(model):
        for batch, _ in device.feed(collate(samples, p, shape, model.can_pack) for p in parts):
            if ranks.any_rank(should_stop()):
                return None
            with device.autocast():
                total += model(batch)
            device.synchronise()
    return float(ranks.all_reduce(total)), int(samples.target_lengths[order].sum())


def validate(
    model: AnswerModel,
    tokenizer: Any,
    validation: Validation,
    device: Device,
    should_stop: Callable[[], bool],
) -> tuple[dict[str, float], list[dict[str, Any]]] | None:
    """Validation metrics, and the answered prompts with their scores; None if stopped.

    Draws from no generator that training uses, so training goes on as if this had not been.
    """
    result = summed_loss(model, validation, device, should_stop)
    if result is None:
        return None
    loss = result[0] / result[1]
    values = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}
    prompts, ranks = validation.prompts, device.ranks
    if not prompts:
        return values, []
    own = prompts[ranks.rank :: ranks.world_size]
    with evaluating(model):
        decoding, batching = validation.decoding, validation.batching
        done = list(generate(model, own, device, decoding, batching, should_stop))
    answers = [answer for part in ranks.all_gather(done) for answer in part]
    if len(answers) < len(prompts):
        return None
    answers.sort(key=lambda answer: answer.prompt.row)
    records = [describe(answer, tokenizer, texts=True) for answer in answers]
    summary = metrics.summarize(records, seed=decoding.seed, resamples=0)
    values |= {f"val_{n}": summary[n]["value"] for n in SCORES}
    return values, records


STATIC_STEP = 128  # tokens
SCORES = ("bleu", "rouge1", "rouge2", "rougeL", "exact_match", "token_f1")


def describe(answer: Answer, tokenizer: Any, texts: bool) -> dict[str, Any]:
    """An answer as one line of the log; `texts` adds BLEU and ROUGE."""
    generated = tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
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


def test(config: TestConfig, quiet: bool, should_stop: Callable[[], bool]) -> bool:
    """Test one model, or several and compare them; false if it was stopped."""
    accelerator = "cuda" if config.cuda else "tpu" if config.tpu else "cpu"
    device = open_device(accelerator, key=accelerator)
    console = Console(quiet=quiet, silent=device.ranks.rank > 0)
    paths, log = config.test_params.test_model_path, Path(config.test_params.log_file)
    if not isinstance(paths, list):
        return test_model(config, paths, log, device, console, should_stop)
    logs = [log.with_name(f"{log.stem}.{i}{log.suffix}") for i in range(1, len(paths) + 1)]
    for path, one in zip(paths, logs):
        if not test_model(config, path, one, device, console, should_stop):
            return False
        console.say()
    if device.ranks.rank == 0:
        console.say(metrics.compare_logs(logs, config.seed))
    return True


def test_model(
    config: TestConfig,
    path: str | None,
    log_file: Path,
    device: Device,
    console: Console,
    should_stop: Callable[[], bool],
) -> bool:
    """Answer the questions of a split and score the answers; false if it was stopped.

    Answers are written in windows of `save_steps` samples. A window does not share batches with
    the next one, so a run that was killed and is started again computes exactly what it would have
    computed, down to the last bit. For the same reason a stop waits for the end of the window: with
    a part of its answers there, the others would be computed in other batches, and rounding can
    decide between two tokens.

    Raises:
        UserError: anything that is wrong with model, data or an existing log.
    """
    place = checkpoint.find_model(path or config.model_name, console.warn)
    system = checkpoint.details(Path(place)).get("system")
    source = DataSource.configured(config.data, system)
    conversations = list(source.conversations(config.data.split, empty_answers=True))
    fresh = config.test_params.from_scratch
    opened = open_model(place, warn=console.warn, from_scratch=fresh, seed=config.seed)
    wanted = config.data.prompt_template
    if wanted is not None and opened.template not in (None, wanted):
        raise UserError(
            f"data.prompt_template: found {wanted!r}, but {place} was trained with "
            f"{opened.template!r}; remove the key or write that template"
        )
    encoder = opened.encoder(wanted, source.chat)
    model, remarks = opened.model.eval(), opened.remarks
    prompts, counts = prepare_inference(
        conversations, encoder, config.data.max_prompt_length, config.data.truncate_prompt
    )
    longest = max(len(prompt.input_ids) for prompt in prompts)
    check_length(
        model.model,
        longest + config.generate_params.max_new_tokens,
        "data.max_prompt_length + generate_params.max_new_tokens",
    )
    references = reference_samples(encoder, prompts, context_length(model.model))
    largest = int(references.input_ids.max(initial=0))
    remarks += source.remarks()
    remarks += check_ids(model.model, opened.tokenizer, largest, config.data.data_dir)
    device.move_model(model)
    check_token_ids(config.generate_params, model, "generate_params")
    row = console.row
    row("model", f"{place}, {parameters_in(model.parameters()):,} parameters")
    for remark in remarks:
        row("", remark)
    row("device", f"{device.describe()}, 32-true")
    row("data", f"{config.data.data_dir} [{config.data.split}]: {counts.describe()}")
    new = config.generate_params.max_new_tokens
    row("", f"longest prompt {longest} tokens, at most {new} new ones")
    log = AnswerLog(log_file, identity(config, opened, source, encoder.template))
    ranks = device.ranks
    records = ranks.on_rank_zero(lambda: log.open(len(prompts), config.test_params.save_steps))
    if records:
        console.say(f"resume    {len(records)} of {len(prompts)} answers are there already")
    console.say(f"answers   {log.path}")
    first, started, tokens = len(records), time.monotonic(), 0
    while len(records) < len(prompts):
        if ranks.any_rank(should_stop()):
            console.say(
                f"stopped: {len(records)} of {len(prompts)} answers are kept in {log.path}; the "
                "same command goes on from there"
            )
            return False
        window = prompts[len(records) : len(records) + config.test_params.save_steps]
        known = references.subset(np.arange(len(records), len(records) + len(window)))
        done = answer_window(opened, window, known, config, device)
        ranks.on_rank_zero(partial(log.append, done))
        records += done
        tokens += sum(record["generated_tokens"] for record in done)
        spent = time.monotonic() - started
        left = spent / (len(records) - first) * (len(prompts) - len(records))
        console.say(
            f"{len(records):6,} of {len(prompts):,} answers, {tokens / spent:,.0f} tokens/s, "
            f"{duration(left)} left"
        )
    if ranks.rank > 0:
        return True
    summary = metrics.summarize(records, seed=config.seed)
    log.write_summary(summary, len(records))
    title = f"{place} on {config.data.data_dir} [{config.data.split}]"
    report.write_report(log.beside(".html"), title, summary, records)
    console.say(metrics.table(summary))
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
    opened: Opened,
    prompts: Sequence[Prompt],
    references: Samples,
    config: TestConfig,
    device: Device,
) -> list[dict[str, Any]]:
    """The finished log records of `prompts`, in their order; references: see reference_samples.

    The ranks share the prompts; the records of all are on every rank.
    """
    ranks, params = device.ranks, config.test_params
    mine = slice(ranks.rank, None, ranks.world_size)
    own = prompts[mine]
    padded = config.data.padding or device.static_shapes
    batching = Batching(
        params.batch_size,
        params.use_cache,
        config.data.padding_side,
        config.data.max_prompt_length if padded else None,
    )
    decoding = Decoding(config.generate_params, config.seed)
    answers = list(generate(opened.model, own, device, decoding, batching))
    answers.sort(key=lambda answer: answer.prompt.row)
    records = [describe(answer, opened.tokenizer, params.do_compute_metrics) for answer in answers]
    known = references.subset(np.arange(len(prompts))[mine])
    losses = reference_losses(opened.model, known, device, params.batch_size)
    # Both are in the order of rows, which is that of the prompts.
    for record, (loss, count) in zip(records, losses):
        record |= {"reference_nll": round(loss, 6), "reference_tokens": count}
    everyone = [record for part in ranks.all_gather(records) for record in part]
    return sorted(everyone, key=lambda record: record["row"])


def reference_samples(encoder: Encoder, prompts: Sequence[Prompt], context: int | None) -> Samples:
    """The prompts with their reference answers; one that does not fit loses its tail."""
    flat_ids: list[int] = []
    flat_mask: list[int] = []
    index = []
    for prompt, parts in zip(prompts, encoder.encode([prompt.conversation for prompt in prompts])):
        # The question may have been cut; what is answered is the prompt as it was given.
        whole = parts[-1]
        target = whole.input_ids[whole.prompt_length :]
        ids = [*prompt.input_ids, *target][:context]
        mask = ([0] * len(prompt.input_ids) + [1] * len(target))[: len(ids)]
        flat_ids += ids
        flat_mask += mask
        index.append((len(ids), sum(mask), prompt.row))
    return Samples.of(
        np.array(flat_ids, dtype=np.int32),
        np.array(flat_mask, dtype=np.uint8),
        np.array(index, dtype=np.int32).reshape(-1, 3),
        Counts(kept=len(index)),
    )


def reference_losses(
    model: AnswerModel, samples: Samples, device: Device, batch_size: int
) -> list[tuple[float, int]]:
    """(-log p of the reference answer and its EOS, number of these tokens) for each sample."""
    results: list[tuple[float, int]] = [(0.0, 0)] * len(samples)
    batches = micro_batches(np.arange(len(samples)), batch_size, -samples.lengths)
    shape = None
    if device.static_shapes and len(samples):  # rounded up, so that few windows need a new one
        shape = (batch_size, -(-int(samples.lengths.max()) // STATIC_STEP) * STATIC_STEP)
    for batch, _ in device.feed(collate(samples, rows, shape) for rows in batches):
        losses = model.target_losses(batch).cpu().double()
        counts = samples.target_lengths[batch.rows].tolist()
        for row, part in zip(batch.rows, losses[: sum(counts)].split(counts)):
            results[int(row)] = (float(part.sum()), len(part))
    return results
