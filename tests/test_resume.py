"""Resuming: bitwise the run that was never stopped, and clear refusals of everything else."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, MixtralConfig

import checkpoint
import evaluate
from checkpoint import State, Step
from conftest import (
    Runner,
    metrics_of,
    newest,
    process,
    rows,
    save,
    tiny_config,
    weights_of,
    write_data,
)


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
        for private in ("seconds", "window_seconds", "wandb_id"):
            state["state"].pop(private)
        state.pop("metrics_size")  # timings have different numbers of digits
        state.pop("config")
    assert same(states[0], states[1])


TERMINATED = 128 + signal.SIGTERM  # the exit code of a run that was stopped


@contextmanager
def stop_after(steps: int, number: int = signal.SIGTERM) -> Iterator[None]:
    """Send this process a signal in the middle of a step, as a batch system would."""
    original = State.count

    def signalling(state: State, step: Step) -> None:
        if state.position + 1 == steps:
            os.kill(os.getpid(), number)
        original(state, step)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(State, "count", signalling)
        yield


@pytest.fixture(scope="module")
def dropout_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    torch.manual_seed(1)
    config = tiny_config("gpt_neo", len(tokenizer), dropout=0.2)
    model = AutoModelForCausalLM.from_config(config)
    return save(model, tokenizer, tmp_path_factory.mktemp("dropout-model"))


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
        made = family_config(kind, len(tokenizer))
        if kind == "bf16":
            torch.manual_seed(1)
            made = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
        directories[kind] = save(made, tokenizer, tmp_path_factory.mktemp("families") / kind)
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
    case: str, run: Runner, dropout_model: Path
) -> None:
    stop, changes = CASES[case]
    whole = run(model=dropout_model, **changes)
    with stop_after(stop):
        parts = run(model=dropout_model, code=TERMINATED, **changes)
    assert newest(parts).name == f"step-{stop:06d}"
    run.resume(parts)
    assert_same_run(whole, parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_resumes_bitwise(family: str, run: Runner, families: dict[str, Path]) -> None:
    """Stopped twice: between two validations that sample, and where one of them is due."""
    changes = SAMPLED | {
        "model_params__from_scratch": True,
        "trainer__params__val_check_interval": 2,
        "trainer__params__max_steps": 8,
    }
    whole = run(model=families[family], **changes)
    with stop_after(3):
        parts = run(model=families[family], code=TERMINATED, **changes)
    with stop_after(4):
        run.resume(parts, code=TERMINATED)
    run.resume(parts)
    assert unaligned(newest(parts)), "this test sees more with other sizes"
    assert_same_run(whole, parts)


def test_stopping_again_and_again_changes_nothing(run: Runner, dropout_model: Path) -> None:
    changes = SAMPLED | {"trainer__params__val_check_interval": 3}
    interrupted = 128 + signal.SIGINT
    whole = run(model=dropout_model, **changes)
    with stop_after(1, signal.SIGINT):
        parts = run(model=dropout_model, code=interrupted, **changes)
    for step in range(2, 12):
        with stop_after(step, signal.SIGINT):
            run.resume(parts, code=interrupted)
    run.resume(parts)
    assert_same_run(whole, parts)


@pytest.mark.parametrize("where", ["summed_loss", "generate"])
def test_a_signal_during_validation_or_generation_loses_nothing(
    where: str, run: Runner, dropout_model: Path, monkeypatch: Any
) -> None:
    import evaluate

    changes = SAMPLED | {"trainer__params__num_sanity_val_steps": 0}
    whole = run(model=dropout_model, **changes)
    original = getattr(evaluate, where)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, where, interrupted)
        parts = run(model=dropout_model, code=TERMINATED, **changes)
    # Stopped in the validation after step 6: it is not logged yet, and done when resumed.
    assert not any("val_loss" in line for line in metrics_of(parts))
    run.resume(parts)
    assert_same_run(whole, parts)


@pytest.mark.parametrize("metric, best", [("val_loss", 2), ("val_token_f1", 1)])
def test_the_best_score_is_remembered(
    metric: str, best: int, run: Runner, monkeypatch: Any
) -> None:
    """A resumed run that gets worse, and ties, must leave `best` as it is."""
    scores = iter([3.0, 1.0, 2.0, 2.0, 1.0, 3.0])
    monkeypatch.setattr(evaluate, "validate", lambda *_: ({metric: next(scores)}, []))
    with stop_after(3):
        directory = run(
            code=TERMINATED,
            model_params__do_compute_metrics=metric != "val_loss",
            trainer__checkpoint__log_obg=metric,
            trainer__checkpoint__mode="min" if metric == "val_loss" else "max",
            trainer__params__max_epochs=1,
            trainer__params__val_check_interval=1,
        )
    run.resume(directory)
    assert next(scores, None) is None  # all of them were seen
    assert json.loads((directory / "best" / "sft.json").read_text())["global_step"] == best
    state = torch.load(newest(directory) / "trainer_state.pt", weights_only=True)["state"]
    assert state["best_step"] == best


@pytest.fixture
def stopped(run: Runner, dropout_model: Path) -> Path:
    """The directory of a run that was stopped after step 5."""
    with stop_after(5):
        return run(model=dropout_model, code=TERMINATED)


def test_a_run_that_has_come_far_resumes_at_once(stopped: Path) -> None:
    """Going through the data of a billion steps again would exceed the process's two minutes."""
    far = 10**9

    def write(directory: Path) -> None:
        without = shutil.ignore_patterns("manifest.json")
        shutil.copytree(newest(stopped), directory, ignore=without, dirs_exist_ok=True)
        content = torch.load(directory / "trainer_state.pt", weights_only=True)
        content["state"] |= {"position": far, "global_step": far}
        torch.save(content, directory / "trainer_state.pt")

    checkpoint.save(stopped, checkpoint.step_name(far), write)
    goal = ["trainer.params.max_epochs=-1", f"trainer.params.max_steps={far + 2}"]
    result = process("train", f"{stopped}.yaml", "trainer.ckpt_path=last", *goal)
    assert result.returncode == 0, result.stderr
    steps = [line["step"] for line in metrics_of(stopped) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, far + 1, far + 2]


