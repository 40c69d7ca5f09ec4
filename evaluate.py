"""How good a model is: validation, scored answers, the `test` command."""

from __future__ import annotations

import hashlib
import json
import math
import os
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
    DEFAULT_TEMPLATE,
    TestConfig,
    TrainConfig,
    UserError,
    resolved,
)
from data import (
    DataSource,
    Encoder,
    Prompt,
    Samples,
    collate,
    micro_batches,
    prepare_inference,
)
from device import Device, open_device
from extras import metrics, report
from extras.console import Console, duration
from extras.generation import Answer, check_token_ids, generate
from extras.wandb_log import WandbWriter
from model import (
    AnswerModel,
    check_ids,
    check_length,
    context_length,
    evaluating,
    load_model,
    load_tokenizer,
    parameters_in,
)

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

    The quotient of the two is the validation loss; it does not depend on the batch size. The
    ranks share the samples, and all of them get the sums over all.

    Args:
        shape: (B, T) that every batch is padded to; None: to its longest sample.
        max_batches: of each rank.
    """
    ranks = device.ranks
    order = np.argsort(-samples.lengths, kind="stable")
    if max_batches is not None:
        order = order[: max_batches * batch_size * ranks.world_size]
    parts = micro_batches(order, batch_size, -samples.lengths, ranks.rank, ranks.world_size)
    total = device.zero()
    with torch.no_grad(), evaluating(model):
        made = (collate(samples, rows, static_shape=shape, packed=model.packs) for rows in parts)
        for batch, _ in device.feed(made):
            if ranks.any(should_stop()):
                return None
            with device.autocast():
                total += model(batch)
            device.synchronise()
    return float(ranks.add(total)), int(samples.target_lengths[order].sum())


def validate(
    model: AnswerModel,
    samples: Samples,
    prompts: Sequence[Prompt],
    encoder: Encoder,
    config: TrainConfig,
    device: Device,
    batch_size: int,
    shape: tuple[int, int] | None,
    should_stop: Callable[[], bool],
) -> tuple[dict[str, float], list[dict[str, Any]]] | None:
    """Validation metrics, and the answered `prompts` with their scores; None if stopped.

    Draws from no generator that training uses, so training goes on as if this had not been.
    """
    result = summed_loss(model, samples, device, batch_size, should_stop, shape)
    if result is None:
        return None
    loss = result[0] / result[1]
    values = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}
    if not prompts:
        return values, []
    ranks = device.ranks
    with evaluating(model):
        own = list(
            generate(
                model,
                prompts[ranks.rank :: ranks.world_size],
                config.model_params.val_generate_params,
                device,
                eos=encoder.eos,
                seed=config.seed,
                batch_size=2 * batch_size,
                use_cache=config.model_params.use_cache,
                pad_to=shape[1] if shape else None,
                should_stop=should_stop,
            )
        )
    answers = [answer for part in ranks.gather(own) for answer in part]
    if len(answers) < len(prompts):
        return None
    answers.sort(key=lambda answer: answer.prompt.row)
    records = [describe(answer, encoder, texts=True) for answer in answers]
    summary = metrics.summarize(records, seed=config.seed, resamples=0)
    values |= {f"val_{n}": summary[n]["value"] for n in SCORES}
    return values, records


STATIC_STEP = 128  # tokens
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
        console.say(compare(logs, config.seed))
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
    check_length(
        plain,
        longest + config.generate_params.max_new_tokens,
        "data.max_prompt_length + generate_params.max_new_tokens",
    )
    references = encoder.targets([prompt.reference for prompt in prompts])
    given = (*references, *(prompt.input_ids for prompt in prompts))
    largest = max((max(ids) for ids in given if ids), default=0)
    remarks += check_ids(plain, tokenizer, largest, config.data.data_dir)
    model = AnswerModel(plain).eval()
    device.move_model(model)
    check_token_ids(config.generate_params, model, "generate_params")
    row = console.row
    row("model", f"{place}, {parameters_in(plain.parameters()):,} parameters")
    for remark in remarks:
        row("", remark)
    row("device", f"{device.describe()}, 32-true")
    row("data", f"{config.data.data_dir} [{config.data.split}]: {counts.describe()}")
    new = config.generate_params.max_new_tokens
    row("", f"longest prompt {longest} tokens, at most {new} new ones")
    log = AnswerLog(log_file, identity(config, place, source, template))
    ranks = device.ranks
    records = ranks.first(lambda: log.open(len(prompts), config.test_params.save_steps))
    if records:
        console.say(f"resume    {len(records)} of {len(prompts)} answers are there already")
    console.say(f"answers   {log.path}")
    first, started, tokens = len(records), time.monotonic(), 0
    while len(records) < len(prompts):
        if ranks.any(should_stop()):
            console.say(
                f"stopped: {len(records)} of {len(prompts)} answers are kept in {log.path}; the "
                "same command goes on from there"
            )
            return False
        window = prompts[len(records) : len(records) + config.test_params.save_steps]
        done = answer_window(model, encoder, window, config, device)
        ranks.first(partial(log.append, done))
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
) -> list[dict[str, Any]]:
    """The finished log records of `prompts`, in their order.

    The ranks share the prompts; the records of all are on every rank.
    """
    ranks = device.ranks
    own = prompts[ranks.rank :: ranks.world_size]
    answers = list(
        generate(
            model,
            own,
            config.generate_params,
            device,
            eos=encoder.eos,
            seed=config.seed,
            batch_size=config.test_params.batch_size,
            use_cache=config.test_params.use_cache,
            padding_side=config.data.padding_side,
            pad_to=config.data.max_prompt_length
            if config.data.padding or device.static_shapes
            else None,
        )
    )
    answers.sort(key=lambda answer: answer.prompt.row)
    records = [
        describe(answer, encoder, texts=config.test_params.do_compute_metrics) for answer in answers
    ]
    references = reference_losses(model, encoder, own, device, config.test_params.batch_size)
    for record, (loss, count) in zip(records, references):
        record |= {"reference_nll": round(loss, 6), "reference_tokens": count}
    everyone = [record for part in ranks.gather(records) for record in part]
    return sorted(everyone, key=lambda record: record["row"])


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
    shape = None
    if device.static_shapes and len(order):  # rounded up, so that few windows need a new one
        shape = (batch_size, -(-int(samples.lengths.max()) // STATIC_STEP) * STATIC_STEP)
    for batch, _ in device.feed(collate(samples, rows, static_shape=shape) for rows in batches):
        losses = model.target_losses(batch).cpu().double()
        counts = samples.target_lengths[batch.rows].tolist()
        for row, part in zip(batch.rows, losses[: sum(counts)].split(counts)):
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
            console.warn(f"{best}: there is none yet; {path} is used")
    checkpoint.verify_ours(path)
    return path


def identity(
    config: TestConfig, place: Path | str, source: DataSource, template: str
) -> dict[str, Any]:
    """Everything that decides what the log will hold, by names for messages."""
    digest = hashlib.sha256(str(place).encode() if isinstance(place, str) else b"")
    if isinstance(place, Path):
        for file in sorted(place.glob("*")):
            if file.suffix in (".safetensors", ".bin") or file.name in _MODEL_FILES:
                digest.update(f"{file.name} {checkpoint.sha256_of(file)}".encode())
    values: dict[str, Any] = {
        "model": digest.hexdigest()[:16],
        "data": source.fingerprint[:16],
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
        text = json.dumps(content, indent=1)
        checkpoint.write_file(self.beside(".summary.json"), text.encode())


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
