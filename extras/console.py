"""What a run tells: lines on the terminal, metrics.jsonl, run.json, W&B and curves.

Training tells all of it to one `ConsoleRecorder`. On ranks that do not speak, a silent `Recorder`
stands in its place, so nobody asks who is there.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import textwrap
import uuid
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import checkpoint
from config import TestConfig, UserError, load, resolved, to_yaml
from extras.same_run import flatten

if TYPE_CHECKING:
    from checkpoint import State, Step
    from sft import Run

PACKAGES = (
    "torch transformers tokenizers safetensors numpy pydantic pyyaml nltk rouge-score wandb tqdm "
    "matplotlib jinja2"
).split()
SAMPLE_ANSWERS = 3  # of the last validation that generates, shown at the end
SHOWN_METRICS = {  # on the line of a validation; the one that selects `best` is always there
    "val_loss": "val loss",
    "val_exact_match": "EM",
    "val_token_f1": "F1",
    "val_rougeL": "ROUGE-L",
}
CURVES = "curves.png"
METRICS = "metrics.jsonl"
LABEL = 10  # columns of the word that a line of the start begins with


class Console:
    """Lines for people on stdout; a progress bar where there is a terminal.

    quiet: warnings only. silent: not even these, on all ranks but the first.
    """

    def __init__(self, quiet: bool = False, silent: bool = False) -> None:
        self.quiet, self.silent = quiet or silent, silent
        self.bar: Any = None
        self.terminal = sys.stdout.isatty()
        self.colour = self.terminal and "NO_COLOR" not in os.environ

    def start_bar(self, total: int, done: int) -> None:
        if not self.quiet and sys.stderr.isatty():
            from tqdm import tqdm

            form = "{n_fmt}/{total_fmt} |{bar}| {desc}{remaining} left"
            self.bar = tqdm(
                total=total, initial=done, bar_format=form, dynamic_ncols=True, leave=False
            )

    def row(self, label: str, text: str) -> None:
        """A labelled line, on a terminal folded to its width under the text's beginning."""
        if self.terminal:
            width = max(40, shutil.get_terminal_size().columns) - LABEL
            lines = textwrap.wrap(
                text, width, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
            )
            text = f"\n{'':{LABEL}}".join(lines)
        self.say(f"{label:<{LABEL}}{text}")

    def sample(self, parts: list[tuple[str, bool]]) -> None:
        """A sample on one line, with what is trained on in colour, or in [[ ]] off a terminal."""
        before, after = ("\033[1;32m", "\033[0m") if self.colour else ("[[", "]]")
        shown = [f"{before}{visible(t)}{after}" if trained else visible(t) for t, trained in parts]
        self.say(f"{'sample':<{LABEL}}{''.join(shown)}")

    def say(self, text: str = "") -> None:
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Warnings are shown even when quiet, on stderr."""
        if self.silent:
            return
        if self.bar is not None:
            self.bar.write(f"warning: {text}", file=sys.stderr)
        else:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def progress(self, steps: int, values: str) -> None:
        if self.bar is not None:
            self.bar.set_description_str(f"{values}  ", refresh=False)
            self.bar.update(steps - self.bar.n)

    def step_line(self, text: str) -> None:
        """A log point: the bar already shows it, so only without one."""
        if self.bar is None:
            self.say(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def visible(text: str, keep: str = "") -> str:
    """The text with what is not printable written out, line ends and escape sequences too."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


class Metrics:
    """Appends one JSON object a log point to metrics.jsonl.

    `size` is the file's length in bytes; a checkpoint stores it, and resuming cuts the file back
    to it, so that what a killed run logged after its last checkpoint is not there twice.
    """

    def __init__(self, run: Path, size: int = 0) -> None:
        self.path = run / METRICS
        self.handle = self.path.open("ab")
        if size <= self.handle.tell():
            self.handle.truncate(size)

    def write(self, values: dict[str, Any]) -> None:
        # JSON has no NaN: a number that is none is written as null.
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        self.handle.write(json.dumps(clean).encode() + b"\n")
        self.handle.flush()

    def sync(self) -> int:
        """Make sure that everything is on the disk; returns the size."""
        self.handle.flush()
        os.fsync(self.handle.fileno())
        return self.handle.seek(0, os.SEEK_END)

    def close(self) -> None:
        if not self.handle.closed:
            self.sync()
            self.handle.close()