def test_a_moved_run_directory_still_resumes(
    stopped: Path, run: Runner, dropout_model: Path, data_file: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(stopped, elsewhere / "moved")
    data = Path(shutil.move(data_file, elsewhere / "facts.json"))
    run("trainer.ckpt_path=last", model=dropout_model, data=data, name="elsewhere/moved")
    assert newest(elsewhere / "moved").name == "step-000012"


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
    override: str, named: str, stopped: Path, run: Runner, capsys: Any
) -> None:
    before = sorted(p.name for p in stopped.iterdir())
    run.resume(stopped, override, code=2)
    message = capsys.readouterr().err
    assert named in message and "cannot be resumed" in message
    assert sorted(p.name for p in stopped.iterdir()) == before


def test_another_model_is_refused(
    stopped: Path, run: Runner, model_dirs: dict[str, Path], capsys: Any
) -> None:
    run.resume(stopped, f"model_name={model_dirs['gpt2']}", code=2)
    assert "model: the checkpoint has" in capsys.readouterr().err


def test_another_measure_of_the_best_starts_anew(stopped: Path, run: Runner) -> None:
    run.resume(
        stopped,
        "trainer.checkpoint.log_obg=val_token_f1",
        "trainer.checkpoint.mode=max",
        "model_params.do_compute_metrics=true",
        "model_params.val_generate_params.max_new_tokens=3",
    )
    details = json.loads((stopped / "best" / "sft.json").read_text())
    assert details["best_val_token_f1"] <= 1 and details["global_step"] > 5


def test_a_branch_has_a_best_and_a_wandb_run_of_its_own(
    stopped: Path, run: Runner, tmp_path: Path
) -> None:
    run.resume(stopped)
    branch = tmp_path / "branch"
    older = f"trainer.ckpt_path={stopped / 'step-000005'}"
    run.resume(stopped, older, f"trainer.checkpoint.dirpath={branch}")
    assert (branch / "best" / "model.safetensors").exists()
    states = [newest(directory) / "trainer_state.pt" for directory in (stopped, branch)]
    ids = {torch.load(state, weights_only=True)["state"]["wandb_id"] for state in states}
    assert len(ids) == 2


def test_two_processes_do_not_train_in_one_directory(
    stopped: Path, run: Runner, capsys: Any
) -> None:
    with checkpoint.locked(stopped):
        run.resume(stopped, code=2)
    assert "another process is training in this directory" in capsys.readouterr().err
    run.resume(stopped)


def test_another_data_file_is_refused(
    stopped: Path, run: Runner, data_file: Path, capsys: Any
) -> None:
    write_data(data_file, train=rows(22, offset=1), val=rows(6, offset=40))
    run.resume(stopped, code=2)
    assert "data: the checkpoint has" in capsys.readouterr().err


def test_what_the_user_may_change_wins_and_is_named(
    stopped: Path, run: Runner, capsys: Any
) -> None:
    run.resume(stopped, "trainer.params.max_epochs=3", "trainer.params.log_every_n_steps=2")
    output = capsys.readouterr().out
    assert "trainer.params.max_epochs: was 2, goes on with 3" in output
    assert "trainer.params.log_every_n_steps: was 1, goes on with 2" in output
    assert newest(stopped).name == "step-000018"


def test_the_same_step_in_other_micro_batches_may_go_on(stopped: Path, run: Runner) -> None:
    run.resume(stopped, "data.batch_size=2", "trainer.params.accumulate_grad_batches=2")


def test_a_new_run_does_not_overwrite_an_old_one(
    stopped: Path, run: Runner, dropout_model: Path, capsys: Any
) -> None:
    run(model=dropout_model, name=stopped.name, code=2)
    message = capsys.readouterr().err
    assert "already holds a run (step-000005)" in message
    assert "trainer.ckpt_path=last" in message


def test_an_older_checkpoint_needs_another_directory(
    stopped: Path, run: Runner, tmp_path: Path, capsys: Any
) -> None:
    run.resume(stopped)
    older = f"trainer.ckpt_path={stopped / 'step-000005'}"
    run.resume(stopped, older, code=2)
    assert "older than step-000012" in capsys.readouterr().err
    branch = tmp_path / "branch"
    run.resume(stopped, older, f"trainer.checkpoint.dirpath={branch}")
    assert same(weights_of(stopped / "step-000012"), weights_of(newest(branch)))


def test_resuming_a_finished_run_changes_nothing(stopped: Path, run: Runner) -> None:
    run.resume(stopped)
    before, lines = weights_of(newest(stopped)), metrics_of(stopped)
    run.resume(stopped)
    assert same(before, weights_of(newest(stopped)))
    assert metrics_of(stopped) == lines
