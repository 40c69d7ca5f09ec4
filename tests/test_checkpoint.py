"""Checkpoints: damage is recognised by name, saving is atomic, rotation deletes only its own."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
from checkpoint import Damaged
from config import UserError
from conftest import Runner, metrics_of, newest, process


@pytest.fixture
def finished(run: Runner) -> Path:
    """The directory of a run of 12 steps with checkpoints at 10 and 12."""
    return run(trainer__checkpoint__every_n_train_steps=5)


def flip_a_byte(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "model.safetensors").write_bytes(content)


def truncate(path: Path) -> None:
    file = path / "trainer_state.pt"
    file.write_bytes(file.read_bytes()[:-7])


def remove(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


DAMAGES = [
    (flip_a_byte, "the contents of model.safetensors have changed"),
    (truncate, "trainer_state.pt has"),
    (remove, "tokenizer.json is missing"),
    (empty, "no manifest.json"),
]


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_damage_is_refused_by_name_and_last_falls_back(
    damage: Any, message: str, finished: Path, run: Runner, capsys: Any
) -> None:
    last = finished / "step-000012"
    damage(last)
    run.resume(finished, f"trainer.ckpt_path={last}", code=2)
    error = capsys.readouterr().err
    assert str(last) in error and message in error
    run.resume(finished)
    error = capsys.readouterr().err
    assert "passed over" in error and message in error
    checkpoint.verify(last)  # made anew from step 10


def test_nothing_intact_is_an_error_that_lists_all(
    finished: Path, run: Runner, capsys: Any
) -> None:
    for path in checkpoint.steps(finished):
        flip_a_byte(path)
    run.resume(finished, code=2)
    error = capsys.readouterr().err
    assert "no intact checkpoint" in error
    assert error.count("have changed (SHA-256)") == 2


def test_last_without_any_checkpoint_is_an_error(run: Runner, capsys: Any) -> None:
    run("trainer.ckpt_path=last", code=2)
    assert "found no step-* directory" in capsys.readouterr().err


def test_rotation_spares_what_it_must(finished: Path) -> None:
    original = newest(finished)
    for number in (1, 2, 3, 4):
        shutil.copytree(original, finished / f"step-{number:06d}")
    (finished / "step-000003" / "manifest.json").unlink()  # damaged: left for a person to look at
    (finished / "step-notes").mkdir()
    mine = finished / "step-000000"
    mine.mkdir()
    (mine / "letter.txt").write_text("not ours")
    checkpoint.rotate(finished, keep=2, protect={finished / "step-000001"})
    names = {p.name for p in finished.iterdir() if p.is_dir()}
    kept = {"step-000012", "step-000010", "step-000001", "step-000003", "step-000000"}
    assert names == kept | {"best", "step-notes"}


def test_the_checkpoint_just_written_survives_a_damaged_newer_one(
    finished: Path, run: Runner
) -> None:
    """A flipped byte leaves the sizes right, so rotation takes step 12 for good."""
    flip_a_byte(finished / "step-000012")
    run.resume(finished, "trainer.checkpoint.save_top_k=1", "trainer.params.max_steps=11")
    checkpoint.verify(finished / "step-000011")


def test_the_checkpoint_resumed_from_survives_its_run(finished: Path, run: Runner) -> None:
    more = ["trainer.params.max_epochs=9", "trainer.checkpoint.every_n_train_steps=2"]
    run.resume(finished, *more)
    names = sorted(p.name for p in finished.glob("step-*"))
    assert names == ["step-000012", "step-000052", "step-000054"]


def test_leftovers_of_a_killed_save_are_removed_and_only_these(tmp_path: Path) -> None:
    for name in (".tmp-step-000007", ".tmp-best", ".old-best", ".tmp-mine", ".hidden", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".old-step-000009").mkdir()
    with checkpoint.locked(tmp_path):
        names = {p.name for p in tmp_path.iterdir()} - {".lock"}
    # step-000009 was between the two renames of its replacement: the old one is back.
    assert names == {".tmp-mine", ".hidden", "best", "step-000009"}
    assert (tmp_path / "best" / "file").read_text() == "best"


def test_a_failed_write_leaves_the_old_directory(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "best", lambda d: (d / "model").write_text("old"))

    def fails(directory: Path) -> None:
        (directory / "model").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(tmp_path, "best", fails)
    assert (tmp_path / "best" / "model").read_text() == "old"
    checkpoint.verify(tmp_path / "best")
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_a_full_disk_is_a_clear_error_and_harms_nothing(finished: Path) -> None:
    """A real process whose files may not grow beyond what half a checkpoint needs."""

    def written() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in finished.glob("step-*/*")}

    before = written()
    limit = (newest(finished) / "trainer_state.pt").stat().st_size // 2

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = ["train", f"{finished}.yaml", "trainer.ckpt_path=last", "trainer.params.max_epochs=3"]
    result = process(*command, preexec_fn=small_files)
    assert result.returncode == 2, result.stderr
    assert "could not be written" in result.stderr and "step-000012" in result.stderr
    assert "Traceback" not in result.stderr
    assert written() == before
    assert process(*command).returncode == 0
    assert not [p for p in finished.iterdir() if p.name.startswith((".tmp", ".old"))]


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_a_pickle_that_would_run_code_is_refused(
    finished: Path, run: Runner, tmp_path: Path, capsys: Any
) -> None:
    path, target = newest(finished), tmp_path / "hacked"
    for write in (
        lambda f: torch.save({"state": Malicious(target)}, f),
        lambda f: f.write_bytes(pickle.dumps(Malicious(target))),
    ):
        state = path / "trainer_state.pt"
        write(state)
        manifest = json.loads((path / "manifest.json").read_text())
        entry = [state.stat().st_size, checkpoint.sha256_of(state)]
        manifest["files"]["trainer_state.pt"] = entry
        (path / "manifest.json").write_text(json.dumps(manifest))
        run.resume(finished, f"trainer.ckpt_path={path}", "trainer.params.max_epochs=3", code=2)
        assert "refused" in capsys.readouterr().err
        assert not target.exists()


def test_paths_in_a_checkpoint_are_relative(finished: Path) -> None:
    manifest = json.loads((newest(finished) / "manifest.json").read_text())
    assert all(not Path(name).is_absolute() for name in manifest["files"])


def test_a_model_without_state_cannot_be_resumed(finished: Path, run: Runner, capsys: Any) -> None:
    run.resume(finished, f"trainer.ckpt_path={finished / 'best'}", code=2)
    assert "without trainer_state.pt" in capsys.readouterr().err


def test_a_foreign_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-000001"
    path.mkdir()
    (path / "manifest.json").write_text('{"format": "other-9", "files": {}}')
    with pytest.raises(Damaged, match="found format 'other-9'"):
        checkpoint.verify(path)


def test_metrics_end_where_the_checkpoint_did(finished: Path, run: Runner) -> None:
    """Lines that a killed run wrote after its last checkpoint are not there twice."""
    lines = metrics_of(finished)
    with (finished / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 13, "loss": 1.0}\n{"step": 1')
    run.resume(finished)
    assert metrics_of(finished) == lines
