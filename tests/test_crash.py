"""Real crashes of real processes: SIGKILL at any moment, signals, numbers going wrong."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
import device
from conftest import ROOT, Runner, metrics_of, newest, process, record_saves, rows, write_data
from model import AnswerModel
from test_resume import FAMILIES, assert_same_run, dropout_model, families  # noqa: F401

# Runs the command line and kills itself, really, at the n-th of the moments that are named: the
# calls of functions inside a checkpoint write, or the steps of the loop.
SELF_KILLING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch; torch.set_num_threads(1)
import checkpoint, evaluate, sft, shutil, pathlib
countdown = [int(sys.argv[1])]
def deadly(owner, name):
    original = getattr(owner, name)
    def wrapped(*args, **kwargs):
        countdown[0] -= 1
        if countdown[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, wrapped)
if sys.argv[2] == "write":
    for name in ("_write_manifest", "sha256_of", "_sync"):
        deadly(checkpoint, name)
    deadly(sft, "export"); deadly(torch, "save"); deadly(shutil, "rmtree")
    deadly(pathlib.Path, "rename")
else:
    deadly(sft.Plan, "learning_rate"); deadly(checkpoint.State, "count")
    deadly(evaluate, "validate")
sys.exit(sft.main(sys.argv[3:]))
"""


Moment = tuple[str, int]  # "write" or "step", and which of these a process does not survive


OFTEN = {  # so that there is much to kill
    "trainer__checkpoint__every_n_train_steps": 1,
    "trainer__params__val_check_interval": 4,
}


def kill_and_resume(moments: list[Moment], path: Path) -> tuple[Path, Counter[str], int]:
    """Kill a process at each of `moments`, resuming in between, then let it finish.

    Returns the run's directory, the number of kills of both kinds, and of resumes from an intact
    checkpoint.
    """
    script = path.with_name("self_killing.py")
    script.write_text(SELF_KILLING.format(root=str(ROOT)))
    run = path.with_suffix("")
    kills: Counter[str] = Counter()
    resumes = 0
    for where, number in [*moments, ("step", 10**9)]:
        resume = ["trainer.ckpt_path=last"] if checkpoint.steps(run) else []
        resumes += len(resume)
        command = [sys.executable, str(script), str(number), where, "train", str(path), *resume]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL, result.stderr
        kills[where] += 1
    assert result.returncode == 0
    assert not [p for p in run.iterdir() if p.name.startswith((".tmp", ".old"))]
    return run, kills, resumes


