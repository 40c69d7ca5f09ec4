"""What a run tells on the terminal, and metrics.jsonl, which is the source of truth of all else."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

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


def duration(seconds: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 03 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
