"""What a run tells: metrics.jsonl, W&B's own offline file, console lines, a W&B that fails."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from config import Wandb
from conftest import ROOT, Runner, cli, lines_of, metrics_of, process, rows, write_data
from extras import plot as plot_module
from extras.console import Console, Metrics, duration
from extras.plot import CURVES, Curves
from extras.wandb_log import WandbWriter

BLOCK = 32768  # W&B's file is a LevelDB log: blocks of this size, records framed in 7 bytes


def records_of(file: Path) -> list[Any]:
    """The records of an offline run, decoded with wandb's own protobuf classes."""
    from wandb.proto import wandb_internal_pb2

    content, position, partial, records = file.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:  # the rest of a block is filled up
            position += BLOCK - position % BLOCK
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]
        partial += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(partial)
            records.append(record)
            partial = b""
    return records


def key_of(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


@pytest.fixture(scope="module")
def offline_run(
    model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Any], list[Any]]:
    """A run that was stopped by `max_steps` and resumed, and the records of both parts."""
    base = tmp_path_factory.mktemp("wandb")
    data = write_data(base / "data.json", train=rows(22), val=rows(6, offset=40))
    names = {"group": "g1", "job_type": "j1", "name": "n1", "project_name": "p1"}
    path = Runner(model_dirs, data, base).file(
        model_params__do_compute_metrics=True,
        model_params__val_generate_params={"max_new_tokens": 4},
        trainer__params__max_epochs=1,
        wandb={"api": "secret-key", "args": names},
    )
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(base)}
    first = process("train", path, env=environment)
    assert first.returncode == 0, first.stderr
    more = ["trainer.ckpt_path=last", "trainer.params.max_epochs=2"]
    second = process("train", path, *more, env=environment)
    assert second.returncode == 0, second.stderr
    files = sorted((base / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    return base / "run", records_of(files[0]), records_of(files[1])


def test_wandb_has_the_run_as_configured(offline_run: tuple[Path, list[Any], list[Any]]) -> None:
    run = next(r.run for r in offline_run[1] if r.WhichOneof("record_type") == "run")
    assert (run.run_group, run.job_type, run.display_name, run.project) == ("g1", "j1", "n1", "p1")
    config = {key_of(item): json.loads(item.value_json) for item in run.config.update}
    assert config["data"]["batch_size"] == 4
    assert config["seed"] == 1
    assert "api" not in json.dumps(config)


def test_wandb_has_the_values_of_metrics_jsonl(
    offline_run: tuple[Path, list[Any], list[Any]],
) -> None:
    logged: dict[str, dict[int, float]] = {}
    for record in offline_run[1] + offline_run[2]:
        if record.WhichOneof("record_type") == "history":
            row = {key_of(item): json.loads(item.value_json) for item in record.history.item}
            for name, value in row.items():
                logged.setdefault(name, {})[row["global_step"]] = value
    lines = metrics_of(offline_run[0])
    assert logged["train/loss"] == {li["step"]: li["loss"] for li in lines if "loss" in li}
    assert logged["train/lr"] == {li["step"]: li["lr"] for li in lines if "lr" in li}
    expected = {li["step"]: li["val_loss"] for li in lines if "val_loss" in li}
    assert logged["val/loss"] == expected
    tables = [name for name in logged if name.startswith("val/answers")]  # of sample answers
    assert tables and set(logged[tables[0]]) == set(expected)


def test_wandb_draws_train_and_val_over_the_global_step(
    offline_run: tuple[Path, list[Any], list[Any]],
) -> None:
    axes = {
        r.metric.glob_name or r.metric.name: r.metric.step_metric
        for r in offline_run[1]
        if r.WhichOneof("record_type") == "metric"
    }
    assert axes["train/*"] == axes["val/*"] == "global_step"


def test_wandb_goes_on_with_the_same_run_after_a_resume(
    offline_run: tuple[Path, list[Any], list[Any]],
) -> None:
    ids = {
        r.run.run_id
        for records in offline_run[1:]
        for r in records
        if r.WhichOneof("record_type") == "run"
    }
    assert len(ids) == 1


def test_wandb_summary_names_the_best_checkpoint(
    offline_run: tuple[Path, list[Any], list[Any]],
) -> None:
    updates = [
        key_of(item)
        for record in offline_run[1]
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    ]
    assert "best_checkpoint" in updates
    values = [
        json.loads(item.value_json)
        for record in offline_run[2]
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
        if key_of(item) == "best_checkpoint"
    ]
    assert values == [str(offline_run[0] / "best")] and Path(values[0]).is_dir()


def test_a_failing_wandb_does_not_stop_training(run: Runner, monkeypatch: Any, capsys: Any) -> None:
    import wandb

    def fails(**_: Any) -> None:
        raise ConnectionError("no route to W&B")

    monkeypatch.setattr(wandb, "init", fails)
    run(wandb={"api": None})
    error = capsys.readouterr().err
    assert "W&B is off for this run: ConnectionError: no route to W&B" in error


def test_a_slow_wandb_is_left_behind(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    import wandb

    answer = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: answer.wait(60))
    monkeypatch.setattr(WandbWriter, "CONNECT_SECONDS", 0.1)
    writer = WandbWriter(Wandb(), tmp_path, {}, "id", Console(), "train")
    writer.log({"a": 1})
    writer.finish()
    assert writer.thread.is_alive()  # it has not been waited for
    assert "W&B is not done and is left behind" in capsys.readouterr().err
    answer.set()
    writer.thread.join()


def test_curves_are_drawn_from_metrics_jsonl(
    run: Runner, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    names = ("a_run", "_another $run")
    for name in names:
        curves = run(name=name, trainer__params__max_epochs=1) / CURVES
        assert curves.read_bytes().startswith(b"\x89PNG")
        assert f"curves    {curves}\n" in capsys.readouterr().out
    drawn: list[Any] = []
    original = Axes.plot

    def recording(axes: Any, xs: Any, ys: Any, *args: Any, **kwargs: Any) -> Any:
        drawn.append(list(zip(xs, ys)))
        return original(axes, xs, ys, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", recording)
    monkeypatch.chdir(tmp_path)
    assert cli("plot", *names) == 0
    assert capsys.readouterr().out == "curves.png\n" and Path("curves.png").exists()
    for name, start in zip(names, (0, 2)):
        lines = metrics_of(Path(name), timing=True)
        for value, points in zip(("loss", "val_loss"), drawn[start : start + 2]):
            assert points == [(line["step"], line[value]) for line in lines if value in line]
    assert cli("plot", "a_run", "--output", "x.png") == 0 and Path("x.png").exists()
    assert cli("plot", tmp_path / "nothing") == 2
    assert "`plot` takes the directories of runs" in capsys.readouterr().err


def test_curves_that_cannot_be_drawn_are_one_warning(
    run: Runner, monkeypatch: Any, capsys: Any
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(Axes, "plot", fails)
    monkeypatch.setattr(Curves, "SHARE", 1e9)  # drawn at each validation
    directory = run()
    captured = capsys.readouterr()
    assert captured.err.count("curves.png is not drawn: RuntimeError: no fonts") == 1
    assert "curves    " not in captured.out
    assert not list(directory.glob(".tmp*"))


@pytest.mark.parametrize("share, expected", [(1e9, [6, 12]), (0.0, [12])])
def test_curves_are_redrawn_at_each_validation_unless_that_costs_too_much(
    share: float, expected: list[int], run: Runner, monkeypatch: Any
) -> None:
    """The end is always drawn."""
    drawn: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(Curves, "SHARE", share)
    monkeypatch.setattr(plot_module, "plot", lambda runs: drawn.append(metrics_of(runs[0])))
    directory = run()
    assert [lines[-1]["step"] for lines in drawn] == expected
    assert all("val_loss" in lines[-1] for lines in drawn)
    assert drawn[-1] == metrics_of(directory)


def test_the_start_is_short_and_fits_into_80_columns(
    model_dirs: dict[str, Path], data_file: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(data_file.parent)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    shutil.copytree(model_dirs["gpt2"], "model")
    Runner({}, Path(data_file.name), Path())(model="model")
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("step 1/"))
    assert start <= 18
    assert "\033[1;32m Paris<|endoftext|>\033[0m" in "\n".join(lines)
    # All but the sample and the command that is to be copied, which a terminal folds itself.
    folded = [li for li in lines if not li.startswith(("sample", "test it"))]
    assert [li for li in folded if len(li) > 80] == []


def test_the_command_at_the_end_tests_the_run(run: Runner) -> None:
    path = run.file()
    result = process("train", path, cwd=ROOT)
    command = shlex.split(result.stdout.splitlines()[-1].removeprefix("test it   "))
    assert command[:3] == ["python", "sft.py", "test"]
    assert cli("test", str(ROOT / command[3]), *command[4:], "--quiet") == 0
    log = lines_of(path.with_suffix("") / "test.jsonl")
    assert [record["question"] for record in log] == [row["Question"] for row in rows(7, 60)]


def test_metrics_write_null_for_what_is_no_number(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.write({"loss": float("nan"), "norm": float("inf"), "step": 3})
    metrics.close()
    assert metrics_of(tmp_path) == [{"loss": None, "norm": None, "step": 3}]


def test_quiet_prints_warnings_only(capsys: Any) -> None:
    console = Console(quiet=True)
    console.say("a line")
    console.warn("look out")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "warning: look out\n"


def test_every_run_keeps_what_it_was_made_with(run: Runner) -> None:
    record = json.loads((run() / "run.json").read_text())
    assert record["samples"] == {"train": 22, "val": 6}
    assert record["truncation"]["train"]["kept"] == 22
    assert record["truncation"]["val"]["kept"] == 6
    assert len(record["data_sha256"]) == 64 and record["packages"]["torch"]
    assert record["device"].startswith("cpu")


@pytest.mark.parametrize(
    "seconds, text", [(3.21, "3.2 s"), (245, "4 min 05 s"), (7380, "2 h 03 min")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text