def duration(seconds: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 03 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


# ------------------------------------------------------------------------------------ recorders


class Recorder:
    """Takes everything that a run tells, and tells nobody."""

    def start(self, run: Run, state: State, metrics_size: int) -> None:
        """What will run, before it runs. metrics_size: see `Metrics`; 0 for a new run."""

    def say(self, text: str) -> None:
        """A line for people."""

    def warn(self, text: str) -> None:
        """A line that is shown even when quiet."""

    def step(self, state: State, step: Step) -> None:
        """A step was tried."""

    def skipped(self, state: State, what: str, rows: str) -> None:
        """It changed nothing: its `what` was not a finite number. rows: of its samples."""

    def log(self, state: State, step: Step) -> None:
        """A log point: what came since the last one, with the newest step's rate and norm."""

    def validation(
        self, state: State, values: dict[str, float], records: list[dict[str, Any]], seconds: float
    ) -> None:
        """The metrics of a validation, and the answers that it generated."""

    def sync(self) -> int:
        """Make sure that all is on the disk; the size of metrics.jsonl, for a checkpoint."""
        return 0

    def saved(self, path: Path, seconds: float) -> None:
        """A checkpoint is written."""

    def finish(self, state: State, stopped_by: int) -> None:
        """The last lines; stopped_by: the number of a signal, or 0."""

    def close(self) -> None:
        """End the records, however the run ended."""


class ConsoleRecorder(Recorder):
    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet)
        self.answers: list[dict[str, Any]] = []
        self.metrics: Metrics | None = None
        self.wandb: Any = None

    def say(self, text: str) -> None:
        self.console.say(text)

    def warn(self, text: str) -> None:
        self.console.warn(text)

    def start(self, run: Run, state: State, metrics_size: int) -> None:
        from extras.plot import Curves

        self.run, directory, config = run, run.directory, run.config
        state.wandb_id = state.wandb_id or uuid.uuid4().hex[:8]
        metrics = directory / METRICS
        if metrics.exists() and not metrics_size:
            metrics.replace(metrics.with_suffix(".old.jsonl"))
        self.metrics = Metrics(directory, metrics_size)
        (directory / checkpoint.CONFIG).write_text(to_yaml(config), encoding="utf-8")
        record = _origin(run)
        (directory / "run.json").write_text(json.dumps(record, indent=1))
        self.curves = Curves(directory, self.console)
        announce(run, state, self.console)
        if config.wandb is not None:
            from extras.wandb_log import WandbWriter

            settings = resolved(config) | {"run": record}
            self.wandb = WandbWriter(
                config.wandb, directory, settings, state.wandb_id, self.console, "train"
            )
            self.console.row("W&B", f"{self.wandb.mode}, project {self.wandb.project}")
        self.console.start_bar(run.plan.total_steps, state.global_step)

    def step(self, state: State, step: Step) -> None:
        mean = step.loss / step.targets
        speed = state.tokens / max(1e-9, state.seconds)
        shown = f"loss {mean:.4f}  lr {step.lr:.2e}  {speed:,.0f} tokens/s"
        self.console.progress(state.global_step, shown)

    def skipped(self, state: State, what: str, rows: str) -> None:
        self.warn(
            f"step {state.global_step + 1} skipped: its {what} is not a finite number "
            f"({rows} of train; {state.bad_in_row} in a row)"
        )
        values = {name: getattr(state, name) for name in ("bad_steps", "position")}
        self._record({"step": state.global_step, **values}, None)

    def log(self, state: State, step: Step) -> None:
        plan = self.run.plan
        loss = state.window_loss / state.window_targets
        speed = state.window_tokens / max(1e-9, state.window_seconds)
        values = {
            "step": state.global_step,
            "epoch": round(state.position / plan.steps_per_epoch, 4),
            "loss": loss,
            "lr": step.lr,
            "grad_norm": step.grad_norm,
            "tokens": state.tokens,
            "bad_steps": state.bad_steps,
            "overflows": state.overflows,
            "tokens_per_second": round(speed, 1),
            "seconds": round(state.seconds, 3),
            "memory": self.run.device.peak_memory(),
        }
        self._record(values, "train/")
        left = (plan.total_steps - state.global_step) * state.seconds / max(1, state.global_step)
        self.console.step_line(
            f"step {state.global_step:,}/{plan.total_steps:,}  loss {loss:.4f}  lr {step.lr:.2e}  "
            f"norm {step.grad_norm:.2f}  {speed:,.0f} tokens/s  {duration(left)} left"
        )

    def validation(
        self, state: State, values: dict[str, float], records: list[dict[str, Any]], seconds: float
    ) -> None:
        epoch = round(state.position / self.run.plan.steps_per_epoch, 4)
        self._record({"step": state.global_step, "epoch": epoch, **values}, "val/")
        if self.wandb and records:
            columns = ["question", "reference", "generated", "exact_match"]
            rows = [[record[c] for c in columns] for record in records]
            self.wandb.table("val/answers", columns, rows, state.global_step)
        self.answers = records[:SAMPLE_ANSWERS]
        names = dict.fromkeys([*SHOWN_METRICS, self.run.config.trainer.checkpoint.log_obj])
        shown = "  ".join(
            f"{SHOWN_METRICS.get(name, name)} {values[name]:.4f}"
            for name in names
            if name in values
        )
        mark = "  best" if state.best_step == state.global_step else ""
        self.say(f"step {state.global_step:,}  {shown}  {duration(seconds)}{mark}")
        if not self.run.plan.finished(state):  # the end draws anyway
            self.curves.draw()

    def _record(self, values: dict[str, Any], prefix: str | None) -> None:
        """One line of metrics.jsonl, and the same to W&B if it has a `prefix` there."""
        assert self.metrics is not None
        self.metrics.write(values)
        if self.wandb and prefix:
            kept = {f"{prefix}{k.removeprefix('val_')}": v for k, v in values.items()}
            del kept[f"{prefix}step"]
            self.wandb.log(kept | {"global_step": values["step"]})

    def sync(self) -> int:
        return self.metrics.sync() if self.metrics else 0

    def saved(self, path: Path, seconds: float) -> None:
        self.say(f"saved {path} in {duration(seconds)}")

    def finish(self, state: State, stopped_by: int) -> None:
        self.console.close()
        if state.position > 0:
            self.curves.draw(last=True)
        say, row, run = self.console.say, self.console.row, self.run
        if stopped_by and state.position == 0:
            say("stopped before the first step; there is nothing to go on from")
            return
        if stopped_by:
            say(
                f"stopped after step {state.global_step:,} of {run.plan.total_steps:,}; "
                f"go on with\n  {_command(resume=True)}"
            )
            return
        for label, answer in zip(["answers", *[""] * SAMPLE_ANSWERS], self.answers):
            texts = [visible(answer[name]) for name in ("question", "generated", "reference")]
            row(label, "{} -> {} (expected {})".format(*texts))
        skipped = f", {state.bad_steps:,} skipped" if state.bad_steps else ""
        took = duration(state.seconds)
        row("done", f"{state.global_step:,} steps{skipped}, {state.tokens:,} tokens, {took}")
        if state.best_value is not None:
            name = run.config.trainer.checkpoint.log_obj
            score = f"{name} {state.best_value:.4f} after step {state.best_step:,}"
            row("best", f"{score}: {run.directory / 'best'}")
        if not self.curves.failed:
            row("curves", str(run.directory / CURVES))
        say(f"test it   {_test_command(run)}")  # on one line, so that it can be copied

    def close(self) -> None:
        self.console.close()
        if self.metrics:
            self.metrics.close()
        if self.wandb:
            self.wandb.summary({"best_checkpoint": str(self.run.directory / "best")})
            self.wandb.finish()


