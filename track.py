"""What a run tells: console lines, progress bar, metrics.jsonl, W&B.

`metrics.jsonl` in the run's directory is the source of truth; W&B gets the same values.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

from config import Wandb

METRICS = "metrics.jsonl"


class Console:
    """Lines for people on stdout; a progress bar where there is a terminal.

    quiet: warnings only. silent: not even these, on all ranks but the first.
    """

    def __init__(self, quiet: bool = False, silent: bool = False) -> None:
        self.quiet, self.silent = quiet or silent, silent
        self.bar: Any = None

    def start_bar(self, total: int, done: int) -> None:
        if not self.quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

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

    def progress(self, steps: int, **values: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix(values, refresh=False)
            self.bar.update(steps - self.bar.n)

    def step_line(self, text: str) -> None:
        """A log point: the bar already shows it, so only without one."""
        if self.bar is None:
            self.say(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


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


class WandbWriter:
    """Writes to W&B from a thread of its own: a slow or failing W&B never touches training."""

    FINISH_SECONDS = 60.0

    def __init__(
        self,
        settings: Wandb,
        directory: Path,
        config: dict[str, Any],
        run_id: str,
        console: Console,
        job_type: str,
    ) -> None:
        self.console = console
        self.queue: queue.Queue[tuple[str, Any] | None] = queue.Queue()
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
        self.thread.join(self.FINISH_SECONDS)
        if self.thread.is_alive():
            self.console.warn(
                f"W&B did not finish within {self.FINISH_SECONDS:.0f} s and is left behind; "
                "metrics.jsonl has everything"
            )

    def _work(self) -> None:
        try:
            run, wandb = self._start()
        except Exception as error:  # whatever W&B raises must not stop the training
            self.console.warn(f"W&B is off for this run: {type(error).__name__}: {_line(error)}")
            return
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
        import wandb

        logging.getLogger("wandb").setLevel(logging.ERROR)
        key = settings.api or os.environ.get("WANDB_API_KEY")
        mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
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
            mode=mode,  # type: ignore[arg-type]
            # Without W&B's own metadata: it holds the command line, which may hold the key.
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True
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
