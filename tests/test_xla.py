"""torch_xla on the CPU (PJRT_DEVICE=CPU), in an environment of its own: requirements-tpu.txt.

PJRT_DEVICE=CPU python -m pytest -s tests/test_xla.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_xla
from torch_xla.debug import metrics as xla_metrics

from conftest import cli, metrics_of, newest, process, train_config, weights_of, write_yaml
from extras import xla

torch_xla.device()  # before the first backward pass: autograd counts the devices only once


def config(model: Path, data: Path, run: Path, accelerator: str, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "data__on_tpu": True,
        "data__batch_size": 2,
        "trainer__params__accumulate_grad_batches": 2,
        "trainer__params__accelerator": accelerator,
        "trainer__checkpoint__every_n_train_steps": 4,
        "trainer__checkpoint__save_top_k": 9,
        "model_params__learning_rate": 1e-3,
        "model_params__do_compute_metrics": True,
        "model_params__val_generate_params": {"max_new_tokens": 4},
    }
    return write_yaml(
        run.with_suffix(".yaml"), train_config(model, data, run, **(settings | changes))
    )


def counted(metric: str) -> int:
    found = xla_metrics.metric_data(metric)
    return int(found[0]) if found else 0


def count_after_steps(monkeypatch: pytest.MonkeyPatch, metric: str) -> list[int]:
    """What XLA's metric has counted after each step from now on."""
    counts: list[int] = []
    original = xla.XlaDevice.read

    def read(self: Any, *scalars: Any) -> Any:
        result = original(self, *scalars)
        counts.append(counted(metric))
        return result

    monkeypatch.setattr(xla.XlaDevice, "read", read)
    return counts


@pytest.mark.parametrize("kind", ["gpt_neo", "llama"])
def test_xla_trains_as_the_cpu_does_and_stops_compiling(
    model_dirs: dict[str, Path],
    uneven: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    compiles = count_after_steps(monkeypatch, "CompileTime")
    start = counted("CompileTime")
    runs = {name: tmp_path / name for name in ("cpu", "tpu")}
    for name, run in runs.items():
        assert cli("train", config(model_dirs[kind], uneven, run, name), "--quiet") == 0
    for ours, theirs in zip(metrics_of(runs["tpu"]), metrics_of(runs["cpu"]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    expected = weights_of(newest(runs["cpu"]))
    found = weights_of(newest(runs["tpu"]))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    print(f"{kind}: graphs compiled after each step: {[count - start for count in compiles]}")
    # 12 steps in 2 epochs, with a validation, answers and checkpoints between them. The optimizer's
    # state is new in step 1; after the first validation nothing is new.
    assert len(compiles) == 12
    assert compiles[6] == compiles[11]


def test_a_step_is_one_graph(
    model_dirs: dict[str, Path], uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executions = count_after_steps(monkeypatch, "ExecuteTime")
    path = config(model_dirs["gpt_neo"], uneven, tmp_path / "run", "tpu")
    assert cli("train", path, "trainer.params.val_check_interval=12", "--quiet") == 0
    steps, run = len(executions[5:]), executions[-1] - executions[4]
    print(f"graphs run in {steps} steps of two micro-batches: {run}")
    assert abs(run - steps) <= 1  # an execution may be counted just after its step


def test_a_step_that_is_no_number_changes_nothing(
    model_dirs: dict[str, Path], uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three steps is made infinite: weights after it are those of before."""
    original = torch.amp.GradScaler.scale
    seen = [0]

    def scale(self: Any, loss: torch.Tensor) -> Any:
        seen[0] += 1
        return original(self, loss * float("inf") if 3 <= seen[0] < 5 else loss)

    monkeypatch.setattr(torch.amp.GradScaler, "scale", scale)
    path = config(model_dirs["gpt_neo"], uneven, tmp_path / "run", "tpu")
    assert cli("train", path, "trainer.params.max_epochs=1", "--quiet") == 0
    lines = metrics_of(tmp_path / "run")
    assert [line["bad_steps"] for line in lines if "grad_norm" in line][-1] == 1
    assert all(value.isfinite().all() for value in weights_of(newest(tmp_path / "run")).values())


def test_a_run_is_resumed_to_the_bit_and_moves_between_devices(
    model_dirs: dict[str, Path], uneven: Path, tmp_path: Path
) -> None:
    model = model_dirs["gpt_neo"]
    whole = tmp_path / "whole"
    assert cli("train", config(model, uneven, whole, "tpu"), "--quiet") == 0
    expected = weights_of(newest(whole))
    for name, tolerance in (("tpu", 0.0), ("cpu", 1e-4)):
        run = tmp_path / f"on-{name}"
        resumed = config(model, uneven, run, name, trainer__ckpt_path=str(whole / "step-000004"))
        assert cli("train", resumed, "--quiet") == 0
        for key, value in weights_of(newest(run)).items():
            torch.testing.assert_close(value, expected[key], rtol=tolerance, atol=tolerance)


def test_answers_are_those_of_the_cpu(
    model_dirs: dict[str, Path], uneven: Path, tmp_path: Path
) -> None:
    logs = []
    for name in ("cpu", "tpu"):
        logs.append(tmp_path / f"{name}.jsonl")
        content = {
            "tpu": name == "tpu",
            "data": {"data_dir": str(uneven), "max_prompt_length": 40},
            "generate_params": {"max_new_tokens": 6, "no_repeat_ngram_size": 2},
            "model_name": str(model_dirs["gpt_neo"]),
            "test_params": {"log_file": str(logs[-1]), "save_steps": 3, "batch_size": 2},
        }
        assert cli("test", write_yaml(tmp_path / f"{name}.yaml", content), "--quiet") == 0
    cpu, tpu = ([json.loads(line) for line in log.read_text().splitlines()] for log in logs)
    for ours, theirs in zip(tpu, cpu, strict=True):
        assert ours.pop("reference_nll") == pytest.approx(theirs.pop("reference_nll"), abs=1e-3)
        assert ours == theirs


def test_bf16_autocast_runs_and_float16_is_refused(
    model_dirs: dict[str, Path], uneven: Path, tmp_path: Path, capsys: Any
) -> None:
    path = config(model_dirs["gpt_neo"], uneven, tmp_path / "run", "tpu")
    assert cli("train", path, "trainer.params.precision=16") == 2
    assert "TPUs compute in bf16" in capsys.readouterr().err
    overrides = ("trainer.params.precision=bf16", "trainer.params.max_steps=2")
    assert cli("train", path, *overrides, "--quiet") == 0
    assert weights_of(newest(tmp_path / "run"))["transformer.ln_f.weight"].dtype == torch.float32


def test_one_process_spreads_a_batch_over_several_devices(
    model_dirs: dict[str, Path], uneven: Path, tmp_path: Path
) -> None:
    """Two devices with batches of 1 train as one CPU with batches of 2."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert cli("train", config(model_dirs["gpt_neo"], uneven, alone, "cpu"), "--quiet") == 0
    spread = config(model_dirs["gpt_neo"], uneven, both, "tpu", data__batch_size=1)
    environment = os.environ | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}
    result = process("train", spread, env=environment)
    assert result.returncode == 0, result.stderr
    assert "1 sample x 2 batches x 2 ranks = 4 samples" in result.stdout
    for ours, theirs in zip(metrics_of(both), metrics_of(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
