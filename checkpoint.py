"""Checkpoints that survive anything: written aside, verified, renamed, rotated.

    runs/facts/step-000300/   resumable: Hugging Face model + trainer_state.pt
    runs/facts/best/          the best model so far, Hugging Face format, nothing else needed

Where an adapter is trained, it stands in the model's place, in PEFT's format.

A checkpoint comes into being by renaming a finished, fsynced directory that holds a manifest
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from config import TrainConfig, Trainer, UserError, first_line, resolved

if TYPE_CHECKING:
    from device import Device

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


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    loss: sum over the step's targets. grad_norm: global L2 norm before clipping. applied: the
    weights changed. overflow: skipped by the GradScaler, which lowers its scale. tokens, targets:
    of all ranks.
    """

    loss: float
    grad_norm: float
    lr: float
    applied: bool
    overflow: bool
    tokens: int
    targets: int
    seconds: float


@dataclass
class State:
    """The counters of a run; everything here is part of a checkpoint.

    position counts the steps that were tried, global_step those that changed the weights. The
    window_* sums run since the last log point. validated_at is a position, saved_at
    what `moment` was; `seconds` are those of the steps alone, without validation and saving.
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
    window_seconds: float = 0.0
    validated_at: int = -1
    validated_step: int = 0
    saved_at: tuple[int, int] | None = None
    saved_step: int = 0
    best_value: float | None = None
    best_step: int = 0
    seconds: float = 0.0
    wandb_id: str = ""

    def moment(self) -> tuple[int, int]:
        """What a checkpoint stands for: after which step, and after which validation."""
        return self.position, self.validated_at

    def count(self, step: Step) -> None:
        """Account for one tried step."""
        self.position += 1
        self.seconds += step.seconds
        self.window_seconds += step.seconds
        if step.applied:
            self.global_step += 1
            self.tokens += step.tokens
            self.bad_in_row = 0
            self.window_loss += step.loss
            self.window_targets += step.targets
            self.window_tokens += step.tokens
        elif step.overflow:
            self.overflows += 1
        else:
            self.bad_steps += 1
            self.bad_in_row += 1

    def start_window(self) -> None:
        self.window_loss, self.window_seconds = 0.0, 0.0
        self.window_targets = self.window_tokens = 0


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
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically: the old file is there or the new one, never half of one.

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
            # Between the two renames there is no run/name; `_clean_up` then takes the old one.
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        temporary.rename(target)
        _sync(run)
        shutil.rmtree(replaced, ignore_errors=True)
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


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run's directory for this process alone; create it, remove half-written checkpoints.

    The kernel lets go of the lock however the process ends.

    Raises:
        UserError: it cannot be written to, or another process trains there.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = (run / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"trainer.checkpoint.dirpath: {run}: cannot be written to "
            f"({error.strerror}); name a directory that can"
        ) from None
    with handle:
        try:
            lock(handle, wait=False)
        except BlockingIOError:
            raise UserError(f"{run}: another process is training in this directory") from None
        _clean_up(run)
        yield


def lock(handle: IO[str], *, wait: bool) -> None:
    """Lock an open file for this process, where the system and the file system have locks.

    Raises:
        BlockingIOError: another process has it, and `wait` is false.
    """
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        pass


def _clean_up(run: Path) -> None:
    """Remove what an interrupted save left behind, and finish an interrupted replacement."""
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
    """Delete all intact checkpoints but the newest `keep`; damaged ones and `protect` stay."""
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


def _check(path: Path, hashes: bool) -> None:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = {str(name): (size, sha256) for name, (size, sha256) in manifest["files"].items()}
        known = manifest["format"] == FORMAT
    except FileNotFoundError:
        raise Damaged(f"{path}: damaged: no {MANIFEST}, so it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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


def resume_point(trainer: Trainer, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, if the configuration asks for one; `warn` gets remarks.

    Raises:
        UserError: there is none where one is wanted, or a run that would be overwritten.
    """
    run, wanted = Path(trainer.checkpoint.dirpath), trainer.ckpt_path
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    there = steps(run)
    if restarted and there:  # torchrun started the same command again after a failure
        wanted = "last"
    if wanted is None:
        if there:
            raise UserError(
                f"trainer.checkpoint.dirpath: {run} already holds a run ({there[0].name}); go on "
                "with it by trainer.ckpt_path=last, or name another directory by "
                "trainer.checkpoint.dirpath=..."
            )
        if (run / "best").exists():
            raise UserError(
                f"trainer.checkpoint.dirpath: {run} holds best/ and nothing that could be resumed; "
                "move it away, or name another directory"
            )
        return None
    path, remarks = find(wanted, run)
    for remark in remarks:
        warn(remark)
    newer = [p for p in there if number(p) > number(path)]
    if newer and same_run(path, run) and not remarks:
        raise UserError(
            f"trainer.ckpt_path: {path} is older than {newer[0].name} in the same run; go on "
            "with trainer.ckpt_path=last, or branch off by naming another "
            f"directory than {str(run)!r} in trainer.checkpoint.dirpath"
        )
    return path


