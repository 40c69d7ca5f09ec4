"""The log of a `test`: one JSON object a line, which survives a kill."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkpoint
from config import TestConfig, UserError, resolved

if TYPE_CHECKING:
    from extras.formats import DataSource
    from model import Opened


_MODEL_FILES = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")


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


def identity(
    config: TestConfig, opened: Opened, source: DataSource, template: str
) -> dict[str, Any]:
    """Everything that decides what the log will hold, by names for messages."""
    place = opened.place
    digest = hashlib.sha256(str(place).encode() if isinstance(place, str) else b"")
    if isinstance(place, Path):
        for file in sorted(place.glob("*")):
            if file.suffix in (".safetensors", ".bin") or file.name in _MODEL_FILES:
                digest.update(f"{file.name} {checkpoint.sha256_of(file)}".encode())
    if opened.adapter:
        digest.update(opened.fingerprint.encode())
    values: dict[str, Any] = {
        "model": digest.hexdigest()[:16],
        "data": source.fingerprint[:16],
        "template": template,
        "seed": config.seed,
        "do_compute_metrics": config.test_params.do_compute_metrics,
        "from_scratch": config.test_params.from_scratch,
        "save_steps": config.test_params.save_steps,
    }
    data = resolved(config)["data"]
    for name in ("split", "max_prompt_length", "truncate_promt"):
        values[f"data.{name}"] = data[name]
    for name, value in config.generate_params.model_dump().items():
        values[f"generate_params.{name}"] = value
    return values
