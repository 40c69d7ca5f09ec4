"""Real crashes of real processes: SIGKILL at any moment, signals, numbers going wrong."""

from __future__ import annotations

import json
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
from conftest import (
    ROOT,
    cli,
    metrics_of,
    newest,
    process,
    record_saves,
    rows,
    train,
    train_config,
    write_yaml,
)
from test_resume import FAMILIES, assert_same_run, dropout_model, families  # noqa: F401

# Runs the command line and kills itself, really, at the n-th of the moments that are named: the
# calls of functions inside a checkpoint write, or the steps of the loop.
SELF_KILLING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch; torch.set_num_threads(1)
import checkpoint, run, sft, shutil, pathlib
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
    deadly(run, "export"); deadly(torch, "save"); deadly(shutil, "rmtree")
    deadly(pathlib.Path, "rename")
else:
    deadly(run.Run, "set_learning_rate"); deadly(run.Run, "after_step"); deadly(run, "validate")
sys.exit(sft.main(sys.argv[3:]))
"""


Moment = tuple[str, int]  # "write" or "step", and which of these a process does not survive


def crashing_config(model: Path, data: Path, run: Path, **changes: Any) -> dict[str, Any]:
    return train_config(
        model,
        data,
        run,
        trainer__checkpoint__every_n_train_steps=1,
        trainer__params__val_check_interval=4,
        **changes,
    )


def kill_and_resume(
    moments: list[Moment], config: dict[str, Any], tmp_path: Path
) -> tuple[Counter[str], int]:
    """Kill a process at each of `moments`, resuming in between, then let it finish.

    Returns the number of kills of both kinds, and of resumes from an intact checkpoint.
    """
    script = tmp_path / "self_killing.py"
    script.write_text(SELF_KILLING.format(root=str(ROOT)))
    run = Path(config["trainer"]["checkpoint"]["dirpath"])
    path = write_yaml(run.with_suffix(".yaml"), config)
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
    return kills, resumes


@pytest.mark.parametrize(
    "where, numbers", [("write", [9, 25, 31]), ("step", [5, 3])], ids=["write", "step"]
)
def test_a_killed_run_resumes_bitwise(
    where: str,
    numbers: list[int],
    dropout_model: Path,  # noqa: F811
    data_file: Path,
    tmp_path: Path,
) -> None:
    whole = crashing_config(dropout_model, data_file, tmp_path / "whole")
    assert train(whole) == 0
    parts = crashing_config(dropout_model, data_file, tmp_path / "parts")
    kills, resumes = kill_and_resume([(where, n) for n in numbers], parts, tmp_path)
    assert kills[where] == len(numbers) and resumes >= 1
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_killed_at_many_random_moments(
    families: dict[str, Path],  # noqa: F811
    data_file: Path,
    tmp_path: Path,
) -> None:
    """At least 25 kills inside a checkpoint write and 15 elsewhere; differing bits: 0."""
    changes = {"model_params__from_scratch": True, "trainer__params__max_epochs": 4}
    chance = random.Random(20)
    total: Counter[str] = Counter()
    for family in FAMILIES:
        whole, parts = (
            crashing_config(families[family], data_file, tmp_path / f"{family}-{name}", **changes)
            for name in ("whole", "parts")
        )
        assert train(whole) == 0
        moments = [("write", chance.randint(1, 60)) for _ in range(5)]
        moments += [("step", chance.randint(1, 10)) for _ in range(3)]
        chance.shuffle(moments)
        kills, resumes = kill_and_resume(moments, parts, tmp_path)
        assert_same_run(tmp_path / f"{family}-whole", tmp_path / f"{family}-parts")
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


def started(config: dict[str, Any], *overrides: str) -> subprocess.Popen[str]:
    path = write_yaml(Path(config["trainer"]["checkpoint"]["dirpath"]).with_suffix(".yaml"), config)
    command = [sys.executable, str(ROOT / "sft.py"), "train", str(path), *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(run: Path, count: int = 2) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise AssertionError("the run did not start")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_resume(
    number: signal.Signals, model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    config = train_config(
        model_dirs["gpt2"], data_file, tmp_path / "run", trainer__params__max_epochs=5000
    )
    child = started(config)
    wait_for_steps(tmp_path / "run")
    child.send_signal(number)
    output, error = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert f"{number.name}: stopping after this step" in error
    command = output.strip().splitlines()[-1].strip()
    assert command.startswith("python ") and command.endswith("trainer.ckpt_path=last")
    assert newest(tmp_path / "run")
    logged = [
        json.loads(li) for li in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert newest(tmp_path / "run").name == checkpoint.step_name(logged[-1]["step"])
    # The line is a command that works as it stands.
    words = shlex.split(command)[2:]
    assert process(*words, "trainer.params.max_epochs=1").returncode == 0


def test_a_second_ctrl_c_stops_at_once_and_a_repeated_sigterm_does_not() -> None:
    """Batch systems send SIGTERM more than once, and to the process group as well."""
    code = (
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from sft import Stop\n"
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
    """Make the loss or the gradients of some positions NaN."""
    import device

    original = device.Device.step
    seen = [0]

    def step(self: Any, optimizer: Any, parameters: Any, clip: Any, loss: Any) -> Any:
        seen[0] += 1
        if seen[0] in steps:
            if what == "loss":
                loss = loss * float("nan")
            else:
                parameters[0].grad[0] = float("inf")
        return original(self, optimizer, parameters, clip, loss)

    monkeypatch.setattr(device.Device, "step", step)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_step_never_reaches_weights_or_schedule(
    what: str,
    model_dirs: dict[str, Path],
    data_file: Path,
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
) -> None:
    config = train_config(model_dirs["gpt2"], data_file, tmp_path / "run")
    with monkeypatch.context() as patched:
        poison(patched, {3, 4}, what)
        assert train(config) == 0
    error = capsys.readouterr().err
    assert "step 3 skipped" in error and "2 in a row" in error
    lines = [line for line in metrics_of(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 11))  # 12 tried, 10 done
    assert lines[-1]["bad_steps"] == 2
    clean = train_config(model_dirs["gpt2"], data_file, tmp_path / "clean")
    assert train(clean) == 0
    good = [line for line in metrics_of(tmp_path / "clean") if "loss" in line]
    assert [line["lr"] for line in lines] == [line["lr"] for line in good][:10]
    state = torch.load(newest(tmp_path / "run") / "trainer_state.pt", weights_only=True)
    assert all(s["step"] == 10 for s in state["optimizer"]["state"].values())
    for tensor in state["optimizer"]["state"][0].values():
        assert torch.isfinite(tensor).all()


def test_a_skipped_step_validates_and_saves_nothing_twice(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    config = train_config(
        model_dirs["gpt2"],
        data_file,
        tmp_path / "run",
        trainer__params__val_check_interval=2,
        trainer__checkpoint__every_n_train_steps=2,
    )
    written = record_saves(monkeypatch)
    poison(monkeypatch, {3, 4, 7}, "loss")  # twice after step 2, once after step 4
    assert train(config) == 0
    steps = [line["step"] for line in metrics_of(tmp_path / "run") if "val_loss" in line]
    assert steps == [2, 4, 6, 8, 9]
    names = [name for name in written if name != "best"]
    assert names == [checkpoint.step_name(step) for step in (2, 4, 6, 8, 9)]


def test_too_many_bad_steps_stop_the_run_and_name_the_samples(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    config = train_config(
        model_dirs["gpt2"], data_file, tmp_path / "run", trainer__params__max_bad_steps=3
    )
    poison(monkeypatch, set(range(4, 100)), "loss")
    assert train(config) == 2
    error = capsys.readouterr().err
    assert "stopped: 3 steps in a row had a loss that is not a finite number" in error
    assert "the last samples were rows" in error and "max_bad_steps: 3" in error


def test_an_overflow_under_fp16_is_the_scalers_business(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    config = train_config(
        model_dirs["gpt2"],
        data_file,
        tmp_path / "run",
        trainer__params__precision="16",
        trainer__params__max_bad_steps=1,
    )
    poison(monkeypatch, {3}, "gradient")
    assert train(config) == 0
    assert "skipped" not in capsys.readouterr().err
    last = [line for line in metrics_of(tmp_path / "run") if "loss" in line][-1]
    assert last["step"] == 11 and last["overflows"] == 1 and last["bad_steps"] == 0
    state = torch.load(newest(tmp_path / "run") / "trainer_state.pt", weights_only=True)
    assert state["scaler"]["scale"] == 65536.0 / 2
    moments = [entry["exp_avg"] for entry in state["optimizer"]["state"].values()]
    assert {moment.dtype for moment in moments} == {torch.float32}


def test_a_split_without_targets_is_refused_before_training(
    model_dirs: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    data = tmp_path / "long.json"
    data.write_text(json.dumps({"train": rows(5), "val": rows(2)}))
    config = train_config(
        model_dirs["gpt2"], data, tmp_path / "run", data__max_length=4, data__truncate_promt=False
    )
    assert train(config) == 2
    error = capsys.readouterr().err
    assert (
        "'train' has no target token to learn: 0 kept" in error and "5 dropped (rows 1, 2" in error
    )


SECRET = "k3y-that-must-not-appear-" + "a" * 16


def test_the_key_appears_in_no_file_and_no_line(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    config = train_config(
        model_dirs["gpt2"], data_file, tmp_path / "run", trainer__params__max_steps=2
    )
    config["wandb"] = {"api": SECRET, "args": {"name": "secret-run"}}
    path = write_yaml(tmp_path / "c.yaml", config)
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


def test_a_run_with_everything_frozen_or_unwritable_output_fails_without_a_trace(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, capsys: Any
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("a file, not a directory")
    config = train_config(model_dirs["gpt2"], data_file, blocker / "run")
    path = write_yaml(tmp_path / "c.yaml", config)
    assert cli("train", path) == 2
    assert "trainer.checkpoint.dirpath" in capsys.readouterr().err
    assert blocker.read_text() == "a file, not a directory"
