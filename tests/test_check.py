"""`check`: it says what a training would do, and leaves nothing behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Runner, cli, rows, write_data
from data import Counts, Samples
from extras.check import length_table, usual_learning_rate


@pytest.fixture
def checked(run: Runner, tmp_path: Path, capsys: Any) -> Any:
    """stdout and stderr of `check`, which must succeed and write nothing."""

    def check(**changes: Any) -> tuple[str, str]:
        path = run.file(**changes)
        before = sorted(tmp_path.rglob("*"))
        assert cli("check", path) == 0
        assert sorted(tmp_path.rglob("*")) == before
        captured = capsys.readouterr()
        return captured.out, captured.err

    return check


def test_check_tells_all_that_is_worth_knowing(checked: Any) -> None:
    text, warned = checked(
        model_params__do_freeze=True,
        model_params__freeze_emb=True,
        model_params__learning_rate=3e-4,
    )
    for label in ("model", "data", "step", "plan", "device", "output", "sanity"):  # as at the start
        assert re.search(rf"^{label} ", text, re.M), label
    assert re.search(r"^prompt( +[\d.]+){5}$", text, re.M)
    assert "cut       nothing" in text
    assert text.count("sample    Question:") == 1 + 3 and text.count("<|endoftext|>]]") == 4
    (embeddings,) = re.findall(r"^emb +([\d,]+) +([\d,]+) +([\d,]+)$", text, re.M)
    assert embeddings[1] == "0" and embeddings[0] == embeddings[2]
    assert "0 pairs of train; 0 questions of test are in train" in text
    assert re.search(r"^memory +weights .* MB, gradients .* MB, optimizer .* MB", text, re.M)
    assert re.search(r"^time +about .* an epoch", text, re.M)
    assert "warning" not in warned


def test_check_shows_what_would_be_cut(checked: Any, tmp_path: Path) -> None:
    long = {"Question": "Why? " * 20 + "Because of the elephant", "Answer": "No"}
    lost = {"Question": "Why?", "Answer": "word " * 70}
    train = [*rows(3), long, lost, *rows(7, 5)]
    data = write_data(tmp_path / "long.json", train=train, val=rows(3, 50))
    text, warned = checked(data=data, data__max_length=64)
    assert re.search(r"cut       2 samples \(16.7%\) have more than 64 tokens", text)
    assert re.search(r"row 4: \d+ tokens, loses '.*elephant'", text)
    assert re.search(r"row 5: \d+ tokens, loses ", text)
    assert "cuts or drops the answers of 1 samples" in warned
    whole = [int(n) for n in re.findall(r"^total .* (\d+)$", text, re.M)]
    assert whole[0] > 64  # the table is of the data, not of what is left of it


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"model_params__learning_rate": 1e-2}, "learning_rate: 0.01 is high for a model of"),
        ({"model_params__learning_rate": 1e-7}, "learning_rate: 1e-07 is low for a model of"),
        ({"model_params__warmup_steps_per_cent": 0.9}, "0.9 makes 11 of 12 steps warm-up"),
        ({"data__max_length": 128}, "data.max_length: 128 is far above the longest sample"),
        ({"trainer__ckpt_path": "last"}, "train would refuse this:"),
    ],
)
def test_check_warns(changes: dict[str, Any], warning: str, checked: Any) -> None:
    _, warned = checked(model="gpt2", **({"model_params__learning_rate": 3e-4} | changes))
    assert warning in warned and warned.count("warning") == 1


def test_check_refuses_what_train_refuses(run: Runner, tmp_path: Path, capsys: Any) -> None:
    assert cli("check", run.file(data=tmp_path / "absent.json")) == 2
    assert "absent.json: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [[5], [5, 5, 5], list(range(2, 1500, 7)), [1, 100_000]])
def test_the_length_table_counts_every_sample_within_80_columns(sizes: list[int]) -> None:
    lengths = np.array(sizes)
    index = np.stack([lengths, np.ones_like(lengths), np.arange(len(sizes)) + 1], axis=1)
    flat = np.zeros(lengths.sum(), dtype=np.int32)
    samples = Samples.of(flat, flat.astype(np.uint8), index, Counts(len(sizes)))
    lines = list(length_table(samples))
    assert max(map(len, lines)) <= 80
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines[4:]) == len(sizes)


def test_usual_learning_rates_are_those_of_the_paper() -> None:
    # Kaplan et al. 2020, D.1, for 1e6 and 1e9 parameters without embeddings
    assert usual_learning_rate(10**6, True) == pytest.approx(1.31e-3, rel=0.01)
    assert usual_learning_rate(10**9, True) == pytest.approx(3.48e-4, rel=0.01)
    assert usual_learning_rate(10**9, False) == pytest.approx(3.48e-5, rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__on_tpu": True, "trainer__params__accumulate_grad_batches": 2},
        {"trainer__params__precision": "16"},  # the scaler's first scales may be too large
    ],
)
def test_check_measures_static_shapes_and_float16(changes: dict[str, Any], checked: Any) -> None:
    text, warned = checked(model="llama", **changes)
    assert not re.search(r"optimizer 0\.0 MB", text)
    assert "not a finite number" not in warned
