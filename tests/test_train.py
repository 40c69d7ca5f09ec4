"""The training loop: one test for each key that steers it, and the exact loss of a step."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from config import TrainConfig, from_dict
from conftest import (
    cli,
    metrics_of,
    newest,
    record_saves,
    rows,
    tiny_config,
    train,
    train_config,
    weights_of,
    write_yaml,
)
from data import Encoder, Pair, prepare_train
from run import Run


def run_of(config: dict[str, Any]) -> Run:
    return Run(from_dict(TrainConfig, config, "test"), quiet=True)


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
    data = base / "data.json"
    data.write_text(json.dumps({"train": rows(22), "val": rows(5, offset=40)}))
    runs = {}
    for batch_size, batches in SPLITS:
        runs[batch_size, batches] = base / f"run-{batch_size}"
        config = train_config(
            model_dirs["gpt_neo"],
            data,
            runs[batch_size, batches],
            data__batch_size=batch_size,
            trainer__params__accumulate_grad_batches=batches,
            trainer__params__precision="64",
            trainer__params__max_epochs=2,
        )
        assert train(config) == 0
    return runs


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
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """An independent reimplementation: whole batch, plain loss, torch's AdamW and clipping."""
    config = train_config(
        model_dirs["llama"],
        data_file,
        tmp_path / "run",
        data__batch_size=3,
        model_params__weight_decay=0.1,
        model_params__adam_betas=[0.8, 0.95],
        trainer__params__accumulate_grad_batches=2,
        trainer__params__gradient_clip_val=0.5,
        trainer__params__precision="64",
    )
    assert train(config) == 0
    run = run_of(
        config
        | {"trainer": {**config["trainer"], "checkpoint": {"dirpath": str(tmp_path / "other")}}}
    )
    model = AutoModelForCausalLM.from_pretrained(model_dirs["llama"], dtype=torch.float64)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95))
    total = run.total_steps
    warmup = math.ceil(0.1 * total)
    for step, line in enumerate(steps_of(tmp_path / "run")):
        run.state.position = step
        items = [run.samples[int(i)] for i in run.next_rows()]
        logits, labels = [], []
        for item in items:
            output = model(torch.tensor([item["input_ids"]])).logits[0, :-1]
            logits.append(output)
            labels.append(torch.tensor(item["labels"][1:]))
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
    weights = weights_of(newest(tmp_path / "run"))
    for name, parameter in model.named_parameters():
        # torch clips by norm + 1e-6, as we do; AdamW's rounding is what remains.
        assert torch.allclose(weights[name], parameter, rtol=1e-6, atol=1e-9), name