@pytest.mark.parametrize(
    "where, numbers",
    [
        pytest.param("write", [9, 25, 31], id="write"),
        pytest.param("step", [5, 3], id="step", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_bitwise(
    where: str,
    numbers: list[int],
    run: Runner,
    dropout_model: Path,  # noqa: F811
) -> None:
    whole = run(model=dropout_model, **OFTEN)
    path = run.file(model=dropout_model, **OFTEN)
    parts, kills, resumes = kill_and_resume([(where, n) for n in numbers], path)
    assert kills[where] == len(numbers) and resumes >= 1
    assert_same_run(whole, parts)


@pytest.mark.slow
def test_killed_at_many_random_moments(
    run: Runner,
    families: dict[str, Path],  # noqa: F811
) -> None:
    """At least 25 kills inside a checkpoint write and 15 elsewhere; differing bits: 0."""
    changes = OFTEN | {"model_params__from_scratch": True, "trainer__params__max_epochs": 4}
    chance = random.Random(20)
    total: Counter[str] = Counter()
    for family in FAMILIES:
        whole = run(model=families[family], **changes)
        moments = [("write", chance.randint(1, 60)) for _ in range(5)]
        moments += [("step", chance.randint(1, 10)) for _ in range(3)]
        chance.shuffle(moments)
        path = run.file(model=families[family], **changes)
        parts, kills, resumes = kill_and_resume(moments, path)
        assert_same_run(whole, parts)
        total += kills
        print(
            f"\n{family}: {kills.total()} kills, {kills['write']} of them inside a checkpoint "
            f"write, {resumes} resumes, differing bits: 0",
            end="",
        )
    print(
        f"\nkill test: {total.total()} kills, {total['write']} of them inside a checkpoint write, "
        f"in {len(FAMILIES)} families, differing bits: 0"
    )
    assert total["write"] >= 25 and total["step"] >= 15


def wait_for_steps(run: Path, count: int = 2) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise AssertionError("the run did not start")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_says_how_to_resume(number: signal.Signals, run: Runner) -> None:
    path = run.file(trainer__params__max_epochs=5000)
    directory = path.with_suffix("")
    command = [sys.executable, str(ROOT / "sft.py"), "train", str(path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(directory)
    child.send_signal(number)
    output, error = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert f"{number.name}: stopping after this step" in error
    said = output.strip().splitlines()[-1].strip()
    assert said.startswith("python ") and said.endswith("trainer.ckpt_path=last")
    assert newest(directory).name == checkpoint.step_name(metrics_of(directory)[-1]["step"])
    # The line is a command that works as it stands.
    words = shlex.split(said)[2:]
    assert process(*words, "trainer.params.max_epochs=1").returncode == 0


def test_a_second_ctrl_c_stops_at_once_and_a_repeated_sigterm_does_not() -> None:
    """Batch systems send SIGTERM more than once, and to the process group as well."""
    code = (
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from extras.command_line import Stop\n"
        "stop = Stop()\n"
        "for number in (signal.SIGTERM, signal.SIGTERM):\n"
        "    os.kill(os.getpid(), number)\n"
        "assert stop.requested() and stop.signal == signal.SIGTERM\n"
        "print('still here', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('not reached', flush=True)\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 128 + signal.SIGINT
    assert child.stdout == "still here\n"
    assert child.stderr.count("stopping after this step") == 1


def poison(monkeypatch: Any, steps: set[int], what: str) -> None:
    """Make the loss or a gradient of some steps, of one batch each, not a finite number."""
    step = [0]
    exchange, forward = device.Device.exchange_gradients, AnswerModel.forward
    unscale = torch.amp.GradScaler.unscale_

    def counting(*args: Any, **kwargs: Any) -> None:
        step[0] += 1
        exchange(*args, **kwargs)

    def bad_loss(self: AnswerModel, batch: Any) -> torch.Tensor:
        bad = what == "loss" and self.training and step[0] in steps
        return forward(self, batch) * (float("nan") if bad else 1)

    def bad_gradient(self: Any, optimizer: torch.optim.Optimizer) -> None:
        if what == "gradient" and step[0] in steps:
            optimizer.param_groups[0]["params"][0].grad[0] = float("inf")
        unscale(self, optimizer)

    monkeypatch.setattr(device.Device, "exchange_gradients", counting)
    monkeypatch.setattr(AnswerModel, "forward", bad_loss)
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", bad_gradient)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_step_never_reaches_weights_or_schedule(
    what: str, run: Runner, monkeypatch: Any, capsys: Any
) -> None:
    with monkeypatch.context() as patched:
        poison(patched, {3, 4}, what)
        directory = run()
    error = capsys.readouterr().err
    assert "step 3 skipped" in error and "2 in a row" in error
    lines = [line for line in metrics_of(directory) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 11))  # 12 tried, 10 done
    assert lines[-1]["bad_steps"] == 2
    good = [line for line in metrics_of(run()) if "loss" in line]
    assert [line["lr"] for line in lines] == [line["lr"] for line in good][:10]
    state = torch.load(newest(directory) / "trainer_state.pt", weights_only=True)
    assert all(s["step"] == 10 for s in state["optimizer"]["state"].values())
    for tensor in state["optimizer"]["state"][0].values():
        assert torch.isfinite(tensor).all()


def test_a_skipped_step_validates_and_saves_nothing_twice(run: Runner, monkeypatch: Any) -> None:
    written = record_saves(monkeypatch)
    poison(monkeypatch, {3, 4, 7}, "loss")  # twice after step 2, once after step 4
    directory = run(
        trainer__params__val_check_interval=2, trainer__checkpoint__every_n_train_steps=2
    )
    steps = [line["step"] for line in metrics_of(directory) if "val_loss" in line]
    assert steps == [2, 4, 6, 8, 9]
    names = [name for name in written if name != "best"]
    assert names == [checkpoint.step_name(step) for step in (2, 4, 6, 8, 9)]


def test_too_many_bad_steps_stop_the_run_and_name_the_samples(
    run: Runner, monkeypatch: Any, capsys: Any
) -> None:
    poison(monkeypatch, set(range(4, 100)), "loss")
    run(code=2, trainer__params__max_bad_steps=3)
    error = capsys.readouterr().err
    assert "stopped: 3 steps in a row had a loss that is not a finite number" in error
    assert "the last samples were rows" in error and "max_bad_steps: 3" in error


def test_an_overflow_under_fp16_is_the_scalers_business(
    run: Runner, monkeypatch: Any, capsys: Any
) -> None:
    poison(monkeypatch, {3}, "gradient")
    directory = run(model="gpt2", trainer__params__precision="16", trainer__params__max_bad_steps=1)
    assert "skipped" not in capsys.readouterr().err
    last = [line for line in metrics_of(directory) if "loss" in line][-1]
    assert last["step"] == 11 and last["overflows"] == 1 and last["bad_steps"] == 0
    state = torch.load(newest(directory) / "trainer_state.pt", weights_only=True)
    assert state["scaler"]["scale"] == 65536.0 / 2
    moments = [entry["exp_avg"] for entry in state["optimizer"]["state"].values()]
    assert {moment.dtype for moment in moments} == {torch.float32}


def test_a_split_without_targets_is_refused_before_training(
    run: Runner, tmp_path: Path, capsys: Any
) -> None:
    data = write_data(tmp_path / "long.json", train=rows(5), val=rows(2))
    run(code=2, data=data, data__max_length=4, data__truncate_promt=False)
    error = capsys.readouterr().err
    assert "'train' has no target token to learn: 0 kept" in error
    assert "5 dropped (rows 1, 2" in error


SECRET = "k3y-that-must-not-appear-" + "a" * 16


def test_the_key_appears_in_no_file_and_no_line(run: Runner, tmp_path: Path) -> None:
    wandb = {"api": SECRET, "args": {"name": "secret-run"}}
    path = run.file(trainer__params__max_steps=2, wandb=wandb)
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    result = process("train", path, f"wandb.api={SECRET}", env=environment)
    assert result.returncode == 0, result.stderr
    assert SECRET not in result.stdout + result.stderr
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p != path]
    assert any("wandb" in str(p) for p in files)
    for file in files:
        assert SECRET.encode() not in file.read_bytes(), file
    again = [f"wandb={{api: {SECRET}}}", "trainer.ckpt_path=last", "trainer.params.max_steps=3"]
    result = process("train", path, *again, env=environment)
    assert result.returncode == 0 and SECRET not in result.stdout + result.stderr
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or file == path or SECRET.encode() not in file.read_bytes(), file
    for wrong in (f"wandb.api={SECRET}", "wandb.args.nme=1"):
        result = process(
            "train", path, wrong, "data.batch_size=x", "wandb.api=[1]", env=environment
        )
        assert result.returncode == 2 and SECRET not in result.stderr


def test_an_output_that_cannot_be_written_is_refused_without_a_trace(
    run: Runner, tmp_path: Path, capsys: Any
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("a file, not a directory")
    run(f"trainer.checkpoint.dirpath={blocker / 'run'}", code=2)
    assert "trainer.checkpoint.dirpath" in capsys.readouterr().err
    assert blocker.read_text() == "a file, not a directory"