def announce(run: Run, state: State, console: Console) -> None:
    """What will run, before it runs."""
    row, config, plan, splits = console.row, run.config, run.plan, run.splits
    data, params = config.data, config.trainer.params
    total, trained = sum(k[1] for k in run.kinds), sum(k[2] for k in run.kinds)
    row("model", f"{config.model_name}, {total:,} parameters, {trained / total:.1%} trained")
    row("", ", ".join(f"{kind} {t / n:.0%} of {n:,}" for kind, n, t in run.kinds))
    for remark in run.remarks:
        row("", remark)
    held = " (held out of train)" if splits.val_name == "train" else ""
    if params.overfit_batches:
        held = " (the same: overfit_batches)"
    sizes = f"{len(splits.train):,} samples to train, {len(splits.val):,} to validate"
    row("data", f"{data.data_dir}: {sizes}{held}")
    row("", f"train: {splits.whole.counts.describe()}")
    if splits.val_name == "val":
        row("", f"val: {splits.val.counts.describe()}")
    twice, shared = (splits.overlap[name] for name in ("duplicates", "train_test_overlap"))
    if twice or shared:
        console.warn(
            f"{data.data_dir}: {twice} pairs of train are duplicates, {shared} questions of test "
            "are in train"
        )
    show_sample(run, console, 0, longest=200)
    ranks, batches = run.device.ranks.world_size * run.device.shards, params.accumulate_grad_batches
    row(
        "step",
        f"{_count(data.batch_size, 'sample')} x {_count(batches, 'batch', 'batches')} "
        f"x {_count(ranks, 'rank')} = {_count(plan.samples_per_step, 'sample')}",
    )
    row(
        "plan",
        f"{_count(plan.steps_per_epoch, 'step')} an epoch, {plan.total_steps:,} in all, "
        f"{plan.warmup:,} of them warm-up",
    )
    row("device", f"{run.device.describe()}, precision {params.precision}")
    slow = run.device.slow_precision()
    if slow:
        console.warn(slow)
    every = config.trainer.checkpoint.every_n_train_steps
    row(
        "output",
        f"{run.directory}: a checkpoint every {_count(every, 'step')}, "
        f"{METRICS}, {CURVES}, {checkpoint.CONFIG} (every value)",
    )
    if run.resumed_from:
        row("resume", f"{run.resumed_from}, after step {state.global_step:,}")
    else:
        row("resume", "the same command with trainer.ckpt_path=last goes on after a stop")


