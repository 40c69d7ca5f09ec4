"""One training run: what it is set up from, and the bookkeeping around the loop in sft.py.

Set-up reads configuration, data, model and, when resuming, a checkpoint. Bookkeeping decides when
to validate, save and log, and keeps the counters that a checkpoint holds.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import checkpoint
import freeze
from config import TestConfig, TrainConfig, UserError, load, resolved, to_yaml
from data import (
    Batch,
    DataSource,
    Encoder,
    Prompt,
    cached_samples,
    collate,
    epoch_order,
    hold_out,
    micro_batches,
    numbered,
)
from device import StepResult, open_device
from evaluate import summed_loss, validate
from extras.console import METRICS, Console, Metrics, duration, visible
from extras.generation import check_token_ids
from extras.plot import CURVES, Curves
from extras.probe import check_trainable
from extras.wandb_log import WandbWriter
from model import (
    AnswerModel,
    architecture,
    check_ids,
    check_length,
    checkpoint_activations,
    context_length,
    export,
    learning_rate,
    load_model,
    load_tokenizer,
    make_optimizer,
    quiet_libraries,
    tokenizer_files,
    warmup_steps,
)

PACKAGES = (
    "torch transformers tokenizers safetensors numpy pydantic pyyaml nltk rouge-score wandb tqdm "
    "matplotlib"
).split()
SAMPLES_PER_STEP = "data.batch_size x trainer.params.accumulate_grad_batches x ranks"
SAMPLE_ANSWERS = 3  # of the last validation that generates, shown at the end
SHOWN_METRICS = {  # on the line of a validation; the one that selects `best` is always there
    "val_loss": "val loss",
    "val_exact_match": "EM",
    "val_token_f1": "F1",
    "val_rougeL": "ROUGE-L",
}


@dataclass
class State:
    """The counters of a run; everything here is part of a checkpoint.

    position counts the steps that were tried, global_step those that changed the weights. The
    window_* sums run since the last log point.
    """

    position: int = 0
    global_step: int = 0
    tokens: int = 0
    bad_steps: int = 0
    bad_in_row: int = 0
    overflows: int = 0
    window_loss: float = 0.0
    window_targets: int = 0
    window_tokens: int = 0
    validated_at: int = -1
    validated_step: int = 0
    best_value: float | None = None
    best_step: int = 0
    seconds: float = 0.0
    wandb_id: str = ""

    def count(self, result: StepResult, tokens: int, targets: int) -> None:
        """Account for one tried step."""
        self.position += 1
        if result.applied:
            self.global_step += 1
            self.tokens += tokens
            self.bad_in_row = 0
            self.window_loss += result.loss
            self.window_targets += targets
            self.window_tokens += tokens
        elif result.overflow:
            self.overflows += 1
        else:
            self.bad_steps += 1
            self.bad_in_row += 1


class Run:
    """Everything that the loop in `sft.train` works with.

    Attributes:
        samples, val_samples: what is trained on and validated on.
        samples_per_step: batch_size x accumulate_grad_batches x ranks.
        steps_per_epoch, total_steps: in optimizer steps.
        trainable: the parameters that the optimizer updates.
    """

    def __init__(self, config: TrainConfig, quiet: bool = False, dry: bool = False) -> None:
        """`dry` sets everything up and announces it without touching the run's directory."""
        quiet_libraries()
        self.config = config
        self.params = config.trainer.params
        self.clip = self.params.gradient_clip_val
        self.device = open_device(self.params.accelerator, self.params.precision)
        self.ranks = self.device.ranks
        self.console = Console(quiet=quiet, silent=self.ranks.rank > 0)
        self.directory = Path(config.trainer.checkpoint.dirpath)
        self.batch_size = config.data.batch_size * self.device.shards
        # (B, T) of every batch, where each new shape is compiled.
        static = self.device.static_shapes or config.data.on_tpu
        self.shape = (self.batch_size, config.data.max_length) if static else None
        self.resumed_from: Path | None = None
        if not dry:
            self.ranks.first(self._open_directory)
        try:
            self.resumed_from = self.ranks.first(self._resume_point)
        except UserError as error:
            if not dry:
                raise
            self.console.warn(f"train would refuse this: {error}")

        self.source = DataSource.configured(config.data)
        self.remarks: list[str] = []
        self._load_model()
        self._load_data(self.source)
        self._plan()
        self.identity = {
            "model": architecture(config.model_name),
            "data": self.source.fingerprint,
            SAMPLES_PER_STEP: self.samples_per_step,
        }
        self.answers: list[dict[str, Any]] = []
        self.state = State(wandb_id=uuid.uuid4().hex[:8])
        metrics_size = 0
        self.device.seed(config.seed)
        if self.resumed_from:
            metrics_size = self._restore(self.resumed_from)
        if not dry:
            self._cache_prefix()
        self.saved_at = self._moment() if self.resumed_from else None
        self.saved_step = self.state.global_step if self.resumed_from else 0
        # Rank 0 of a real run keeps the records.
        self.metrics: Metrics | None = None
        self.wandb: WandbWriter | None = None
        self.curves: Curves | None = None
        if not dry and self.ranks.rank == 0:
            self._open_records(metrics_size)
        self._announce()
        if not dry:
            self.console.start_bar(self.total_steps, self.state.global_step)
        self.started = self.window_started = time.monotonic()

    # ---------------------------------------------------------------------------- set-up

    def _open_directory(self) -> None:
        """Make the run's directory usable.

        Raises:
            UserError: it cannot be written to, or another process trains there.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f".tmp-probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"trainer.checkpoint.dirpath: {self.directory}: cannot be written to "
                f"({error.strerror}); name a directory that can"
            ) from None
        self.lock = checkpoint.lock(self.directory)
        checkpoint.clean_up(self.directory)

    def _resume_point(self) -> Path | None:
        """The checkpoint to resume from, if any.

        Raises:
            UserError: there is none where one is wanted, or a run that would be overwritten.
        """
        checkpoint_config, wanted = self.config.trainer.checkpoint, self.config.trainer.ckpt_path
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        there = checkpoint.steps(self.directory)
        if restarted and there:  # torchrun started the same command again after a failure
            wanted = "last"
        if wanted is None:
            if there:
                raise UserError(
                    f"trainer.checkpoint.dirpath: {self.directory} already holds a run "
                    f"({there[0].name}); go on with it by trainer.ckpt_path=last, or name another "
                    "directory by trainer.checkpoint.dirpath=..."
                )
            if (self.directory / "best").exists():
                raise UserError(
                    f"trainer.checkpoint.dirpath: {self.directory} holds best/ and nothing that "
                    "could be resumed; move it away, or name another directory"
                )
            return None
        path, remarks = checkpoint.find(wanted, self.directory)
        for remark in remarks:
            self.console.warn(remark)
        newer = [p for p in there if checkpoint.number(p) > checkpoint.number(path)]
        inside = path.resolve().parent == self.directory.resolve()
        if newer and inside and not remarks:
            raise UserError(
                f"trainer.ckpt_path: {path} is older than {newer[0].name} in the same run; go on "
                "with trainer.ckpt_path=last, or branch off with another "
                f"{checkpoint_config.dirpath!r} in trainer.checkpoint.dirpath"
            )
        return path

    def _load_model(self) -> None:
        config = self.config
        name = str(self.resumed_from or config.model_name)
        if not self.resumed_from:
            checkpoint.verify_ours(Path(name))
        self.tokenizer = load_tokenizer(name)
        self.tokenizer_files = tokenizer_files(name, self.tokenizer)
        self.encoder = Encoder(self.tokenizer, config.data.prompt_template)
        scratch = config.model_params.from_scratch and not self.resumed_from
        model, remarks = load_model(
            name, from_scratch=scratch, dtype=self.device.weights_dtype, seed=config.seed
        )
        if self.resumed_from:
            remarks.append(f"weights from {self.resumed_from}")
        self.remarks += remarks
        check_length(model, config.data.max_length, "data.max_length")
        _refuse_router_loss(config.model_name, model.config)
        freeze.apply(model, config.model_params)
        self.kinds = freeze.report(model)
        if self.params.gradient_checkpointing:
            checkpoint_activations(model)
        self.model = AnswerModel(model)
        reached = check_trainable(self.model)
        # A compiled model would be compiled anew for each list of lengths.
        self.model.packs &= self.device.packs and not self.params.compile and self.shape is None
        if self.params.compile:
            self.model.backbone.compile(dynamic=True)
        self.training_model = self.device.parallel(self.model, self.params.strategy, reached)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(model, config.model_params)

    def _load_data(self, source: DataSource) -> None:
        config, data = self.config, self.config.data
        has_val = source.has("val") and not self.params.overfit_batches
        cache = (self.encoder, data.max_length, data.truncate_promt)
        with self.ranks.one_by_machine():
            self.samples, self.overlap = cached_samples(source, "train", *cache)
            if has_val:
                self.val_samples, _ = cached_samples(source, "val", *cache)
        self.train_split = self.samples  # all of it, whatever is held out below
        self.val_split = "val" if has_val else "train"
        if self.params.overfit_batches:
            count = self.params.overfit_batches
            size = count * data.batch_size if isinstance(count, int) else count * len(self.samples)
            chosen = np.arange(min(len(self.samples), max(1, math.ceil(size))))
            self.samples = self.val_samples = self.samples.subset(chosen)
        elif len(self.samples) and not has_val:
            self.samples, self.val_samples = hold_out(self.samples, data.val_fraction, config.seed)
        splits = (self.train_split, self.val_samples)
        largest = max((int(s.tokens.max()) for s in splits if len(s.tokens)), default=0)
        self.remarks += check_ids(self.model.model, self.tokenizer, largest, data.data_dir)
        for name, samples in (("train", self.samples), (self.val_split, self.val_samples)):
            if int(samples.target_lengths.sum()) == 0:
                raise UserError(
                    f"data: the split {name!r} has no target token to learn: "
                    f"{samples.counts.describe()}; raise data.max_length ({data.max_length})"
                )
        self.prompts = self._validation_prompts(source)

    def _validation_prompts(self, source: DataSource) -> list[Prompt]:
        """The validation questions to answer, with the very ids that training sees."""
        params = self.config.model_params
        if not params.do_compute_metrics:
            return []
        count = min(params.val_generate_samples, len(self.val_samples))
        wanted = {self.val_samples.row(i): i for i in range(count)}
        prompts = []
        for pair in source.pairs(self.val_split):
            if pair.row in wanted:
                ids, prompt = self.val_samples.ids(wanted[pair.row])
                prompts.append(Prompt(pair.row, pair.question, pair.answer, ids[:prompt].tolist()))
        check_token_ids(params.val_generate_params, self.model, "model_params.val_generate_params")
        longest = max(len(prompt.input_ids) for prompt in prompts)
        context = context_length(self.model.model)
        new = params.val_generate_params.max_new_tokens
        if context is not None and longest + new > context:
            raise UserError(
                f"model_params.val_generate_params.max_new_tokens: found {new}; allowed: at most "
                f"{context - longest}, the model's context ({context}) less the longest prompt"
            )
        return prompts

    def _plan(self) -> None:
        """The arithmetic of batches, steps and epochs."""
        params = self.params
        self.samples_per_step = (
            self.batch_size * params.accumulate_grad_batches * self.ranks.world_size
        )
        self.steps_per_epoch = math.ceil(len(self.samples) / self.samples_per_step)
        epochs = params.max_epochs if params.max_epochs > 0 else math.inf
        self.end_position = epochs * self.steps_per_epoch
        self.total_steps = int(min(self.end_position, params.max_steps or math.inf))
        self.warmup = warmup_steps(self.config.model_params.warmup_steps_per_cent, self.total_steps)
        self._order_epoch = -1

    def _cache_prefix(self) -> None:
        """Compute the outputs of frozen lowest blocks once, if the configuration wants it."""
        where = self.config.model_params.cache_frozen_prefix
        if where is None:
            return
        probe = self.device.move(torch.from_numpy(self.samples.ids(0)[0].astype(np.int64))[None])
        generators = self.device.rng_state()
        from extras.frozen_prefix import PrefixCache

        cache = PrefixCache(self.model.model, self.model.backbone, probe)
        self.device.set_rng_state(generators)
        began = time.monotonic()
        cache.fill(self.samples, self.device, self.directory if where == "disk" else None)
        self.model.prefix_cache = cache
        place = "on disk" if where == "disk" else "in memory"
        self.remarks.append(
            f"{cache.depth} frozen blocks run once for all epochs: {len(self.samples):,} samples "
            f"in {duration(time.monotonic() - began)}, kept {place}"
        )

    def _restore(self, path: Path) -> int:
        """Take over a checkpoint's state; the size that metrics.jsonl had."""
        stored = checkpoint.load_state(path)
        try:
            self.remarks += checkpoint.check_same_run(stored, self.config, self.identity, path)
            self.state = State(**stored["state"])
            self.device.load_optimizer_state(self.optimizer, stored["optimizer"])
            self.device.scaler.load_state_dict(stored["scaler"])
            if self.ranks.rank < len(stored["rng"]):  # a further rank has its fresh seed
                self.device.set_rng_state(stored["rng"][self.ranks.rank])
            size = int(stored["metrics_size"])
            before = stored["config"]["trainer"]["checkpoint"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a trainer state of this version: {error!r}") from None
        now = self.config.trainer.checkpoint
        same_run = path.resolve().parent == self.directory.resolve()
        if not same_run or (before["log_obg"], before["mode"]) != (now.log_obg, now.mode):
            self.state.best_value, self.state.best_step = None, 0  # of another run, or measure
        if not same_run:
            self.state.wandb_id = uuid.uuid4().hex[:8]
        return size if same_run else 0

    def _open_records(self, metrics_size: int) -> None:
        """metrics.jsonl, the resolved configuration, and what the run was made with."""
        metrics = self.directory / METRICS
        if metrics.exists() and not metrics_size:
            metrics.replace(metrics.with_suffix(".old.jsonl"))
        self.metrics = Metrics(self.directory, metrics_size)
        (self.directory / checkpoint.CONFIG).write_text(to_yaml(self.config), encoding="utf-8")
        record = {
            "command": _command(),
            "resumed_from": str(self.resumed_from) if self.resumed_from else None,
            "git_commit": _git_commit(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: _version(name) for name in PACKAGES},
            "device": self.device.describe(),
            "ranks": self.ranks.world_size,
            "precision": self.params.precision,
            "data_sha256": self.identity["data"],
            "samples": {"train": len(self.samples), "val": len(self.val_samples)},
            "truncation": {"train": asdict(self.train_split.counts)}
            | ({"val": asdict(self.val_samples.counts)} if self.val_split == "val" else {}),
            **self.overlap,
        }
        (self.directory / "run.json").write_text(json.dumps(record, indent=1))
        self.curves = Curves(self.directory, self.console)
        if self.config.wandb is not None:
            self.wandb = WandbWriter(
                self.config.wandb,
                self.directory,
                resolved(self.config) | {"run": record},
                self.state.wandb_id,
                self.console,
                "train",
            )

    def _announce(self) -> None:
        """What will run, before it runs."""
        row, params, config = self.console.row, self.params, self.config
        kinds = self.kinds
        total, trained = sum(k[1] for k in kinds), sum(k[2] for k in kinds)
        row("model", f"{config.model_name}, {total:,} parameters, {trained / total:.1%} trained")
        row("", ", ".join(f"{kind} {t / n:.0%} of {n:,}" for kind, n, t in kinds))
        for remark in self.remarks:
            row("", remark)
        held = " (held out of train)" if self.val_split == "train" else ""
        if params.overfit_batches:
            held = " (the same: overfit_batches)"
        sizes = f"{len(self.samples):,} samples to train, {len(self.val_samples):,} to validate"
        row("data", f"{config.data.data_dir}: {sizes}{held}")
        row("", f"train: {self.train_split.counts.describe()}")
        if self.val_split == "val":
            row("", f"val: {self.val_samples.counts.describe()}")
        if self.overlap["duplicates"] or self.overlap["train_test_overlap"]:
            self.console.warn(
                f"{config.data.data_dir}: {self.overlap['duplicates']} pairs of train are "
                f"duplicates, {self.overlap['train_test_overlap']} questions of test are in train"
            )
        self.show_sample(0, longest=200)
        ranks, batches = self.ranks.world_size * self.device.shards, params.accumulate_grad_batches
        row(
            "step",
            f"{_count(config.data.batch_size, 'sample')} x {_count(batches, 'batch', 'batches')} "
            f"x {_count(ranks, 'rank')} = {_count(self.samples_per_step, 'sample')}",
        )
        row(
            "plan",
            f"{_count(self.steps_per_epoch, 'step')} an epoch, {self.total_steps:,} in all, "
            f"{self.warmup:,} of them warm-up",
        )
        row("device", f"{self.device.describe()}, precision {params.precision}")
        slow = self.device.slow_precision()
        if slow:
            self.console.warn(slow)
        every = config.trainer.checkpoint.every_n_train_steps
        row(
            "output",
            f"{self.directory}: a checkpoint every {_count(every, 'step')}, "
            f"{METRICS}, {CURVES}, {checkpoint.CONFIG} (every value)",
        )
        if self.wandb:
            row("W&B", f"{self.wandb.mode}, project {self.wandb.project}")
        if self.resumed_from:
            row("resume", f"{self.resumed_from}, after step {self.state.global_step:,}")
        else:
            row("resume", "the same command with trainer.ckpt_path=last goes on after a stop")

    def show_sample(self, i: int, longest: int | None = None) -> None:
        """Print training sample i; of a text of more than `longest` characters its two ends."""
        ids, prompt = self.samples.ids(i)
        texts = [self.tokenizer.decode(part) for part in (ids[:prompt], ids[prompt:])]
        if longest:
            half = longest // 2
            texts = [t if len(t) <= longest else f"{t[:half]} ... {t[-half:]}" for t in texts]
        self.console.sample(*texts)

    # ------------------------------------------------------------------------ during the loop

    def finished(self) -> bool:
        limit = self.params.max_steps
        return self.state.position >= self.end_position or (
            limit is not None and self.state.global_step >= limit
        )

    def validation_due(self) -> bool:
        state, interval = self.state, self.params.val_check_interval
        if state.position == 0 or state.validated_at == state.position:
            return False
        if self.finished():
            return True
        if isinstance(interval, int):
            # A skipped step moves the position and not the step, which is validated already.
            new = state.global_step > state.validated_step
            return new and state.global_step % interval == 0
        every = max(1, int(self.steps_per_epoch * interval))
        in_epoch = (state.position - 1) % self.steps_per_epoch + 1
        return in_epoch % every == 0

    def checkpoint_due(self) -> bool:
        every = self.config.trainer.checkpoint.every_n_train_steps
        step = self.state.global_step
        return step % every == 0 and step > self.saved_step

    def _moment(self) -> tuple[int, int]:
        """What a checkpoint stands for: after which step, and after which validation."""
        return self.state.position, self.state.validated_at

    def next_rows(self) -> np.ndarray:
        """Indices of the samples of the next step, the same for all ranks."""
        epoch, k = divmod(self.state.position, self.steps_per_epoch)
        if epoch != self._order_epoch:
            self._order_epoch = epoch
            self._order = epoch_order(
                len(self.samples),
                self.samples_per_step,
                self.config.seed,
                epoch,
                self.samples.lengths if self.config.data.group_by_length else None,
                shuffle=not self.params.overfit_batches,
            )
        return self._order[k * self.samples_per_step : (k + 1) * self.samples_per_step]

    def micro_batches(self, rows: np.ndarray) -> Iterator[Batch]:
        """This rank's share of a step's samples, collated."""
        ranks = self.ranks
        parts = micro_batches(
            rows, self.batch_size, self.samples.lengths, ranks.rank, ranks.world_size
        )
        if self.shape:  # a short last step must not be another graph
            missing = self.params.accumulate_grad_batches - len(parts)
            parts += [rows[:0]] * missing
        for part in parts:
            batch = collate(self.samples, part, static_shape=self.shape, packed=self.model.packs)
            if self.model.prefix_cache is not None:
                batch.prefix = self.model.prefix_cache.gather(batch)
            yield batch

    def set_learning_rate(self) -> float:
        rate = learning_rate(
            self.state.global_step,
            self.config.model_params.learning_rate,
            self.warmup,
            self.total_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def after_step(self, result: StepResult, rows: np.ndarray, rate: float) -> None:
        """Count, check and log one tried step.

        Raises:
            UserError: too many steps in a row with a loss or gradient that is no number.
        """
        state = self.state
        tokens = int(self.samples.lengths[rows].sum())
        state.count(result, tokens, int(self.samples.target_lengths[rows].sum()))
        self._check_health(result, rows)
        mean = result.loss / max(1, int(self.samples.target_lengths[rows].sum()))
        speed = state.tokens / max(1e-9, state.seconds + time.monotonic() - self.started)
        shown = f"loss {mean:.4f}  lr {rate:.2e}  {speed:,.0f} tokens/s"
        self.console.progress(state.global_step, shown)
        due = state.global_step % self.params.log_every_n_steps == 0 or self.finished()
        if state.window_targets and due and (result.applied or self.finished()):
            self._log(result, rate)

    def _check_health(self, result: StepResult, rows: np.ndarray) -> None:
        if result.applied or result.overflow:
            return
        state, limit = self.state, self.params.max_bad_steps
        names = numbered(sorted(self.samples.row(int(i)) for i in rows))
        what = "loss" if not math.isfinite(result.loss) else "gradient norm"
        self.console.warn(
            f"step {state.global_step + 1} skipped: its {what} is not a finite number "
            f"({names} of train; {state.bad_in_row} in a row)"
        )
        if self.metrics:
            self.metrics.write(
                {
                    "step": state.global_step,
                    "bad_steps": state.bad_steps,
                    "position": state.position,
                }
            )
        if state.bad_in_row >= limit:
            raise UserError(
                f"stopped: {state.bad_in_row} steps in a row had a {what} that is not a finite "
                f"number (trainer.params.max_bad_steps: {limit})\n"
                f"  the last samples were {names} of train in {self.config.data.data_dir}\n"
                "  look at them, lower model_params.learning_rate, or use precision 32 or "
                f"bf16-mixed; the checkpoints in {self.directory} are from before"
            )

    def _log(self, result: StepResult, rate: float) -> None:
        state, now = self.state, time.monotonic()
        loss = state.window_loss / max(1, state.window_targets)
        speed = state.window_tokens / max(1e-9, now - self.window_started)
        values = {
            "step": state.global_step,
            "epoch": round(state.position / self.steps_per_epoch, 4),
            "loss": loss,
            "lr": rate,
            "grad_norm": result.grad_norm,
            "tokens": state.tokens,
            "bad_steps": state.bad_steps,
            "overflows": state.overflows,
            "tokens_per_second": round(speed, 1),
            "seconds": round(state.seconds + now - self.started, 3),
            "memory": self.device.peak_memory(),
        }
        self._record(values, "train/")
        left = (self.total_steps - state.global_step) * self._seconds_per_step()
        self.console.step_line(
            f"step {state.global_step:,}/{self.total_steps:,}  loss {loss:.4f}  lr {rate:.2e}  "
            f"norm {result.grad_norm:.2f}  {speed:,.0f} tokens/s  {duration(left)} left"
        )
        state.window_loss, state.window_targets, state.window_tokens = 0.0, 0, 0
        self.window_started = now

    def _record(self, values: dict[str, Any], prefix: str) -> None:
        """One line of metrics.jsonl, and the same to W&B with `prefix`; rank 0's alone."""
        if self.metrics:
            self.metrics.write(values)
        if self.wandb:
            kept = {f"{prefix}{k.removeprefix('val_')}": v for k, v in values.items()}
            del kept[f"{prefix}step"]
            self.wandb.log(kept | {"global_step": values["step"]})

    def _seconds_per_step(self) -> float:
        spent = self.state.seconds + time.monotonic() - self.started
        return spent / max(1, self.state.global_step)

    # -------------------------------------------------------------------- validation and saving

    def sanity_check(self, should_stop: Callable[[], bool]) -> None:
        """A few validation batches before training, so that what is broken fails now."""
        count = self.params.num_sanity_val_steps
        if count == 0 or self.resumed_from:
            return
        batches = None if count < 0 else count
        result = summed_loss(
            self.model,
            self.val_samples,
            self.device,
            self.batch_size,
            should_stop,
            self.shape,
            batches,
        )
        if result is None:
            return
        loss = result[0] / max(1, result[1])
        if not math.isfinite(loss):
            raise UserError(
                f"sanity validation: the loss before the first step is {loss}, not a number; "
                f"look at the weights of {self.config.model_name} and at trainer.params.precision"
            )
        self.console.say(f"sanity    validation loss {loss:.4f}")

    def validate(self, should_stop: Callable[[], bool]) -> bool:
        """Validate, log it, and keep the model if it is the best; false if it was stopped."""
        began = time.monotonic()
        result = validate(
            self.model,
            self.val_samples,
            self.prompts,
            self.encoder,
            self.config,
            self.device,
            self.batch_size,
            self.shape,
            should_stop,
        )
        if result is None:
            return False
        values, records = result
        state, chosen = self.state, self.config.trainer.checkpoint
        state.validated_at, state.validated_step = state.position, state.global_step
        epoch = round(state.position / self.steps_per_epoch, 4)
        self._record({"step": state.global_step, "epoch": epoch, **values}, "val/")
        if self.wandb and records:
            columns = ["question", "reference", "generated", "exact_match"]
            rows = [[record[c] for c in columns] for record in records]
            self.wandb.table("val/answers", columns, rows, state.global_step)
        value, best = values[chosen.log_obg], state.best_value
        better = best is None or (value < best if chosen.mode == "min" else value > best)
        if math.isfinite(value) and better:
            state.best_value, state.best_step = value, state.global_step
            self._write("best", lambda directory: None)
        self.answers = records[:SAMPLE_ANSWERS]
        shown = "  ".join(
            f"{SHOWN_METRICS.get(name, name)} {values[name]:.4f}"
            for name in dict.fromkeys([*SHOWN_METRICS, chosen.log_obg])
            if name in values
        )
        mark = "  best" if state.best_step == state.global_step else ""
        took = duration(time.monotonic() - began)
        self.console.say(f"step {state.global_step:,}  {shown}  {took}{mark}")
        self._exclude(began)
        if state.best_value is not None and self.saved_at is None:
            self.save()  # never only a best/, which cannot be resumed
        if not self.finished():  # the end draws anyway
            began = time.monotonic()
            if self.curves:
                self.curves.draw()
            self._exclude(began)
        return True

    def _exclude(self, began: float) -> None:
        """The time since `began` is not training time."""
        spent = time.monotonic() - began
        self.started += spent
        self.window_started += spent

    def save(self) -> Path:
        """Write a resumable checkpoint, then rotate older ones."""
        began = time.monotonic()
        self.state.seconds += began - self.started
        self.started = began
        contents = {
            "state": asdict(self.state),
            "optimizer": self.device.whole_optimizer_state(self.optimizer),
            "scaler": self.device.scaler.state_dict(),
            "rng": self.ranks.gather(self.device.rng_state()),
            "metrics_size": self.metrics.sync() if self.metrics else 0,
            "identity": self.identity,
            "config": resolved(self.config),
        }
        path = self._write(
            checkpoint.step_name(self.state.global_step),
            lambda directory: torch.save(contents, directory / checkpoint.STATE),
        )
        self.saved_at, self.saved_step = self._moment(), self.state.global_step
        keep = self.config.trainer.checkpoint.save_top_k
        if self.ranks.rank == 0:
            checkpoint.rotate(self.directory, keep, {path, self.resumed_from or path})
        self.console.say(f"saved {path} in {duration(time.monotonic() - began)}")
        self._exclude(began)
        return path

    def _write(self, name: str, add: Callable[[Path], Any]) -> Path:
        about = {
            "prompt_template": self.config.data.prompt_template,
            "model_name": self.config.model_name,
            "global_step": self.state.global_step,
            f"best_{self.config.trainer.checkpoint.log_obg}": self.state.best_value,
        }

        weights = self.device.whole_state(self.model.model)

        def write(directory: Path) -> None:
            export(self.model.model, weights, self.tokenizer, self.tokenizer_files, directory)
            (directory / checkpoint.DETAILS).write_text(json.dumps(about, indent=1))
            (directory / checkpoint.CONFIG).write_text(to_yaml(self.config), encoding="utf-8")
            add(directory)

        return self.ranks.first(lambda: checkpoint.save(self.directory, name, write))

    def finish(self, stopped_by: int | None) -> int:
        """Save what is not saved yet and say how to go on; the exit code."""
        if self.saved_at != self._moment() and self.state.position > 0:
            self.save()
        self.console.close()
        if self.curves and self.state.position > 0:
            self.curves.draw(last=True)
        return self._farewell(stopped_by)

    def close(self) -> None:
        """End the records, however the run ended."""
        self.console.close()
        if self.metrics:
            self.metrics.close()
        if self.wandb:
            self.wandb.summary({"best_checkpoint": str(self.directory / "best")})
            self.wandb.finish()

    def _farewell(self, stopped_by: int | None) -> int:
        """The last lines; the exit code."""
        say, row = self.console.say, self.console.row
        state, chosen = self.state, self.config.trainer.checkpoint
        if stopped_by is not None and state.position == 0:
            say("stopped before the first step; there is nothing to go on from")
            return 128 + stopped_by
        if stopped_by is not None:
            say(
                f"stopped after step {state.global_step:,} of {self.total_steps:,}; go on with\n"
                f"  {_command(resume=True)}"
            )
            return 128 + stopped_by
        for label, answer in zip(["answers", *[""] * SAMPLE_ANSWERS], self.answers):
            texts = [visible(answer[name]) for name in ("question", "generated", "reference")]
            row(label, "{} -> {} (expected {})".format(*texts))
        skipped = f", {state.bad_steps:,} skipped" if state.bad_steps else ""
        took = duration(state.seconds)
        row("done", f"{state.global_step:,} steps{skipped}, {state.tokens:,} tokens, {took}")
        if state.best_value is not None:
            where = self.directory / "best"
            score = f"{chosen.log_obg} {state.best_value:.4f} after step {state.best_step:,}"
            row("best", f"{score}: {where}")
        if self.curves and not self.curves.failed:
            row("curves", str(self.directory / CURVES))
        say(f"test it   {self._test_command()}")  # never folded: it is to be copied
        return 0

    def _test_command(self) -> str:
        """How to test the best model, with the test.yaml beside the configuration's file."""
        data = self.config.data
        beside = [Path(w).with_name("test.yaml") for w in sys.argv if w.endswith((".yaml", ".yml"))]
        file = next((path for path in beside if path.exists()), Path("configs/test.yaml"))
        settings = {
            "data.data_dir": data.data_dir,
            "test_params.test_model_path": str(self.directory),
            "test_params.log_file": str(self.directory / "test.jsonl"),
        }
        settings["data.split"] = next(s for s in ("test", "val", "train") if self.source.has(s))
        for name in ("question_key", "answer_key"):
            settings[f"data.{name}"] = getattr(data, name)
        try:
            there = checkpoint.flatten(resolved(load(TestConfig, file)))
        except UserError:
            there = {}
        overrides = [f"{name}={v}" for name, v in settings.items() if there.get(name) != v]
        return shlex.join(["python", "sft.py", "test", str(file), *overrides])


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _command(resume: bool = False) -> str:
    """The command line of this process, without secrets."""
    words = [w for w in sys.argv if not w.startswith(("wandb=", "wandb.api="))]
    if resume:
        words = [w for w in words if not w.startswith("trainer.ckpt_path=")]
        words.append("trainer.ckpt_path=last")
    launcher = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        launcher = ["torchrun", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]]
        if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
            launcher += ["--nnodes", os.environ["GROUP_WORLD_SIZE"], "..."]
    return shlex.join([*launcher, *words])


def _refuse_router_loss(name: str, config: Any) -> None:
    """Raise a UserError if the configuration asks for a loss beside that of the answers.

    transformers adds the experts' load-balancing loss as a product of means over all tokens of a
    batch, padding and prompts included. No sum over micro-batches gives it, so with it a step's
    gradient would depend on how the step is split.
    """
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise UserError(
            f"model_name: {name}: output_router_logits is true in its config.json, which asks for "
            "a load-balancing loss of the experts; it is not added here, because it depends on how "
            "a step is split into batches. Set it to false, in a copy of the model, to train on "
            "the answers alone"
        )


def _git_commit() -> str | None:
    try:
        where = Path(__file__).parent
        # The full hash, with -dirty behind it if files have changed since.
        words = "describe --always --dirty --abbrev=40 --exclude=*"
        command = ["git", "-C", str(where), *words.split()]
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return result.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