def same_run(path: Path, run: Path) -> bool:
    """Whether a checkpoint lies in this run's directory, and is not that of another run."""
    return path.resolve().parent == run.resolve()


def find_model(name: str, warn: Callable[[str], None]) -> Path | str:
    """A run's best (or newest intact) model, a model directory, or a hub id; `warn` gets remarks.

    Raises:
        UserError: a run directory without a model. Damaged: a checkpoint of ours is not intact.
    """
    path = Path(name)
    if not path.is_dir():
        return name
    if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
        # Then it is to be a run's.
        best = path / "best"
        if best.is_dir():
            path = best
        elif steps(path):
            path, remarks = find(str(path), path)
            for remark in [*remarks, f"{best}: there is none yet; {path} is used"]:
                warn(remark)
        else:
            raise UserError(f"model_name: {path}: the directory has no config.json")
    if (path / MANIFEST).exists():  # others have nothing to be held against
        verify(path)
    return path


def details(directory: Path) -> dict[str, Any]:
    """What stands in a model directory's sft.json (template, step, ...); {} without one."""
    try:
        content = json.loads((directory / DETAILS).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise Damaged(f"{directory / DETAILS}: damaged: not valid JSON") from None
    return content if isinstance(content, dict) else {}


# ------------------------------------------------------------------------- what a run consists of


def whole_state(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors in host memory, whole; every rank must ask for them.

    Rank 0, which writes them, gets the tensors, the others None. Names that share a tensor still
    share it.
    """
    distinct = {id(tensor): tensor for tensor in named.values()}
    whole = {i: _on_rank_zero(tensor) for i, tensor in distinct.items()}
    return {name: whole[id(tensor)] for name, tensor in named.items()}


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` as `whole_state` has the model's; every rank must ask for it."""
    content = optimizer.state_dict()
    state = {
        i: {name: _on_rank_zero(value) for name, value in values.items()}
        for i, values in content["state"].items()
    }
    return {"state": state, "param_groups": content["param_groups"]}


def _on_rank_zero(value: Any) -> Any:
    """A tensor in rank 0's host memory, put together from all slices; others as they are."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu() if int(os.environ.get("RANK", 0)) == 0 else None


def load_optimizer_state(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> None:
    """Take over what `whole_optimizer_state` gave, on any device and number of ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for i, values in content["state"].items():
        p = parameters[i]
        state[i] = {
            name: distribute_tensor(value, p.device_mesh, p.placements)
            if isinstance(p, DTensor) and value.shape == p.shape
            else value
            for name, value in values.items()
        }
    # How the update is computed belongs to this device and not to the one that wrote it.
    groups = [
        before | {name: now[name] for name in ("fused", "foreach", "capturable") if name in now}
        for before, now in zip(content["param_groups"], optimizer.param_groups)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def load_state(path: Path) -> dict[str, Any]:
    """Read trainer_state.pt: tensors and plain values only.

    Raises:
        Damaged: it holds anything else, such as a pickle that would run code.
    """
    try:
        return torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise Damaged(
            f"{path / STATE}: refused: it holds more than tensors and plain values, or less than "
            f"was written ({first_line(error)})"
        ) from None


def restore(
    path: Path,
    config: TrainConfig,
    identity: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    device: Device,
) -> tuple[State, int, list[str]]:
    """Take over a checkpoint's optimizer, scaler and generators.

    With the weights, which `open_model` has read, and the counters, that is all that a step depends
    on: the order of samples and the rate are functions of the counters, and validation draws from
    no generator that training uses. So the next step is bitwise the one that would have come.

    Returns:
        The counters, the size that metrics.jsonl had (0 for another run's), and remarks.

    Raises:
        UserError: it does not belong to this configuration, model or data.
    """
    from extras.same_run import check_same_run

    stored = load_state(path)
    try:
        remarks = check_same_run(stored, config, identity, path)
        state = State(**stored["state"])
        load_optimizer_state(optimizer, stored["optimizer"])
        device.scaler.load_state_dict(stored["scaler"])
        if device.ranks.rank < len(stored["rng"]):  # an additional rank keeps its fresh seed
            device.set_rng_state(stored["rng"][device.ranks.rank])
        size = int(stored["metrics_size"])
        before = stored["config"]["trainer"]["checkpoint"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a trainer state of this version: {error!r}") from None
    now = resolved(config)["trainer"]["checkpoint"]
    ours = same_run(path, Path(config.trainer.checkpoint.dirpath))
    if not ours or any(before[key] != now[key] for key in ("log_obg", "mode")):
        state.best_value, state.best_step = None, 0  # the best of another run or by another metric
    if not ours:
        state.wandb_id = ""
    state.saved_at, state.saved_step = state.moment(), state.global_step
    return state, size if ours else 0, remarks
