"""Checkpoints that survive anything: written aside, verified, renamed, rotated.

    runs/facts/step-000300/   resumable: Hugging Face model + trainer_state.pt
    runs/facts/best/          the best model so far, Hugging Face format, nothing else needed

A checkpoint comes into being by one rename of a finished, fsynced directory that holds a manifest
of its files' sizes and SHA-256. Whatever happens before leaves a `.tmp-` directory that the next
start removes; whatever damages it later is seen by comparing with the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from config import TrainConfig, UserError, resolved, walk

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
STATE = "trainer_state.pt"
DETAILS = "sft.json"
CONFIG = "trainer.yaml"
FORMAT = "sft-checkpoint-1"
TEMPORARY, REPLACED = ".tmp-", ".old-"
STEP_NAME = re.compile(r"step-(\d{6,})")


class Damaged(UserError):
    """A checkpoint that is not what was written; the message names the file and the damage."""


def step_name(global_step: int) -> str:
    return f"step-{global_step:06d}"


def steps(directory: Path) -> list[Path]:
    """The step directories of a run, newest first, intact or not."""
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if STEP_NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=number, reverse=True)


def number(path: Path) -> int:
    """The global step in a step directory's name; -1 for another name."""
    match = STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


# ------------------------------------------------------------------------------------- writing


def sha256_of(file: Path) -> str:
    """Of a file's contents, in hexadecimal; read piece by piece."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically: whatever happens, the old one is there or the new one, no half.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        temporary.write_bytes(content)
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(run: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Create run/name from the files that `write` puts into an empty directory, atomically.

    An older run/name stays in place until the new one is complete on the disk.

    Raises:
        UserError: the disk is full or not writable; nothing that was there before has changed.
    """
    temporary, target, replaced = run / f"{TEMPORARY}{name}", run / name, run / f"{REPLACED}{name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        _write_manifest(temporary)
        if target.exists():
            # Between the two renames there is no run/name; `clean_up` then takes the old one.
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        temporary.rename(target)
        _sync(run)
        shutil.rmtree(replaced, ignore_errors=True)
    except KeyboardInterrupt:
        raise
    except Exception as error:  # OSError, or what safetensors and torch.save make of one
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        if not _is_disk_error(error):
            raise
        intact = ", ".join(p.name for p in steps(run)) or "none"
        raise UserError(
            f"{target}: the checkpoint could not be written: {error}\n"
            f"  checkpoints there are as before: {intact}\n"
            "  make room or choose another trainer.checkpoint.dirpath, then resume with "
            "trainer.ckpt_path=last"
        ) from None
    return target


def _is_disk_error(error: Exception) -> bool:
    # safetensors (Rust) and PyTorch's zip writer wrap the operating system's error in their own.
    return isinstance(error, OSError) or bool(
        re.search(r"I/O ?error|os error|failed writing|No space|unexpected pos", str(error), re.I)
    )


def _write_manifest(directory: Path) -> None:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    entries = {}
    for file in files:
        entries[file.relative_to(directory).as_posix()] = [file.stat().st_size, sha256_of(file)]
        _sync(file)
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": entries}, indent=1))
    _sync(manifest)
    _sync(directory)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(run: Path) -> IO[str]:
    """Hold a run's directory until the process ends; the kernel lets go however it ends.

    Raises:
        UserError: another process trains there.
    """
    handle = (run / ".lock").open("w")
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run}: another process is training in this directory") from None
        except OSError:
            pass  # a file system without locks
    return handle


def clean_up(run: Path) -> None:
    """Remove what an interrupted save left behind, and finish an interrupted replacement."""
    if not run.is_dir():
        return
    for leftover in run.iterdir():
        prefix = next((p for p in (TEMPORARY, REPLACED) if leftover.name.startswith(p)), None)
        name = leftover.name.removeprefix(prefix or "")
        if prefix is None or not (STEP_NAME.fullmatch(name) or name == "best"):
            continue
        if prefix == REPLACED and not (run / name).exists():
            leftover.rename(run / name)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def rotate(run: Path, keep: int, protect: set[Path]) -> None:
    """Delete all but the newest `keep` checkpoints, never one of `protect`, never one not ours."""
    ours = [p for p in steps(run) if _looks_intact(p)]
    safe = {path.resolve() for path in protect}
    for old in ours[keep:]:
        if old.resolve() not in safe:
            # Renamed first: a deletion that is cut short must not leave half a checkpoint.
            doomed = old.rename(old.with_name(f"{TEMPORARY}{old.name}"))
            shutil.rmtree(doomed, ignore_errors=True)


def _looks_intact(path: Path) -> bool:
    """Manifest and sizes only: cheap, for choosing what may go."""
    try:
        _check(path, hashes=False)
    except Damaged:
        return False
    return True


