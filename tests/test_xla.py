"""torch_xla on the CPU (PJRT_DEVICE=CPU), in an environment of its own: requirements-tpu.txt.

PJRT_DEVICE=CPU python -m pytest -s tests/test_xla.py
"""

from __future__ import annotations

import math
import os
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_xla
from torch_xla.debug import metrics as xla_metrics

from conftest import Runner, lines_of, metrics_of, newest, process, weights_of
from extras import xla

torch_xla.device()  # before the first backward pass: autograd counts the devices only once


@pytest.fixture
def run(model_dirs: dict[str, Path], uneven: Path, tmp_path: Path) -> Runner:
    """On the device, where nothing else is said: `cpu` is PyTorch's own."""
    changes = {
        "data__on_tpu": True,
        "data__batch_size": 2,
        "trainer__params__accumulate_grad_batches": 2,
        "trainer__params__accelerator": "tpu",
        "trainer__checkpoint__every_n_train_steps": 4,
        "trainer__checkpoint__save_top_k": 9,
        "model_params__learning_rate": 1e-3,
        "model_params__do_compute_metrics": True,
        "model_params__val_generate_params": {"max_new_tokens": 4},
    }
    return Runner(model_dirs, uneven, tmp_path, **changes)


CPU = {"trainer__params__accelerator": "cpu"}


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
    kind: str, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiles = count_after_steps(monkeypatch, "CompileTime")
    start = counted("CompileTime")
    cpu, tpu = run("--quiet", model=kind, **CPU), run("--quiet", model=kind)
    for ours, theirs in zip(metrics_of(tpu), metrics_of(cpu), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    expected, found = weights_of(newest(cpu)), weights_of(newest(tpu))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    print(f"{kind}: graphs compiled after each step: {[count - start for count in compiles]}")
    # 12 steps in 2 epochs, with a validation, answers and checkpoints between them. The optimizer's
    # state is new in step 1; after the first validation nothing is new.
    assert len(compiles) == 12
    assert compiles[6] == compiles[11]


def test_a_step_is_one_graph(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    executions = count_after_steps(monkeypatch, "ExecuteTime")
    run("--quiet", trainer__params__val_check_interval=12)
    steps, graphs = len(executions[5:]), executions[-1] - executions[4]
    print(f"graphs run in {steps} steps of two micro-batches: {graphs}")
    assert abs(graphs - steps) <= 1  # an execution may be counted just after its step


def test_a_step_that_is_no_number_changes_nothing(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three steps is made infinite: weights after it are those of before."""
    original = torch.amp.GradScaler.scale
    factors = chain([1, 1, math.inf, math.inf], repeat(1))  # of the micro-batches, two a step

    def scale(self: Any, loss: torch.Tensor) -> Any:
        return original(self, loss * next(factors))

    monkeypatch.setattr(torch.amp.GradScaler, "scale", scale)
    directory = run("--quiet", trainer__params__max_epochs=1)
    bad_steps = [line["bad_steps"] for line in metrics_of(directory) if "grad_norm" in line]
    assert bad_steps[-1] == 1
    assert all(value.isfinite().all() for value in weights_of(newest(directory)).values())


def test_a_run_is_resumed_to_the_bit_and_moves_between_devices(run: Runner) -> None:
    whole = run("--quiet")
    expected = weights_of(newest(whole))
    for device, tolerance in (("tpu", 0.0), ("cpu", 1e-4)):
        resumed = run(
            "--quiet",
            trainer__ckpt_path=str(whole / "step-000004"),
            trainer__params__accelerator=device,
        )
        for key, value in weights_of(newest(resumed)).items():
            torch.testing.assert_close(value, expected[key], rtol=tolerance, atol=tolerance)


def test_answers_are_those_of_the_cpu(run: Runner) -> None:
    cpu, tpu = (
        lines_of(
            run.test(
                "--quiet",
                name=name,
                tpu=name == "tpu",
                data__max_prompt_length=40,
                generate_params={"max_new_tokens": 6, "no_repeat_ngram_size": 2},
                test_params__save_steps=3,
                test_params__batch_size=2,
            )
        )
        for name in ("cpu", "tpu")
    )
    for ours, theirs in zip(tpu, cpu, strict=True):
        assert ours.pop("reference_nll") == pytest.approx(theirs.pop("reference_nll"), abs=1e-3)
        assert ours == theirs


def test_bf16_autocast_runs_and_float16_is_refused(run: Runner, capsys: Any) -> None:
    run(code=2, trainer__params__precision="16")
    assert "TPUs compute in bf16" in capsys.readouterr().err
    directory = run("--quiet", trainer__params__precision="bf16", trainer__params__max_steps=2)
    assert weights_of(newest(directory))["transformer.ln_f.weight"].dtype == torch.float32


def test_one_process_spreads_a_batch_over_several_devices(run: Runner, tmp_path: Path) -> None:
    """Two devices with batches of 1 train as one CPU with batches of 2."""
    alone = run("--quiet", **CPU)
    environment = os.environ | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}
    path = run.file(name="both", data__batch_size=1)
    result = process("train", path, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "1 sample x 2 batches x 2 ranks = 4 samples" in result.stdout
    for ours, theirs in zip(metrics_of(tmp_path / "both"), metrics_of(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
