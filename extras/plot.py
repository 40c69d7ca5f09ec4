"""Curves of runs, drawn from their metrics.jsonl."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint import write_file
from config import UserError, first_line
from extras.console import CURVES, METRICS, Console


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
            self.console.warn(f"{CURVES} is not drawn: {type(error).__name__}: {first_line(error)}")
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
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_file(target, image.getvalue())
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
