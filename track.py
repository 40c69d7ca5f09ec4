"""What a run tells: console lines, progress bar, metrics.jsonl, curves.png, W&B.

`metrics.jsonl` in the run's directory is the source of truth: the curves are drawn from it, and
W&B gets the same values.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import UserError, Wandb

METRICS = "metrics.jsonl"
CURVES = "curves.png"
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

    def sample(self, prompt: str, target: str) -> None:
        """A sample on one line, with what is trained on in colour, or in [[ ]] off a terminal."""
        before, after = ("\033[1;32m", "\033[0m") if self.colour else ("[[", "]]")
        self.say(f"{'sample':<{LABEL}}{visible(prompt)}{before}{visible(target)}{after}")

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


class Curves:
    """Keeps a run's curves.png up to date; whatever goes wrong is a warning and the end of it.

    A drawing was measured to take 0.15 s (2 cores, 1,000 log points), the first one 0.5 s.
    """

    SHARE = 0.02  # of the time since the last drawing that a drawing may take

    def __init__(self, run: Path, console: Console) -> None:
        self.run, self.console = run, console
        self.cost, self.drawn_at = 0.5, time.monotonic()
        self.failed = False

    def draw(self, last: bool = False) -> None:
        """Draw, unless that would slow training down; the last drawing is always made."""
        began = time.monotonic()
        if self.failed or (not last and self.cost > self.SHARE * (began - self.drawn_at)):
            return
        try:
            plot([self.run])
        except Exception as error:  # of matplotlib, its fonts, the disk: no reason to stop
            self.failed = True
            self.console.warn(f"{CURVES} is not drawn: {type(error).__name__}: {_line(error)}")
        self.drawn_at = time.monotonic()
        self.cost = self.drawn_at - began


# Headings of curves.png, and the keys of metrics.jsonl that are drawn there.
PANELS = (
    ("loss (dotted: validation)", ("loss", "val_loss")),
    ("learning rate", ("lr",)),
    ("gradient norm", ("grad_norm",)),
    ("tokens per second", ("tokens_per_second",)),
)


def plot(runs: Sequence[Path], output: str | None = None) -> Path:
    """Draw the curves of runs over each other; returns the PNG's path.

    Args:
        output: default: curves.png in the run's directory, or, of several runs, in this one.

    Raises:
        UserError: a run without a metrics.jsonl.
    """
    logged = [_read(run) for run in runs]
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # remarks on its font cache
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), dpi=100, layout="constrained")
    panels = list(figure.subplots(2, 2).flat)
    first_lines = []  # one a run, for the legend
    for axes, (heading, names) in zip(panels, PANELS):
        for number, records in enumerate(logged):
            for name in names:
                points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
                style = "o:" if name == "val_loss" else "-" if len(points) > 1 else "o"
                xs, ys = [x for x, _ in points], [y for _, y in points]
                line = axes.plot(xs, ys, style, color=f"C{number}", linewidth=1.2, markersize=3)
                if name == "loss":
                    first_lines += line
        axes.set_title(heading, fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    if len(runs) > 1:
        # matplotlib leaves out what begins with an underscore.
        labels = [f"./{run}" if str(run).startswith("_") else str(run) for run in runs]
        legend = figure.legend(first_lines, labels, loc="outside upper center")
        for text in legend.get_texts():
            text.set_parse_math(False)  # a $ in a path is a dollar
    target = Path(output) if output else (runs[0] if len(runs) == 1 else Path()) / CURVES
    temporary = target.with_name(f".tmp-{target.name}")
    FigureCanvasAgg(figure).print_png(temporary)
    temporary.replace(target)
    return target


def _read(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; one that is only half written ends them."""
    path, records = run / METRICS, []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{path}: {reason}; `plot` takes the directories of runs") from None
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class WandbWriter:
    """Writes to W&B from a thread of its own: a slow or failing W&B never touches training."""

    # How long the end of a run waits for what is not sent yet, and how long W&B has to answer.
    FINISH_SECONDS, CONNECT_SECONDS = 60.0, 15.0

    def __init__(
        self,
        settings: Wandb,
        directory: Path,
        config: dict[str, Any],
        run_id: str,
        console: Console,
        job_type: str,
    ) -> None:
        self.console, self.project = console, settings.args.project_name
        self.queue: queue.Queue[tuple[str, Any] | None] = queue.Queue()
        self.connected = False
        key = settings.api or os.environ.get("WANDB_API_KEY")
        self.mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
        self.arguments = (settings, directory, config, run_id, job_type)
        self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self.thread.start()

    def log(self, values: dict[str, Any]) -> None:
        self.queue.put(("log", values))

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        self.queue.put(("table", (name, columns, rows, step)))

    def summary(self, values: dict[str, Any]) -> None:
        self.queue.put(("summary", values))

    def finish(self) -> None:
        self.queue.put(None)
        self.thread.join(self.CONNECT_SECONDS)
        if self.connected:
            self.thread.join(self.FINISH_SECONDS - self.CONNECT_SECONDS)
        if self.thread.is_alive():
            self.console.warn("W&B is not done and is left behind; metrics.jsonl has everything")

    def _work(self) -> None:
        try:
            run, wandb = self._start()
        except Exception as error:  # whatever W&B raises must not stop the training
            self.console.warn(f"W&B is off for this run: {type(error).__name__}: {_line(error)}")
            return
        self.connected = True
        while (item := self.queue.get()) is not None:
            kind, content = item
            try:
                if kind == "log":
                    run.log(content)
                elif kind == "table":
                    name, columns, rows, step = content
                    table = wandb.Table(columns=columns, data=rows)
                    run.log({name: table, "global_step": step})
                else:
                    run.summary.update(content)
            except Exception as error:
                self.console.warn(f"W&B: {type(error).__name__}: {_line(error)}")
        try:
            run.finish()
        except Exception as error:
            self.console.warn(f"W&B: {type(error).__name__}: {_line(error)}")

    def _start(self) -> tuple[Any, Any]:
        settings, directory, config, run_id, job_type = self.arguments
        os.environ.setdefault("WANDB_SILENT", "true")  # also what it says before it has settings
        import wandb

        logging.getLogger("wandb").setLevel(logging.ERROR)
        if settings.api:  # for this process only; wandb.login would write it to ~/.netrc
            os.environ["WANDB_API_KEY"] = settings.api
        run = wandb.init(
            project=settings.args.project_name,
            group=settings.args.group,
            job_type=settings.args.job_type or job_type,
            name=settings.args.name,
            id=run_id,
            resume="allow",
            dir=str(directory),
            config=config,
            mode=self.mode,  # type: ignore[arg-type]
            # Without W&B's own metadata: it holds the command line, which may hold the key.
            settings=wandb.Settings(
                silent=True,
                init_timeout=self.CONNECT_SECONDS,
                console="off",
                disable_git=True,
                save_code=False,
                x_disable_meta=True,
            ),
        )
        run.define_metric("global_step")
        for prefix in ("train/*", "val/*", "test/*"):
            run.define_metric(prefix, step_metric="global_step")
        return run, wandb


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else ""


def duration(seconds: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 03 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
