"""The training loop: one test for each key that steers it, and the exact loss of a step."""

from __future__ import annotations

import json
import math
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import evaluate
import sft
from conftest import (
    KINDS,
    Runner,
    item,
    metrics_of,
    newest,
    record_saves,
    rows,
    save,
    set_up,
    tiny_config,
    weights_of,
    write_data,
)
from data import Batch, Conversation, Encoder, collate, prepare_train
from device import Device
from model import AnswerModel


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_of(run) if "loss" in line]


def validations_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_of(run) if "val_loss" in line]


SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.fixture(scope="module")
def split_runs(
    model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, int], Path]:
    """The same run with steps of 8 samples cut in four ways; 22 samples: the last step has 6."""
    base = tmp_path_factory.mktemp("splits")
    data = write_data(base / "data.json", train=rows(22), val=rows(5, offset=40))
    run = Runner(model_dirs, data, base)
    return {
        (batch_size, batches): run(
            data__batch_size=batch_size,
            trainer__params__accumulate_grad_batches=batches,
            trainer__params__precision="64",
        )
        for batch_size, batches in SPLITS
    }


def test_the_split_of_a_step_changes_nothing(split_runs: dict[tuple[int, int], Path]) -> None:
    reference = steps_of(split_runs[8, 1])
    assert len(reference) == 6
    for split in SPLITS[1:]:
        for ours, theirs in zip(steps_of(split_runs[split]), reference, strict=True):
            for name in ("loss", "grad_norm", "lr"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-10), (split, name)
        weights = weights_of(newest(split_runs[split]))
        for name, value in weights_of(newest(split_runs[8, 1])).items():
            assert torch.allclose(weights[name], value, rtol=1e-8, atol=1e-12), (split, name)


def test_validation_loss_does_not_depend_on_its_batch_size(
    split_runs: dict[tuple[int, int], Path],
) -> None:
    losses = [validations_of(split_runs[split])[-1]["val_loss"] for split in SPLITS]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-10)


def test_the_run_equals_a_plain_loop_around_transformers(
    run: Runner, model_dirs: dict[str, Path]
) -> None:
    """An independent reimplementation: whole batch, plain loss, torch's AdamW and clipping."""
    changes: dict[str, Any] = {
        "model": "llama",
        "data__batch_size": 3,
        "model_params__weight_decay": 0.1,
        "model_params__adam_betas": [0.8, 0.95],
        "trainer__params__accumulate_grad_batches": 2,
        "trainer__params__gradient_clip_val": 0.5,
        "trainer__params__precision": "64",
    }
    directory = run(**changes)
    parts = set_up(run.config(**changes))
    samples, steps = parts.splits.train, parts.plan.steps(parts.splits.train, 0)
    model = AutoModelForCausalLM.from_pretrained(model_dirs["llama"], dtype=torch.float64)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95))
    total = parts.plan.total_steps
    warmup = math.ceil(0.1 * total)
    for step, line in enumerate(steps_of(directory)):
        items = [item(samples, int(i)) for i in next(steps)]
        logits, labels = [], []
        for one in items:
            output = model(torch.tensor([one["input_ids"]])).logits[0, :-1]
            logits.append(output)
            labels.append(torch.tensor(one["labels"][1:]))
        loss = F.cross_entropy(torch.cat(logits), torch.cat(labels))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        rate = (step + 1) / warmup if step < warmup else (total - step) / (total - warmup)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate
        optimizer.step()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-7)
        assert line["lr"] == pytest.approx(1e-2 * rate)
    weights = weights_of(newest(directory))
    for name, parameter in model.named_parameters():
        # torch clips by norm + 1e-6, as we do; AdamW's rounding is what remains.
        assert torch.allclose(weights[name], parameter, rtol=1e-6, atol=1e-9), name