def test_dropout_is_on_in_every_step_and_off_in_every_validation(
    data_file: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """A plain loop around transformers draws the same masks; without dropout, losses differ."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2", len(tokenizer), dropout=0.2))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    changes = {
        "data__batch_size": 1,  # padding would draw as well
        "model_params__weight_decay": 0.0,
        "trainer__params__gradient_clip_val": None,
        "trainer__params__max_steps": 6,
        "trainer__params__num_sanity_val_steps": 0,  # it would leave dropout on behind it
        "trainer__params__precision": "64",
        "trainer__params__val_check_interval": 2,
    }
    config = train_config(tmp_path / "model", data_file, tmp_path / "run", **changes)
    assert train(config) == 0
    lines = steps_of(tmp_path / "run")
    validations = {line["step"]: line["val_loss"] for line in validations_of(tmp_path / "run")}
    assert list(validations) == [2, 4, 6]
    run = run_of(train_config(tmp_path / "model", data_file, tmp_path / "other", **changes))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)

    def summed_loss(item: dict[str, Any], dropout: bool) -> torch.Tensor:
        logits = model.train(dropout)(torch.tensor([item["input_ids"]])).logits[0, :-1]
        return F.cross_entropy(logits, torch.tensor(item["labels"][1:]), reduction="sum")

    torch.manual_seed(config["seed"])
    for step, line in enumerate(lines, start=1):
        run.state.position = step - 1
        i = int(run.next_rows()[0])
        item, targets = run.samples[i], int(run.samples.target_lengths[i])
        assert line["loss"] != pytest.approx(summed_loss(item, False).item() / targets, rel=1e-5)
        loss = summed_loss(item, dropout=True) / targets
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = line["lr"]
        optimizer.step()
        if step in validations:
            losses = [summed_loss(item, dropout=False).item() for item in run.val_samples]
            mean = sum(losses) / int(run.val_samples.target_lengths.sum())
            assert validations[step] == pytest.approx(mean, rel=1e-9)


def changed(path: str, value: Any, model_dirs: Any, data_file: Path, tmp_path: Path) -> bool:
    """Whether a key changes the trained weights."""
    weights = []
    for name, changes in (("a", {}), ("b", {path: value})):
        changes = {"trainer__params__max_epochs": 1} | changes
        config = train_config(model_dirs["gpt_neo"], data_file, tmp_path / name, **changes)
        assert train(config) == 0
        weights.append(weights_of(newest(tmp_path / name)))
    return any(not torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


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
def test_keys_that_change_what_is_learned(
    path: str, value: Any, model_dirs: Any, data_file: Path, tmp_path: Path
) -> None:
    assert changed(path, value, model_dirs, data_file, tmp_path)


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
def test_keys_that_must_not_change_what_is_learned(
    path: str, value: Any, model_dirs: Any, data_file: Path, tmp_path: Path
) -> None:
    assert not changed(path, value, model_dirs, data_file, tmp_path)


def test_truncation_off_keeps_the_question_whole(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    counts = []
    for flag in (True, False):
        config = train_config(
            model_dirs["gpt2"],
            data_file,
            tmp_path / str(flag),
            data__max_length=24,
            data__truncate_promt=flag,
        )
        counts.append(run_of(config).train_split.counts)
    assert counts[0].question_cut > 0 and counts[0].dropped == 0
    assert counts[1].question_cut == 0 and counts[1].answer_cut + counts[1].dropped > 0


def test_clipping_off_is_null_or_zero(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    for value in (None, 0.0, 1e9):
        config = train_config(
            model_dirs["gpt2"],
            data_file,
            tmp_path / str(value),
            trainer__params__gradient_clip_val=value,
        )
        assert train(config) == 0
    weights = [weights_of(newest(tmp_path / str(v))) for v in (None, 0.0, 1e9)]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name])
        assert torch.equal(weights[0][name], weights[2][name])


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
    interval: float, expected: list[int], model_dirs: Any, data_file: Path, tmp_path: Path
) -> None:
    """22 samples by 4 are 6 steps an epoch; the end of training is always validated."""
    config = train_config(
        model_dirs["gpt2"],
        data_file,
        tmp_path / "run",
        trainer__params__val_check_interval=interval,
    )
    assert train(config) == 0
    assert [line["step"] for line in validations_of(tmp_path / "run")] == expected


def test_logging_and_checkpoints_come_when_their_keys_say(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    config = train_config(
        model_dirs["gpt2"],
        data_file,
        tmp_path / "run",
        trainer__params__log_every_n_steps=5,
        trainer__checkpoint__every_n_train_steps=5,
        trainer__checkpoint__save_top_k=3,
    )
    assert train(config) == 0
    assert [line["step"] for line in steps_of(tmp_path / "run")] == [5, 10, 12]
    names = sorted(p.name for p in (tmp_path / "run").glob("step-*"))
    assert names == ["step-000005", "step-000010", "step-000012"]


def test_the_newest_two_checkpoints_are_kept(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    config = train_config(
        model_dirs["gpt2"], data_file, tmp_path / "run", trainer__checkpoint__every_n_train_steps=2
    )
    assert train(config) == 0
    names = sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir())
    assert names == ["best", "step-000010", "step-000012"]


def test_a_logged_loss_is_the_mean_over_the_targets_since_the_last_one(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, tokenizer: Any
) -> None:
    every = {}
    for n in (1, 3):
        config = train_config(
            model_dirs["gpt2"], data_file, tmp_path / str(n), trainer__params__log_every_n_steps=n
        )
        assert train(config) == 0
        every[n] = steps_of(tmp_path / str(n))
    run = run_of(train_config(model_dirs["gpt2"], data_file, tmp_path / "again"))
    targets = []
    for position in range(3):
        run.state.position = position
        targets.append(int(run.samples.target_lengths[run.next_rows()].sum()))
    losses = [line["loss"] for line in every[1][:3]]
    mean = sum(a * b for a, b in zip(losses, targets)) / sum(targets)
    assert every[3][0]["loss"] == pytest.approx(mean, rel=1e-6)


def test_max_steps_ends_endless_epochs(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    config = train_config(
        model_dirs["gpt2"],
        data_file,
        tmp_path / "run",
        trainer__params__max_epochs=-1,
        trainer__params__max_steps=15,
    )
    assert train(config) == 0
    assert newest(tmp_path / "run").name == "step-000015"
    assert steps_of(tmp_path / "run")[-1]["lr"] > 0


@pytest.mark.parametrize("value, count", [(2, 8), (0.5, 11), (1.0, 22)])
def test_overfitting_uses_the_same_unshuffled_subset_for_both(
    value: float, count: int, model_dirs: Any, data_file: Path, tmp_path: Path
) -> None:
    config = train_config(
        model_dirs["gpt2"], data_file, tmp_path / "run", trainer__params__overfit_batches=value
    )
    run = run_of(config)
    assert [run.samples.row(i) for i in range(len(run.samples))] == list(range(1, count + 1))
    assert run.val_samples is run.samples
    assert sorted(run.next_rows()) == list(run.next_rows()) == [0, 1, 2, 3]


def test_without_a_val_split_some_of_train_is_held_out_and_never_of_test(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"train": rows(40), "test": rows(5, offset=80)}))
    config = train_config(model_dirs["gpt2"], data, tmp_path / "run", data__val_fraction=0.25)
    run = run_of(config)
    train_rows = {run.samples.row(i) for i in range(len(run.samples))}
    val_rows = {run.val_samples.row(i) for i in range(len(run.val_samples))}
    assert len(val_rows) == 10 and not train_rows & val_rows
    assert train_rows | val_rows == set(range(1, 41))


def test_sanity_validation_takes_the_batches_of_its_key(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    import run as run_module

    asked: list[int | None] = []

    def spy(*args: Any) -> Any:
        asked.append(args[-1])
        return 1.0, 1

    monkeypatch.setattr(run_module, "summed_loss", spy)
    for value in (0, 2, -1):
        config = train_config(
            model_dirs["gpt2"],
            data_file,
            tmp_path / str(value),
            trainer__params__num_sanity_val_steps=value,
        )
        run_of(config).sanity_check(lambda: False)
    assert asked == [2, None]


def test_metrics_on_generated_answers_select_the_best(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    config = train_config(
        model_dirs["gpt2"],
        data_file,
        tmp_path / "run",
        model_params__do_compute_metrics=True,
        model_params__val_generate_samples=4,
        model_params__val_generate_params={"max_new_tokens": 5},
        trainer__checkpoint__log_obg="val_token_f1",
        trainer__checkpoint__mode="max",
    )
    assert train(config) == 0
    lines = validations_of(tmp_path / "run")
    names = "val_bleu val_rouge1 val_rouge2 val_rougeL val_exact_match val_token_f1".split()
    for line in lines:
        assert all(0 <= line[name] <= 1 for name in names)
    best = json.loads((tmp_path / "run" / "best" / "sft.json").read_text())
    top = max(line["val_token_f1"] for line in lines)
    assert best["best_val_token_f1"] == top
    # Ties keep the earlier one.
    assert best["global_step"] == next(li["step"] for li in lines if li["val_token_f1"] == top)


@pytest.mark.parametrize("metric, written", [("val_loss", [2, 3]), ("val_token_f1", [2, 6])])
def test_best_is_the_lowest_loss_or_the_highest_score(
    metric: str,
    written: list[int],
    model_dirs: dict[str, Path],
    data_file: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """Values that fall and rise; a tie keeps the earlier one, and what is no number never wins."""
    import run as run_module

    scores = iter([math.nan, 3.0, 2.0, 2.0, -math.inf, 4.0, 4.0, math.inf, 3.0])
    monkeypatch.setattr(run_module, "validate", lambda *_: ({metric: next(scores)}, []))
    config = train_config(
        model_dirs["gpt2"],
        data_file,
        tmp_path / "run",
        model_params__do_compute_metrics=metric == "val_token_f1",
        trainer__checkpoint__every_n_train_steps=1,
        trainer__checkpoint__log_obg=metric,
        trainer__checkpoint__mode="min" if metric == "val_loss" else "max",
        trainer__checkpoint__save_top_k=9,
        trainer__params__max_steps=9,
        trainer__params__val_check_interval=1,
    )
    names = record_saves(monkeypatch)
    assert train(config) == 0
    # `best` is written before the checkpoint of its step.
    assert [int(b[5:]) for a, b in pairwise(names) if a == "best"] == written
    best = tmp_path / "run" / "best"
    assert json.loads((best / "sft.json").read_text())["global_step"] == written[-1]
    weights = weights_of(tmp_path / "run" / f"step-{written[-1]:06d}")
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(best).items())


def test_best_is_a_plain_model_directory(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    assert train(train_config(model_dirs["qwen2"], data_file, tmp_path / "run")) == 0
    best = tmp_path / "run" / "best"
    assert not (best / "trainer_state.pt").exists()
    model = AutoModelForCausalLM.from_pretrained(best)
    assert not any(p.isnan().any() for p in model.parameters())
    assert "api" not in (best / "trainer.yaml").read_text()


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama", "qwen2"])
def test_every_kind_of_model_learns(
    kind: str, model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    config = train_config(
        model_dirs[kind], data_file, tmp_path / "run", trainer__params__max_epochs=8
    )
    assert train(config) == 0
    losses = [line["loss"] for line in steps_of(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]


def test_the_resolved_configuration_is_kept_and_printed_lines_tell_the_plan(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, capsys: Any
) -> None:
    config = train_config(
        model_dirs["gpt2"], data_file, tmp_path / "run", trainer__params__accumulate_grad_batches=2
    )
    assert cli("train", write_yaml(tmp_path / "c.yaml", config)) == 0
    output = capsys.readouterr().out
    assert "4 samples x 2 batches x 1 rank = 8 samples" in output
    assert "trainer.yaml (every value)" in output  # the resolved configuration, defaults and all
    assert "3 steps an epoch, 6 in all, 1 of them warm-up" in output
    assert "[[" in output and "22 kept" in output
    text = (tmp_path / "run" / "trainer.yaml").read_text()
    assert "adam_betas" in text and "max_bad_steps" in text


def test_on_tpu_gives_every_batch_one_shape(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from model import AnswerModel

    shapes: dict[bool, set[tuple[int, ...]]] = {False: set(), True: set()}
    original = AnswerModel.forward
    on_tpu = False

    def recording(self: Any, batch: Any) -> Any:
        shapes[on_tpu].add(tuple(batch.input_ids.shape) + tuple(batch.target_ids.shape))
        return original(self, batch)

    monkeypatch.setattr(AnswerModel, "forward", recording)
    monkeypatch.setattr("run.check_trainable", lambda model: None)  # on the CPU, before
    losses = []
    for on_tpu in (False, True):
        config = train_config(
            model_dirs["gpt_neo"], data_file, tmp_path / str(on_tpu), data__on_tpu=on_tpu
        )
        assert train(config) == 0
        losses.append(steps_of(tmp_path / str(on_tpu))[-1]["loss"])
    assert len(shapes[False]) > 3 and shapes[True] == {(4, 64, 4 * 64)}
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_the_cache_key_reaches_generation(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    import evaluate

    used: list[bool] = []
    original = evaluate.generate

    def spy(*args: Any, **kwargs: Any) -> Any:
        used.append(kwargs["use_cache"])
        return original(*args, **kwargs)

    monkeypatch.setattr(evaluate, "generate", spy)
    for value in (True, False):
        config = train_config(
            model_dirs["gpt2"],
            data_file,
            tmp_path / str(value),
            model_params__do_compute_metrics=True,
            model_params__use_cache=value,
            model_params__val_generate_params={"max_new_tokens": 2},
            trainer__params__max_epochs=1,
        )
        assert train(config) == 0
    assert used == [True, False]


def test_a_loss_that_is_no_number_is_seen_before_the_first_step(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, capsys: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dirs["gpt2"])
    model.transformer.ln_f.weight.data[:] = 3e38  # finite, and too large for what follows
    model.save_pretrained(tmp_path / "broken")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "broken" / name).write_bytes((model_dirs["gpt2"] / name).read_bytes())
    assert train(train_config(tmp_path / "broken", data_file, tmp_path / "run")) == 2
    assert "the loss before the first step is" in capsys.readouterr().err


def test_an_empty_val_split_counts_as_absent(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"train": rows(20), "val": [], "test": []}))
    run = run_of(train_config(model_dirs["gpt2"], data, tmp_path / "run"))
    assert len(run.val_samples) == 1 and len(run.samples) == 19


def test_only_a_best_model_is_not_a_run_to_go_on_with(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "run" / "best").mkdir(parents=True)
    assert train(train_config(model_dirs["gpt2"], data_file, tmp_path / "run")) == 2
    assert "nothing that could be resumed" in capsys.readouterr().err


def test_the_first_best_model_comes_with_a_checkpoint(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """So that a run killed between the two can go on."""
    written = record_saves(monkeypatch)
    config = train_config(
        model_dirs["gpt2"], data_file, tmp_path / "run", trainer__params__val_check_interval=2
    )
    assert train(config) == 0
    assert written[:2] == ["best", "step-000002"]


def test_token_ids_that_the_model_does_not_have_are_refused(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, capsys: Any
) -> None:
    config = train_config(
        model_dirs["gpt2"],
        data_file,
        tmp_path / "run",
        model_params__do_compute_metrics=True,
        model_params__val_generate_params={"suppress_tokens": [5, 99999]},
    )
    assert train(config) == 2
    assert "val_generate_params.suppress_tokens: found token 99999" in capsys.readouterr().err


def test_a_batch_without_targets_adds_nothing(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, tokenizer: Any
) -> None:
    run = run_of(train_config(model_dirs["gpt2"], data_file, tmp_path / "run"))
    from data import collate

    empty = collate(run.samples, run.next_rows()[:0])
    loss = run.model(empty)
    loss.backward()
    assert float(loss) == 0
    grads = [p.grad for p in run.trainable if p.grad is not None]
    assert all(float(g.abs().sum()) == 0 for g in grads)
    pairs = [Pair(1, "What is this?", "a very long answer")]
    assert len(prepare_train(pairs, Encoder(tokenizer), 3, truncate_promt=False)) == 0
