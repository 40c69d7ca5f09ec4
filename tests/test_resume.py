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
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, MixtralConfig

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


FAMILIES = ("gpt_neo", "gpt2", "llama", "bf16", "mamba", "moe")


def family_config(kind: str, vocab_size: int) -> Any:
    """Sizes with which `unaligned` is true; attention and feed-forward are wide enough to show."""
    common: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    if kind in ("gpt_neo", "gpt2"):
        config = tiny_config(kind, vocab_size, dropout=0.2)
        config.hidden_size = 64  # GPT-2 calls it n_embd, and knows this name as well
        return config
    if kind == "mamba":  # has no dropout
        return MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=3, **common)
    common |= {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attention_dropout": 0.2,
    }
    if kind == "moe":
        return MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **common)
    return LlamaConfig(tie_word_embeddings=kind == "bf16", **common)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """A directory for each of FAMILIES; to be used with model_params.from_scratch.

    A run begins with weights that torch has made, or converted from bfloat16, and goes on with
    weights from a file. Kernels may round differently where these lie differently in memory.
    """
    directories = {}
    for kind in FAMILIES:
        directories[kind] = tmp_path_factory.mktemp("families") / kind
        config = family_config(kind, len(tokenizer))
        if kind == "bf16":
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(directories[kind])
        else:
            config.save_pretrained(directories[kind])
        tokenizer.save_pretrained(directories[kind])
    return directories


def unaligned(directory: Path) -> bool:
    """Whether weights begin in their file where no allocator would put them."""
    content = (directory / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    return any((8 + size + entry["data_offsets"][0]) % 16 for entry in header.values())


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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_resumes_bitwise(
    family: str, families: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Stopped twice: between two validations that sample, and where one of them is due."""
    changes = SAMPLED | {
        "model_params__from_scratch": True,
        "trainer__params__val_check_interval": 2,
        "trainer__params__max_steps": 8,
    }
    whole = train_config(families[family], data_file, tmp_path / "whole", **changes)
    parts = train_config(families[family], data_file, tmp_path / "parts", **changes)
    assert train(whole) == 0
    resume: list[str] = []
    for step in (3, 4):
        with monkeypatch.context() as patched:
            stop_after(step, patched)
            assert train(parts, *resume) == 128 + signal.SIGTERM
        resume = ["trainer.ckpt_path=last"]
    assert train(parts, *resume) == 0
    assert unaligned(newest(tmp_path / "parts")), "this test sees more with other sizes"
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


@pytest.mark.parametrize("metric, best", [("val_loss", 2), ("val_token_f1", 1)])
def test_the_best_score_is_remembered(
    metric: str,
    best: int,
    dropout_model: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """A resumed run that gets worse, and ties, must leave `best` as it is."""
    import run as run_module

    scores = iter([3.0, 1.0, 2.0, 2.0, 1.0, 3.0])
    monkeypatch.setattr(run_module, "validate", lambda *_: ({metric: next(scores)}, []))
    config = train_config(
        dropout_model,
        data_file,
        tmp_path / "run",
        model_params__do_compute_metrics=metric != "val_loss",
        trainer__checkpoint__log_obg=metric,
        trainer__checkpoint__mode="min" if metric == "val_loss" else "max",
        trainer__params__max_epochs=1,
        trainer__params__val_check_interval=1,
    )
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        assert train(config) == 128 + signal.SIGTERM
    assert train(config, "trainer.ckpt_path=last") == 0
    assert next(scores, None) is None  # all of them were seen
    assert json.loads((tmp_path / "run" / "best" / "sft.json").read_text())["global_step"] == best
    state = torch.load(newest(tmp_path / "run") / "trainer_state.pt", weights_only=True)["state"]
    assert state["best_step"] == best


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