def test_dropout_is_on_in_every_step_and_off_in_every_validation(
    run: Runner, tmp_path: Path, tokenizer: Any
) -> None:
    """A plain loop around transformers draws the same masks; without dropout, losses differ."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2", len(tokenizer), dropout=0.2))
    changes: dict[str, Any] = {
        "model": save(model, tokenizer, tmp_path / "model"),
        "data__batch_size": 1,  # padding would draw as well
        "model_params__weight_decay": 0.0,
        "trainer__params__gradient_clip_val": None,
        "trainer__params__max_steps": 6,
        "trainer__params__num_sanity_val_steps": 0,  # it would leave dropout on behind it
        "trainer__params__precision": "64",
        "trainer__params__val_check_interval": 2,
    }
    directory = run(**changes)
    lines = steps_of(directory)
    validations = {line["step"]: line["val_loss"] for line in validations_of(directory)}
    assert list(validations) == [2, 4, 6]
    config = run.config(**changes)
    parts = set_up(config)
    samples, val = parts.splits.train, parts.splits.val
    steps = parts.plan.steps(samples, 0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)

    def summed_loss(one: dict[str, Any], dropout: bool) -> torch.Tensor:
        logits = model.train(dropout)(torch.tensor([one["input_ids"]])).logits[0, :-1]
        return F.cross_entropy(logits, torch.tensor(one["labels"][1:]), reduction="sum")

    torch.manual_seed(config["seed"])
    for step, line in enumerate(lines, start=1):
        i = int(next(steps)[0])
        one, targets = item(samples, i), int(samples.target_lengths[i])
        assert line["loss"] != pytest.approx(summed_loss(one, False).item() / targets, rel=1e-5)
        loss = summed_loss(one, dropout=True) / targets
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = line["lr"]
        optimizer.step()
        if step in validations:
            losses = [summed_loss(item(val, i), False).item() for i in range(len(val))]
            mean = sum(losses) / int(val.target_lengths.sum())
            assert validations[step] == pytest.approx(mean, rel=1e-9)


def changed(run: Runner, path: str, value: Any) -> bool:
    """Whether a key changes the trained weights."""
    once = {"trainer__params__max_epochs": 1}
    a, b = (weights_of(newest(run(**(once | change)))) for change in ({}, {path: value}))
    return any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "path, value",
    [
        ("data__batch_size", 2),
        ("data__max_length", 20),
        ("data__prompt_template", "Q: {question} A:"),
        ("data__group_by_length", False),
        ("model_params__adam_betas", [0.5, 0.9]),
        ("model_params__learning_rate", 1e-3),
        ("model_params__warmup_steps_per_cent", 0.9),
        ("model_params__weight_decay", 0.5),
        ("seed", 2),
        ("trainer__params__accumulate_grad_batches", 2),
        ("trainer__params__gradient_clip_val", 0.01),
        ("trainer__params__max_epochs", 2),
        ("trainer__params__max_steps", 2),
        ("trainer__params__overfit_batches", 1),
        ("trainer__params__precision", "bf16-mixed"),
    ],
)
def test_keys_that_change_what_is_learned(path: str, value: Any, run: Runner) -> None:
    assert changed(run, path, value)


@pytest.mark.parametrize(
    "path, value",
    [
        ("trainer__params__num_sanity_val_steps", -1),
        ("trainer__params__val_check_interval", 1),
        ("trainer__params__log_every_n_steps", 3),
        ("trainer__checkpoint__every_n_train_steps", 1),
        ("model_params__do_compute_metrics", True),
        ("model_params__use_cache", False),
    ],
)
def test_keys_that_must_not_change_what_is_learned(path: str, value: Any, run: Runner) -> None:
    assert not changed(run, path, value)


def test_truncation_off_keeps_the_question_whole(run: Runner) -> None:
    counts = []
    for flag in (True, False):
        config = run.config(data__max_length=24, data__truncate_promt=flag)
        counts.append(set_up(config).splits.whole.counts)
    assert counts[0].question_cut > 0 and counts[0].dropped == 0
    assert counts[1].question_cut == 0 and counts[1].answer_cut + counts[1].dropped > 0


def test_clipping_off_is_null_or_zero(run: Runner) -> None:
    null, zero, huge = (
        weights_of(newest(run(trainer__params__gradient_clip_val=value)))
        for value in (None, 0.0, 1e9)
    )
    for name in null:
        assert torch.equal(null[name], zero[name]) and torch.equal(null[name], huge[name])


@pytest.mark.parametrize(
    "interval, expected",
    [
        (1.0, [6, 12]),
        (0.5, [3, 6, 9, 12]),
        (0.3, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        (0.4, [2, 4, 6, 8, 10, 12]),
        (1, list(range(1, 13))),
        (5, [5, 10, 12]),
        (100, [12]),
    ],
)
def test_validation_comes_when_the_interval_says(
    interval: float, expected: list[int], run: Runner
) -> None:
    """22 samples by 4 are 6 steps an epoch; the end of training is always validated."""
    directory = run(trainer__params__val_check_interval=interval)
    assert [line["step"] for line in validations_of(directory)] == expected


def test_logging_and_checkpoints_come_when_their_keys_say(run: Runner) -> None:
    directory = run(
        trainer__params__log_every_n_steps=5,
        trainer__checkpoint__every_n_train_steps=5,
        trainer__checkpoint__save_top_k=3,
    )
    assert [line["step"] for line in steps_of(directory)] == [5, 10, 12]
    names = sorted(p.name for p in directory.glob("step-*"))
    assert names == ["step-000005", "step-000010", "step-000012"]


def test_the_newest_two_checkpoints_are_kept(run: Runner) -> None:
    directory = run(trainer__checkpoint__every_n_train_steps=2)
    names = sorted(p.name for p in directory.iterdir() if p.is_dir())
    assert names == ["best", "step-000010", "step-000012"]


def test_a_logged_loss_is_the_mean_over_the_targets_since_the_last_one(run: Runner) -> None:
    each, third = (steps_of(run(trainer__params__log_every_n_steps=n)) for n in (1, 3))
    parts = set_up(run.config())
    samples, steps = parts.splits.train, parts.plan.steps(parts.splits.train, 0)
    targets = [int(samples.target_lengths[next(steps)].sum()) for _ in range(3)]
    mean = sum(line["loss"] * count for line, count in zip(each, targets)) / sum(targets)
    assert third[0]["loss"] == pytest.approx(mean, rel=1e-6)


def test_max_steps_ends_endless_epochs(run: Runner) -> None:
    directory = run(trainer__params__max_epochs=-1, trainer__params__max_steps=15)
    assert newest(directory).name == "step-000015"
    assert steps_of(directory)[-1]["lr"] > 0


@pytest.mark.parametrize("value, count", [(2, 8), (0.5, 11), (1.0, 22)])
def test_overfitting_uses_the_same_unshuffled_subset_for_both(
    value: float, count: int, run: Runner
) -> None:
    parts = set_up(run.config(trainer__params__overfit_batches=value))
    samples = parts.splits.train
    assert samples.rows.tolist() == list(range(1, count + 1))
    assert parts.splits.val is samples
    assert next(parts.plan.steps(samples, 0)).tolist() == [0, 1, 2, 3]


def test_without_a_val_split_some_of_train_is_held_out_and_never_of_test(
    run: Runner, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "split.json", train=rows(40), test=rows(5, offset=80))
    splits = set_up(run.config(data=data, data__val_fraction=0.25)).splits
    train_rows, val_rows = set(splits.train.rows.tolist()), set(splits.val.rows.tolist())
    assert len(val_rows) == 10 and not train_rows & val_rows
    assert train_rows | val_rows == set(range(1, 41))


def test_sanity_validation_takes_the_batches_of_its_key(run: Runner, monkeypatch: Any) -> None:
    asked: list[int | None] = []

    def spy(*args: Any) -> Any:
        asked.append(args[-1])
        return 1.0, 1

    monkeypatch.setattr(sft, "summed_loss", spy)
    for value in (0, 2, -1):
        parts = set_up(run.config(trainer__params__num_sanity_val_steps=value))
        sft.sanity_check(parts, print, lambda: False)
    assert asked == [2, None]


def test_metrics_on_generated_answers_select_the_best(run: Runner) -> None:
    directory = run(
        model_params__do_compute_metrics=True,
        model_params__val_generate_samples=4,
        model_params__val_generate_params={"max_new_tokens": 5},
        trainer__checkpoint__log_obg="val_token_f1",
        trainer__checkpoint__mode="max",
    )
    lines = validations_of(directory)
    names = "val_bleu val_rouge1 val_rouge2 val_rougeL val_exact_match val_token_f1".split()
    for line in lines:
        assert all(0 <= line[name] <= 1 for name in names)
    best = json.loads((directory / "best" / "sft.json").read_text())
    top = max(line["val_token_f1"] for line in lines)
    assert best["best_val_token_f1"] == top
    # Ties keep the earlier one.
    assert best["global_step"] == next(li["step"] for li in lines if li["val_token_f1"] == top)


@pytest.mark.parametrize("metric, written", [("val_loss", [2, 3]), ("val_token_f1", [2, 6])])
def test_best_is_the_lowest_loss_or_the_highest_score(
    metric: str, written: list[int], run: Runner, monkeypatch: Any
) -> None:
    """Values that fall and rise; a tie keeps the earlier one, and what is no number never wins."""
    scores = iter([math.nan, 3.0, 2.0, 2.0, -math.inf, 4.0, 4.0, math.inf, 3.0])
    monkeypatch.setattr(evaluate, "validate", lambda *_: ({metric: next(scores)}, []))
    names = record_saves(monkeypatch)
    directory = run(
        model_params__do_compute_metrics=metric == "val_token_f1",
        trainer__checkpoint__every_n_train_steps=1,
        trainer__checkpoint__log_obg=metric,
        trainer__checkpoint__mode="min" if metric == "val_loss" else "max",
        trainer__checkpoint__save_top_k=9,
        trainer__params__max_steps=9,
        trainer__params__val_check_interval=1,
    )
    # `best` is written before the checkpoint of its step.
    assert [int(b[5:]) for a, b in pairwise(names) if a == "best"] == written
    best = directory / "best"
    assert json.loads((best / "sft.json").read_text())["global_step"] == written[-1]
    weights = weights_of(directory / f"step-{written[-1]:06d}")
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(best).items())


def test_best_is_a_plain_model_directory(run: Runner) -> None:
    best = run(model="qwen2") / "best"
    assert not (best / "trainer_state.pt").exists()
    model = AutoModelForCausalLM.from_pretrained(best)
    assert not any(p.isnan().any() for p in model.parameters())
    assert "api" not in (best / "trainer.yaml").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_learns(kind: str, run: Runner) -> None:
    losses = [line["loss"] for line in steps_of(run(model=kind, trainer__params__max_epochs=8))]
    assert losses[-1] < 0.5 * losses[0]


def test_the_resolved_configuration_is_kept_and_printed_lines_tell_the_plan(
    run: Runner, capsys: Any
) -> None:
    directory = run(trainer__params__accumulate_grad_batches=2)
    output = capsys.readouterr().out
    assert "4 samples x 2 batches x 1 rank = 8 samples" in output
    assert "trainer.yaml (every value)" in output  # the resolved configuration, defaults and all
    assert "3 steps an epoch, 6 in all, 1 of them warm-up" in output
    assert "[[" in output and "22 kept" in output
    text = (directory / "trainer.yaml").read_text()
    assert "adam_betas" in text and "max_bad_steps" in text


def test_on_tpu_gives_every_batch_one_shape(run: Runner, monkeypatch: Any) -> None:
    from model import AnswerModel

    shapes: dict[bool, set[tuple[int, ...]]] = {False: set(), True: set()}
    original = AnswerModel.forward
    on_tpu = False

    def recording(self: Any, batch: Any) -> Any:
        shapes[on_tpu].add(tuple(batch.input_ids.shape) + tuple(batch.target_ids.shape))
        return original(self, batch)

    monkeypatch.setattr(AnswerModel, "forward", recording)
    monkeypatch.setattr("sft.check_trainable", lambda model: None)  # on the CPU, before
    losses = []
    for on_tpu in (False, True):
        losses.append(steps_of(run(data__on_tpu=on_tpu))[-1]["loss"])
    assert len(shapes[False]) > 3 and shapes[True] == {(4, 64, 4 * 64)}
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_the_cache_key_reaches_generation(run: Runner, monkeypatch: Any) -> None:
    used: set[bool] = set()
    original = evaluate.generate

    def spy(*args: Any, **kwargs: Any) -> Any:
        used.add(args[4].use_cache)
        return original(*args, **kwargs)

    monkeypatch.setattr(evaluate, "generate", spy)
    for value in (True, False):
        used.clear()
        run(
            model_params__do_compute_metrics=True,
            model_params__use_cache=value,
            model_params__val_generate_params={"max_new_tokens": 2},
            trainer__params__max_epochs=1,
        )
        assert used == {value}


def test_a_loss_that_is_no_number_is_seen_before_the_first_step(
    run: Runner, model_dirs: dict[str, Path], tokenizer: Any, tmp_path: Path, capsys: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dirs["gpt2"])
    model.transformer.ln_f.weight.data[:] = 3e38  # finite, and too large for what follows
    run(model=save(model, tokenizer, tmp_path / "broken"), code=2)
    assert "the loss before the first step is" in capsys.readouterr().err


def test_an_empty_val_split_counts_as_absent(run: Runner, tmp_path: Path) -> None:
    data = write_data(tmp_path / "empty.json", train=rows(20), val=[], test=[])
    splits = set_up(run.config(data=data)).splits
    assert len(splits.val) == 1 and len(splits.train) == 19


def test_only_a_best_model_is_not_a_run_to_go_on_with(
    run: Runner, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "found" / "best").mkdir(parents=True)
    run(name="found", code=2)
    assert "nothing that could be resumed" in capsys.readouterr().err


def test_the_first_best_model_comes_with_a_checkpoint(run: Runner, monkeypatch: Any) -> None:
    """So that a run killed between the two can go on."""
    written = record_saves(monkeypatch)
    run(trainer__params__val_check_interval=2)
    assert written[:2] == ["best", "step-000002"]


def test_token_ids_that_the_model_does_not_have_are_refused(run: Runner, capsys: Any) -> None:
    run(
        code=2,
        model_params__do_compute_metrics=True,
        model_params__val_generate_params={"suppress_tokens": [5, 99999]},
    )
    assert "val_generate_params.suppress_tokens: found token 99999" in capsys.readouterr().err


def test_a_batch_without_targets_adds_nothing(run: Runner, tokenizer: Any) -> None:
    parts = set_up(run.config())
    empty = collate(parts.splits.train, np.zeros(0, dtype=np.int64))
    loss = parts.model(empty)
    loss.backward()
    assert float(loss) == 0
    grads = [p.grad for p in parts.trainable if p.grad is not None]
    assert all(float(g.abs().sum()) == 0 for g in grads)
    pairs = [Conversation.of_pair(1, "What is this?", "a very long answer")]
    assert len(prepare_train(pairs, Encoder(tokenizer), 3, truncate_prompt=False)) == 0


def test_no_gradient_outlives_its_step(run: Runner, monkeypatch: Any) -> None:
    """A name that keeps them would cost the memory of the weights once more."""
    forward, step_if = AnswerModel.forward, Device.step_if
    grads: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def count(self: AnswerModel, batch: Batch) -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in grads))
        return forward(self, batch)

    def remember(self: Device, finite: Any, optimizer: torch.optim.Optimizer) -> None:
        grads.extend(weakref.ref(p.grad) for g in optimizer.param_groups for p in g["params"])
        step_if(self, finite, optimizer)

    monkeypatch.setattr(AnswerModel, "forward", count)
    monkeypatch.setattr(Device, "step_if", remember)
    run(trainer__params__max_epochs=1)
    assert len(grads) > 20 and len(alive) > 6 and not any(alive)
