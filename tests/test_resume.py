"""Resuming: bitwise the run that was never stopped, and clear refusals of everything else."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import (
    metrics_of,
    newest,
    rows,
    tiny_config,
    train,
    train_config,
    weights_of,
)
from run import Run


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested state."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimizer, generators, counters, best model and every logged metric."""
    assert metrics_of(a) == metrics_of(b)
    assert newest(a).name == newest(b).name
    for name in (newest(a).name, "best"):
        assert same(weights_of(a / name), weights_of(b / name)), name
    states = [torch.load(newest(run) / "trainer_state.pt", weights_only=True) for run in (a, b)]
    for state in states:
        for private in ("seconds", "wandb_id"):
            state["state"].pop(private)
        state.pop("metrics_size")  # timings have different numbers of digits
        state.pop("config")
    assert same(states[0], states[1])


def stop_after(steps: int, monkeypatch: Any, number: int = signal.SIGTERM) -> None:
    """Send this process a signal in the middle of a step, as a batch system would."""
    original = Run.set_learning_rate

    def signalling(self: Run) -> float:
        if self.state.position + 1 == steps:
            os.kill(os.getpid(), number)
        return original(self)

    monkeypatch.setattr(Run, "set_learning_rate", signalling)


@pytest.fixture(scope="module")
def dropout_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("dropout-model")
    AutoModelForCausalLM.from_config(
        tiny_config("gpt_neo", len(tokenizer), dropout=0.2)
    ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


SAMPLED = {
    "model_params__do_compute_metrics": True,
    "model_params__val_generate_samples": 3,
    "model_params__val_generate_params": {"max_new_tokens": 4, "do_sample": True},
}
CASES = {
    "mid-epoch, with dropout": (2, {}),
    "at an epoch's end": (6, {}),
    "right after validation": (4, {"trainer__params__val_check_interval": 2}),
    "inside an accumulation window": (2, {"trainer__params__accumulate_grad_batches": 3}),
    "with freezing": (3, {"model_params__do_freeze": True, "model_params__freeze_attn": True}),
    "fp16 with its GradScaler": (3, {"trainer__params__precision": "16"}),
    "bf16-true": (3, {"trainer__params__precision": "bf16-true"}),
    "sampling in validation": (5, SAMPLED | {"trainer__params__val_check_interval": 2}),
    "sparse logging": (4, {"trainer__params__log_every_n_steps": 3}),
    "after the last step": (12, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_bitwise_the_undisturbed_one(
    case: str, dropout_model: Path, data_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    stop, changes = CASES[case]
    whole = train_config(dropout_model, data_file, tmp_path / "whole", **changes)
    parts = train_config(dropout_model, data_file, tmp_path / "parts", **changes)
    assert train(whole) == 0
    with monkeypatch.context() as patched:
        stop_after(stop, patched)
        assert train(parts) == 128 + signal.SIGTERM
    assert newest(tmp_path / "parts").name == f"step-{stop:06d}"
    assert train(parts, "trainer.ckpt_path=last") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_stopping_again_and_again_changes_nothing(
    dropout_model: Path, data_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    changes = SAMPLED | {"trainer__params__val_check_interval": 3}
    whole = train_config(dropout_model, data_file, tmp_path / "whole", **changes)
    parts = train_config(dropout_model, data_file, tmp_path / "parts", **changes)
    assert train(whole) == 0
    resume: list[str] = []
    for step in range(1, 12):
        with monkeypatch.context() as patched:
            stop_after(step, patched, signal.SIGINT)
            assert train(parts, *resume) == 128 + signal.SIGINT
        resume = ["trainer.ckpt_path=last"]
    assert train(parts, *resume) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("where", ["summed_loss", "generate"])
def test_a_signal_during_validation_or_generation_loses_nothing(
    where: str, dropout_model: Path, data_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    import evaluate

    changes = SAMPLED | {"trainer__params__num_sanity_val_steps": 0}
    whole = train_config(dropout_model, data_file, tmp_path / "whole", **changes)
    parts = train_config(dropout_model, data_file, tmp_path / "parts", **changes)
    assert train(whole) == 0
    original = getattr(evaluate, where)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, where, interrupted)
        assert train(parts) == 128 + signal.SIGTERM
    # Stopped in the validation after step 6: it is not logged yet, and done when resumed.
    assert not any("val_loss" in line for line in metrics_of(tmp_path / "parts"))
    assert train(parts, "trainer.ckpt_path=last") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_finding_the_position_replays_no_data(
    dropout_model: Path, data_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    import run as run_module

    config = train_config(dropout_model, data_file, tmp_path / "run")
    with monkeypatch.context() as patched:
        stop_after(10, patched)
        train(config)
    collated: list[int] = []
    original = run_module.collate

    def counting(samples: Any, part: Any, **kwargs: Any) -> Any:
        collated.append(len(part))
        return original(samples, part, **kwargs)

    monkeypatch.setattr(run_module, "collate", counting)
    assert train(config, "trainer.ckpt_path=last") == 0
    assert sum(collated) == 6  # the last two steps of the second epoch: 4 and 2 samples


def test_a_moved_run_directory_still_resumes(
    dropout_model: Path, data_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    config = train_config(dropout_model, data_file, tmp_path / "run")
    with monkeypatch.context() as patched:
        stop_after(5, patched)
        train(config)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "run", tmp_path / "elsewhere" / "moved")
    moved_data = shutil.move(data_file, tmp_path / "elsewhere" / "facts.json")
    config = train_config(dropout_model, moved_data, tmp_path / "elsewhere" / "moved")
    assert train(config, "trainer.ckpt_path=last") == 0
    assert newest(tmp_path / "elsewhere" / "moved").name == "step-000012"


@pytest.fixture
def stopped(
    dropout_model: Path, data_file: Path, tmp_path: Path, monkeypatch: Any
) -> dict[str, Any]:
    """The configuration of a run that was stopped after step 5."""
    config = train_config(dropout_model, data_file, tmp_path / "run")
    with monkeypatch.context() as patched:
        stop_after(5, patched)
        assert train(config) == 143
    return config


@pytest.mark.parametrize(
    "override, named",
    [
        ("data.batch_size=2", "x ranks: the checkpoint has 4, this run has 2"),
        ("data.max_length=60", "data.max_length: the checkpoint has 64, the configuration 60"),
        ("model_params.learning_rate=0.5", "model_params.learning_rate"),
        ("model_params.warmup_steps_per_cent=0", "model_params.warmup_steps_per_cent"),
        ("model_params.weight_decay=0.5", "model_params.weight_decay"),
        ("seed=9", "seed: the checkpoint has 1, the configuration 9"),
        ("trainer.params.precision=64", "trainer.params.precision"),
        ("trainer.params.overfit_batches=1", "trainer.params.overfit_batches"),
        ("data.group_by_length=false", "data.group_by_length"),
    ],
)
def test_what_would_change_the_meaning_of_the_state_is_refused(
    override: str, named: str, stopped: dict[str, Any], capsys: Any
) -> None:
    before = sorted(p.name for p in Path(stopped["trainer"]["checkpoint"]["dirpath"]).iterdir())
    assert train(stopped, "trainer.ckpt_path=last", override) == 2
    message = capsys.readouterr().err
    assert named in message and "cannot be resumed" in message
    after = sorted(p.name for p in Path(stopped["trainer"]["checkpoint"]["dirpath"]).iterdir())
    assert after == before


def test_another_model_is_refused(
    stopped: dict[str, Any], model_dirs: dict[str, Path], capsys: Any
) -> None:
    other = f"model_name={model_dirs['gpt2']}"
    assert train(stopped, "trainer.ckpt_path=last", other) == 2
    assert "model: the checkpoint has" in capsys.readouterr().err


def test_another_measure_of_the_best_starts_anew(stopped: dict[str, Any], tmp_path: Path) -> None:
    overrides = [
        "trainer.checkpoint.log_obg=val_token_f1",
        "trainer.checkpoint.mode=max",
        "model_params.do_compute_metrics=true",
        "model_params.val_generate_params.max_new_tokens=3",
    ]
    assert train(stopped, "trainer.ckpt_path=last", *overrides) == 0
    details = json.loads((tmp_path / "run" / "best" / "sft.json").read_text())
    assert details["best_val_token_f1"] <= 1 and details["global_step"] > 5


def test_a_branch_has_a_best_and_a_wandb_run_of_its_own(
    stopped: dict[str, Any], tmp_path: Path
) -> None:
    assert train(stopped, "trainer.ckpt_path=last") == 0
    branch = f"trainer.checkpoint.dirpath={tmp_path / 'branch'}"
    older = f"trainer.ckpt_path={tmp_path / 'run' / 'step-000005'}"
    assert train(stopped, older, branch) == 0
    assert (tmp_path / "branch" / "best" / "model.safetensors").exists()
    ids = {
        torch.load(newest(tmp_path / run) / "trainer_state.pt", weights_only=True)["state"][
            "wandb_id"
        ]
        for run in ("run", "branch")
    }
    assert len(ids) == 2


def test_two_processes_do_not_train_in_one_directory(
    stopped: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    import checkpoint

    held = checkpoint.lock(tmp_path / "run")
    assert train(stopped, "trainer.ckpt_path=last") == 2
    assert "another process is training in this directory" in capsys.readouterr().err
    held.close()
    assert train(stopped, "trainer.ckpt_path=last") == 0


def test_another_data_file_is_refused(
    stopped: dict[str, Any], data_file: Path, capsys: Any
) -> None:
    data_file.write_text(json.dumps({"train": rows(22, offset=1), "val": rows(6, offset=40)}))
    assert train(stopped, "trainer.ckpt_path=last") == 2
    assert "data: the checkpoint has" in capsys.readouterr().err


def test_what_the_user_may_change_wins_and_is_named(stopped: dict[str, Any], capsys: Any) -> None:
    import conftest

    path = Path(stopped["trainer"]["checkpoint"]["dirpath"]).with_suffix(".yaml")
    overrides = ["trainer.params.max_epochs=3", "trainer.params.log_every_n_steps=2"]
    assert conftest.cli("train", path, "trainer.ckpt_path=last", *overrides) == 0
    output = capsys.readouterr().out
    assert "trainer.params.max_epochs: was 2, goes on with 3" in output
    assert "trainer.params.log_every_n_steps: was 1, goes on with 2" in output
    assert newest(Path(stopped["trainer"]["checkpoint"]["dirpath"])).name == "step-000018"


def test_the_same_step_in_other_micro_batches_may_go_on(stopped: dict[str, Any]) -> None:
    overrides = ["data.batch_size=2", "trainer.params.accumulate_grad_batches=2"]
    assert train(stopped, "trainer.ckpt_path=last", *overrides) == 0


def test_a_new_run_does_not_overwrite_an_old_one(stopped: dict[str, Any], capsys: Any) -> None:
    assert train(stopped) == 2
    message = capsys.readouterr().err
    assert "already holds a run (step-000005)" in message
    assert "trainer.ckpt_path=last" in message


def test_an_older_checkpoint_needs_another_directory(
    stopped: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    assert train(stopped, "trainer.ckpt_path=last") == 0
    older = tmp_path / "run" / "step-000005"
    assert train(stopped, f"trainer.ckpt_path={older}") == 2
    assert "older than step-000012" in capsys.readouterr().err
    branch = f"trainer.checkpoint.dirpath={tmp_path / 'branch'}"
    assert train(stopped, f"trainer.ckpt_path={older}", branch) == 0
    assert same(
        weights_of(tmp_path / "run" / "step-000012"), weights_of(newest(tmp_path / "branch"))
    )


def test_resuming_a_finished_run_changes_nothing(stopped: dict[str, Any], tmp_path: Path) -> None:
    assert train(stopped, "trainer.ckpt_path=last") == 0
    before = weights_of(newest(tmp_path / "run"))
    lines = metrics_of(tmp_path / "run")
    assert train(stopped, "trainer.ckpt_path=last") == 0
    assert same(before, weights_of(newest(tmp_path / "run")))
    assert metrics_of(tmp_path / "run") == lines