def show_sample(run: Run, console: Console, i: int, longest: int | None = None) -> None:
    """Print training sample i; of a part of more than `longest` characters its two ends."""
    ids, mask = run.splits.train.sample(i)
    parts = []
    for part in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask)) + 1):
        text = run.opened.tokenizer.decode(ids[part])
        if longest and len(text) > longest:
            text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
        parts.append((text, bool(mask[part[0]])))
    console.sample(parts)


def _origin(run: Run) -> dict[str, Any]:
    """What a run was made with, for run.json."""
    splits = run.splits
    cut = {"train": asdict(splits.whole.counts)}
    if splits.val_name == "val":
        cut["val"] = asdict(splits.val.counts)
    return {
        "command": _command(),
        "resumed_from": str(run.resumed_from) if run.resumed_from else None,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": run.device.describe(),
        "ranks": run.device.ranks.world_size,
        "precision": run.config.trainer.params.precision,
        "data_sha256": run.identity["data"],
        "samples": {"train": len(splits.train), "val": len(splits.val)},
        "truncation": cut,
        **splits.overlap,
    }


def _test_command(run: Run) -> str:
    """How to test the best model, with the test.yaml beside the configuration's file."""
    data = run.config.data
    beside = [Path(w).with_name("test.yaml") for w in sys.argv if w.endswith((".yaml", ".yml"))]
    file = next((path for path in beside if path.exists()), Path("configs/test.yaml"))
    settings = {
        "data.data_dir": data.data_dir,
        "test_params.test_model_path": str(run.directory),
        "test_params.log_file": str(run.directory / "test.jsonl"),
    }
    settings["data.split"] = next(s for s in ("test", "val", "train") if run.source.has(s))
    for name in ("question_key", "answer_key"):
        settings[f"data.{name}"] = getattr(data, name)
    try:
        there = flatten(resolved(load(TestConfig, file)))
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


def _git_commit() -> str | None:
    try:
        where = Path(__file__).parent.parent
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
