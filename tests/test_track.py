"""What a run tells: metrics.jsonl, W&B's own offline file, console lines, a W&B that fails."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from config import Wandb
from conftest import ROOT, cli, metrics_of, process, rows, train_config, write_yaml
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
    data = base / "data.json"
    data.write_text(json.dumps({"train": rows(22), "val": rows(6, offset=40)}))
    config = train_config(
        model_dirs["gpt2"],
        data,
        base / "run",
        model_params__do_compute_metrics=True,
        model_params__val_generate_params={"max_new_tokens": 4},
        trainer__params__max_epochs=1,
    )
    config["wandb"] = {
        "api": "secret-key",
        "args": {"group": "g1", "job_type": "j1", "name": "n1", "project_name": "p1"},
    }
    path = write_yaml(base / "c.yaml", config)
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


def test_a_failing_wandb_does_not_stop_training(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    import wandb

    def fails(**_: Any) -> None:
        raise ConnectionError("no route to W&B")

    monkeypatch.setattr(wandb, "init", fails)
    config = train_config(model_dirs["gpt2"], data_file, tmp_path / "run")
    config["wandb"] = {"api": None}
    assert cli("train", write_yaml(tmp_path / "c.yaml", config)) == 0
    error = capsys.readouterr().err
    assert "W&B is off for this run: ConnectionError: no route to W&B" in error


def test_a_slow_wandb_is_left_behind(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: time.sleep(30))
    monkeypatch.setattr(WandbWriter, "CONNECT_SECONDS", 0.1)
    began = time.monotonic()
    writer = WandbWriter(Wandb(), tmp_path, {}, "id", Console(), "train")
    writer.log({"a": 1})
    writer.finish()
    assert time.monotonic() - began < 25
    assert "W&B is not done and is left behind" in capsys.readouterr().err


def test_curves_are_drawn_from_metrics_jsonl(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    runs = [tmp_path / "a_run", tmp_path / "_another $run"]
    for run in runs:
        config = train_config(model_dirs["gpt2"], data_file, run, trainer__params__max_epochs=1)
        assert cli("train", write_yaml(tmp_path / "c.yaml", config)) == 0
        assert (run / CURVES).read_bytes().startswith(b"\x89PNG")
        assert f"curves    {run / CURVES}\n" in capsys.readouterr().out
    drawn: list[Any] = []
    original = Axes.plot

    def recording(axes: Any, xs: Any, ys: Any, *args: Any, **kwargs: Any) -> Any:
        drawn.append(list(zip(xs, ys)))
        return original(axes, xs, ys, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", recording)
    monkeypatch.chdir(tmp_path)
    assert cli("plot", "a_run", "_another $run") == 0
    assert capsys.readouterr().out == "curves.png\n" and Path("curves.png").exists()
    for run, start in zip(runs, (0, 2)):
        lines = metrics_of(run, timing=True)
        for name, points in zip(("loss", "val_loss"), drawn[start : start + 2]):
            assert points == [(line["step"], line[name]) for line in lines if name in line]
    assert cli("plot", "a_run", "--output", "x.png") == 0 and Path("x.png").exists()
    assert cli("plot", tmp_path / "nothing") == 2
    assert "`plot` takes the directories of runs" in capsys.readouterr().err


def test_curves_that_cannot_be_drawn_are_one_warning(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(Axes, "plot", fails)
    monkeypatch.setattr(Curves, "SHARE", 1e9)  # drawn at each validation
    config = train_config(model_dirs["gpt2"], data_file, tmp_path / "run")
    assert cli("train", write_yaml(tmp_path / "c.yaml", config)) == 0
    captured = capsys.readouterr()
    assert captured.err.count("curves.png is not drawn: RuntimeError: no fonts") == 1
    assert "curves    " not in captured.out
    assert not list((tmp_path / "run").glob(".tmp*"))


def test_curves_are_redrawn_at_each_validation_unless_that_costs_too_much(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(plot_module, "plot", lambda runs: drawn.append(len(metrics_of(runs[0]))))
    counts = []
    for share in (1e9, 0.0):
        monkeypatch.setattr(Curves, "SHARE", share)
        config = train_config(model_dirs["gpt2"], data_file, tmp_path / str(share))
        assert cli("train", write_yaml(tmp_path / "c.yaml", config), "--quiet") == 0
        counts.append(len(drawn))
        assert drawn[-1] == len(metrics_of(tmp_path / str(share)))  # the end is always drawn
    assert counts == [2, 3]  # two validations; without them only the end


def test_the_start_is_short_and_fits_into_80_columns(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    data_file.rename("data.json")
    model_dirs["gpt2"].rename("model")
    try:
        config = train_config("model", Path("data.json"), Path("run"))
        assert cli("train", write_yaml(tmp_path / "c.yaml", config)) == 0
    finally:
        Path("model").rename(model_dirs["gpt2"])
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("step 1/"))
    assert start <= 18
    assert "\033[1;32m Paris<|endoftext|>\033[0m" in "\n".join(lines)
    # All but the sample and the command that is to be copied, which a terminal folds itself.
    folded = [li for li in lines if not li.startswith(("sample", "test it"))]
    assert [li for li in folded if len(li) > 80] == []


def test_the_command_at_the_end_tests_the_run(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, capsys: Any
) -> None:
    config = train_config(model_dirs["gpt2"], data_file, tmp_path / "run")
    result = process("train", write_yaml(tmp_path / "c.yaml", config), cwd=ROOT)
    command = shlex.split(result.stdout.splitlines()[-1].removeprefix("test it   "))
    assert command[:3] == ["python", "sft.py", "test"]
    assert cli("test", str(ROOT / command[3]), *command[4:], "--quiet") == 0
    log = (tmp_path / "run" / "test.jsonl").read_text().splitlines()
    assert len(log) == 7 and json.loads(log[0])["question"] == rows(1, 60)[0]["Question"]


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


def test_every_run_keeps_what_it_was_made_with(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    config = train_config(model_dirs["gpt2"], data_file, tmp_path / "run")
    assert cli("train", write_yaml(tmp_path / "c.yaml", config), "--quiet") == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
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