# ------------------------------------------------------------------------------------- reading


def verify(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        Damaged: names the first file that is missing, shorter, longer or changed.
    """
    _check(path, hashes=True)


def verify_ours(directory: Path) -> None:
    """`verify` a model directory that has a manifest; others have nothing to be held against."""
    if (directory / MANIFEST).exists():
        verify(directory)


def _check(path: Path, hashes: bool) -> None:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = dict(manifest["files"])
        known = manifest["format"] == FORMAT
    except FileNotFoundError:
        raise Damaged(f"{path}: damaged: no {MANIFEST}, so it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise Damaged(f"{path}: damaged: {MANIFEST} cannot be read") from None
    if not known:
        raise Damaged(f"{path}: found format {manifest['format']!r}; allowed: {FORMAT!r}")
    for name, (size, sha256) in files.items():
        file = path / name
        if not file.is_file():
            raise Damaged(f"{path}: damaged: {name} is missing")
        found = file.stat().st_size
        if found != size:
            raise Damaged(f"{path}: damaged: {name} has {found:,} bytes instead of {size:,}")
        if hashes and sha256_of(file) != sha256:
            raise Damaged(f"{path}: damaged: the contents of {name} have changed (SHA-256)")


def find(ckpt_path: str, run: Path) -> tuple[Path, list[str]]:
    """The checkpoint that `trainer.ckpt_path` means, verified, and remarks on ones passed over.

    `last` is the newest intact step directory of `run`; a directory that holds step directories
    stands for its newest intact one.

    Raises:
        UserError: there is none. Damaged: the one that was named is not intact.
    """
    path = run if ckpt_path == "last" else Path(ckpt_path)
    if (path / STATE).exists() or (path / MANIFEST).exists() or STEP_NAME.fullmatch(path.name):
        if not path.is_dir():
            raise UserError(f"trainer.ckpt_path: {path}: no such checkpoint")
        verify(path)
        if not (path / STATE).exists():
            raise UserError(
                f"trainer.ckpt_path: {path}: a model without {STATE}, which cannot be resumed; "
                "name a step-* directory, or set model_name to it to start anew from its weights"
            )
        return path, []
    remarks = []
    for candidate in steps(path):
        try:
            verify(candidate)
        except Damaged as error:
            remarks.append(f"passed over {error}")
            continue
        return candidate, remarks
    remarks = remarks or ["found no step-* directory; train there first"]
    raise UserError("\n  ".join([f"{path}: no intact checkpoint", *remarks]))


def load_state(path: Path) -> dict[str, Any]:
    """Read trainer_state.pt: tensors and plain values only.

    Raises:
        Damaged: it holds anything else, such as a pickle that would run code.
    """
    try:
        return torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Damaged(
            f"{path / STATE}: refused: it holds more than tensors and plain values ({reason})"
        ) from None


def details(directory: Path) -> dict[str, Any]:
    """What stands in a model directory's sft.json (template, step, ...); {} without one."""
    try:
        content = json.loads((directory / DETAILS).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise Damaged(f"{directory / DETAILS}: damaged: not valid JSON") from None
    return content if isinstance(content, dict) else {}


def check_same_run(
    state: dict[str, Any], config: TrainConfig, identity: dict[str, Any], path: Path
) -> list[str]:
    """Compare a checkpoint with the configuration that wants to go on from it.

    Args:
        identity: fingerprints and sizes that must not have changed, by a name for messages.

    Returns:
        One remark for each key that differs and may: the configuration's value is used.

    Raises:
        UserError: naming everything that differs and would change what the state means.
    """
    stored, current = flatten(state["config"]), flatten(resolved(config))
    wrong = [
        f"{name}: the checkpoint has {state['identity'].get(name)}, this run has {value}"
        for name, value in identity.items()
        if state["identity"].get(name) != value
    ]
    remarks = []
    for path_of_key, field in walk(TrainConfig):
        extra = field.json_schema_extra
        before, now = stored.get(path_of_key), current.get(path_of_key)
        if before == now or path_of_key in ("trainer.ckpt_path", "wandb.api"):
            continue
        if isinstance(extra, dict) and extra.get("resume") == "free":
            remarks.append(f"{path_of_key}: was {before}, goes on with {now}")
        else:
            wrong.append(f"{path_of_key}: the checkpoint has {before}, the configuration {now}")
    if wrong:
        raise UserError(
            f"{path}: cannot be resumed with this configuration:\n"
            + "\n".join(f"  {line}" for line in wrong)
            + "\n  put these back, or start a new run in another trainer.checkpoint.dirpath"
        )
    return remarks


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dictionary of full paths."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
