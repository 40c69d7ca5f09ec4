"""Weights & Biases, which gets the values of metrics.jsonl."""

from __future__ import annotations

import logging
import os
import queue
import threading
from pathlib import Path
from typing import Any

from config import Wandb, first_line
from extras.console import Console


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
            self.console.warn(
                f"W&B is off for this run: {type(error).__name__}: {first_line(error)}"
            )
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
                self.console.warn(f"W&B: {type(error).__name__}: {first_line(error)}")
        try:
            run.finish()
        except Exception as error:
            self.console.warn(f"W&B: {type(error).__name__}: {first_line(error)}")

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
