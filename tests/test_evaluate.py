"""The `test` command: every key, the log, restarts, comparisons."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import evaluate
from conftest import ROOT, Runner, cli, lines_of, rows, write_data
from extras.answer_log import AnswerLog
from extras.generation import Batching


def answers_in(log: Path) -> list[str]:
    return [record["generated"] for record in lines_of(log)]


def first_lines(content: bytes, count: int) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:count])


def test_the_log_has_every_answer_in_file_order_and_the_summary_its_scores(
    run: Runner, tmp_path: Path, capsys: Any
) -> None:
    records = lines_of(run.test())
    expected = rows(7, offset=60)
    assert [r["question"] for r in records] == [r["Question"] for r in expected]
    assert [r["reference"] for r in records] == [r["Answer"] for r in expected]
    for record in records:
        assert {"generated", "exact_match", "token_f1", "bleu", "rougeL"} <= set(record)
        assert record["generated_tokens"] <= 12
    summary = json.loads((tmp_path / "log.summary.json").read_text())
    mean = float(np.mean([r["token_f1"] for r in records]))
    assert summary["scores"]["token_f1"]["value"] == pytest.approx(mean)
    assert summary["samples"] == 7
    output = capsys.readouterr().out
    assert "exact_match" in output and "95 % interval" in output
    assert "<table" in (tmp_path / "log.html").read_text()


def test_reference_perplexity_equals_a_plain_computation(
    run: Runner, model_dirs: dict[str, Path], tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dirs["gpt2"]).eval()
    for record in lines_of(run.test(model="gpt2")):
        prompt = tokenizer(f"Question: {record['question']} \nAnswer:")["input_ids"]
        target = tokenizer(f" {record['reference']}")["input_ids"] + [tokenizer.eos_token_id]
        logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        loss = F.cross_entropy(logits, torch.tensor(target), reduction="sum")
        assert record["reference_nll"] == pytest.approx(loss.item(), rel=1e-4)
        assert record["reference_tokens"] == len(target)


@pytest.mark.parametrize(
    "path, value",
    [
        ("data__padding", True),
        ("data__padding_side", "right"),
        ("test_params__batch_size", 7),
        ("test_params__use_cache", False),
        ("test_params__save_steps", 2),
    ],
)
def test_keys_that_must_not_change_an_answer(path: str, value: Any, run: Runner) -> None:
    other = run.test(name="other", **{path: value})
    assert answers_in(run.test()) == answers_in(other)


@pytest.mark.parametrize(
    "path, value",
    [
        ("data__max_prompt_length", 12),
        ("data__split", "val"),
        ("data__prompt_template", "{question} ->"),
        ("generate_params__max_new_tokens", 3),
        ("generate_params__do_sample", True),
        ("generate_params__no_repeat_ngram_size", 1),
    ],
)
def test_keys_that_change_answers(path: str, value: Any, run: Runner) -> None:
    other = run.test(name="other", **{path: value})
    assert answers_in(run.test()) != answers_in(other)


@pytest.mark.parametrize("sample", [False, True])
def test_the_seed_changes_sampled_answers_only(sample: bool, run: Runner) -> None:
    one, two = (
        answers_in(run.test(name=str(seed), seed=seed, generate_params__do_sample=sample))
        for seed in (1, 2)
    )
    assert (one != two) == sample


def test_truncation_off_leaves_long_questions_whole(run: Runner, capsys: Any) -> None:
    for flag, text in ((True, "7 question cut"), (False, "0 question cut")):
        run.test(name=str(flag), data__max_prompt_length=11, data__truncate_promt=flag)
        assert text in capsys.readouterr().out


def test_metrics_off_leaves_bleu_and_rouge_out(run: Runner, tmp_path: Path) -> None:
    run.test(test_params__do_compute_metrics=False)
    scores = json.loads((tmp_path / "log.summary.json").read_text())["scores"]
    assert "bleu" not in scores and "rougeL" not in scores and "exact_match" in scores


def test_prompts_beyond_the_context_are_refused(run: Runner, capsys: Any) -> None:
    run.test(code=2, generate_params__max_new_tokens=120)
    message = capsys.readouterr().err
    assert "data.max_prompt_length + generate_params.max_new_tokens" in message
    assert "at most 128" in message


def test_a_run_directory_means_its_best_model_and_its_template(
    run: Runner, tmp_path: Path, capsys: Any
) -> None:
    directory = run(data__prompt_template="Q: {question} A:")
    trained = {"test_params__test_model_path": str(directory)}
    log = run.test(**trained)
    assert str(directory / "best") in capsys.readouterr().out
    settings = json.loads((tmp_path / "log.settings.json").read_text())
    assert settings["template"] == "Q: {question} A:"
    log.unlink()
    run.test(code=2, data__prompt_template="{question}", **trained)
    assert "was trained with 'Q: {question} A:'" in capsys.readouterr().err
    weights = directory / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    run.test(code=2, **trained)
    assert "damaged: model.safetensors" in capsys.readouterr().err


def test_a_log_of_another_test_is_not_touched(run: Runner, capsys: Any) -> None:
    log = run.test()
    before = log.read_bytes()
    run.test(code=2, generate_params__max_new_tokens=3, seed=4)
    message = capsys.readouterr().err
    assert "generate_params.max_new_tokens: there 12, now 3" in message
    assert "seed: there 1, now 4" in message
    assert log.read_bytes() == before
    run.test()  # the same test again: everything is there
    assert log.read_bytes() == before


@pytest.mark.parametrize("keep", [0, 1, 3, 4, 6])
@pytest.mark.parametrize("tail", [b"", b'{"question": "ha', b"garbage\n"])
def test_a_cut_log_goes_on_byte_for_byte(keep: int, tail: bytes, run: Runner) -> None:
    log = run.test()
    whole = log.read_bytes()
    log.write_bytes(first_lines(whole, keep) + tail)
    run.test()
    assert log.read_bytes() == whole


def test_lines_that_are_there_are_not_computed_again(
    run: Runner, monkeypatch: Any, capsys: Any
) -> None:
    log = run.test()
    log.write_bytes(first_lines(log.read_bytes(), 4))
    original = evaluate.generate

    def refusing(model: Any, prompts: Any, *args: Any) -> Any:
        assert {prompt.row for prompt in prompts} <= {5, 6, 7}
        return original(model, prompts, *args)

    monkeypatch.setattr(evaluate, "generate", refusing)
    run.test()
    assert "4 of 7 answers are there already" in capsys.readouterr().out
    assert [record["row"] for record in lines_of(log)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_test_keeps_the_answers_it_has_begun(
    number: signal.Signals, run: Runner, monkeypatch: Any, capfd: Any
) -> None:
    log = run.test()
    whole = log.read_bytes()
    log.unlink()
    original = evaluate.generate

    def interrupted(*args: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "generate", interrupted)
        run.test(code=128 + number)
    assert "4 of 7 answers are kept" in capfd.readouterr().out
    assert log.read_bytes() == first_lines(whole, 4)
    run.test()
    assert log.read_bytes() == whole


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_killed_test_goes_on_byte_for_byte(
    number: signal.Signals, run: Runner, tmp_path: Path
) -> None:
    """A real process, killed while it writes."""
    data = write_data(tmp_path / "more.json", test=rows(60))
    changes = {"data": data, "generate_params__max_new_tokens": 20, "test_params__save_steps": 6}
    whole = run.test(name="whole", **changes)
    path = run.test_file(name="parts", **changes)
    log = path.with_suffix(".jsonl")
    command = [sys.executable, str(ROOT / "sft.py"), "test", str(path)]
    kills = 0
    for _ in range(20):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        size = log.stat().st_size if log.exists() else 0
        while child.poll() is None and (not log.exists() or log.stat().st_size <= size):
            time.sleep(0.005)
        if child.poll() is None and kills < 2:
            os.kill(child.pid, number)
        output, _ = child.communicate(timeout=120)
        if child.returncode == 0:
            break
        kills += 1
        assert child.returncode == (-number if number == signal.SIGKILL else 128 + number)
        if number == signal.SIGTERM:
            assert "the same command goes on from there" in output
    assert kills == 2
    assert log.read_bytes() == whole.read_bytes()


def test_a_full_disk_keeps_what_is_there(run: Runner, monkeypatch: Any, capsys: Any) -> None:
    log, original = run.test_file().with_suffix(".jsonl"), os.fsync

    def full(descriptor: int) -> None:
        if len(lines_of(log)) > 4:
            raise OSError(28, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        run.test(code=2)
    assert "No space left on device; make room" in capsys.readouterr().err
    assert len(lines_of(log)) >= 4
    run.test()
    assert len(lines_of(log)) == 7


def test_several_models_are_compared_with_the_first(
    run: Runner, tmp_path: Path, capsys: Any
) -> None:
    directory = run(trainer__params__max_epochs=6)
    run.test(test_params__test_model_path=[None, str(directory)])
    output = capsys.readouterr().out
    assert "A: " in output and "B - A" in output and "perplexity" in output
    logs = [tmp_path / "log.1.jsonl", tmp_path / "log.2.jsonl"]
    assert all(log.exists() for log in logs)
    assert cli("test", "--compare", *logs) == 0
    assert "B is better most in" in capsys.readouterr().out
    assert cli("test", "--compare", logs[0]) == 2
    assert cli("test", "--compare", logs[0], tmp_path / "absent") == 2
    assert cli("test") == 2


def test_logs_with_every_kind_of_line_end_can_be_compared(
    run: Runner, tmp_path: Path, capsys: Any
) -> None:
    test = [{"Question": "a\u2028b\x85c", "Answer": "d\re"}]
    log = run.test(data=write_data(tmp_path / "ends.json", test=test))
    assert cli("test", "--compare", log, log) == 0
    (tmp_path / "rows.jsonl").write_text('{"Question": "a"}\n')
    assert cli("test", "--compare", log, tmp_path / "rows.jsonl") == 2
    assert "not a log of answers" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo"])
def test_padding_beyond_the_context_harms_nothing(kind: str, run: Runner) -> None:
    texts = [
        answers_in(
            run.test(
                model=kind,
                name=f"{side}-{length}",
                data__padding=True,
                data__padding_side=side,
                data__max_prompt_length=length,
            )
        )
        for side in ("left", "right")
        for length in (48, 1000)
    ]
    assert texts[1:] == texts[:-1]


def test_the_keys_of_speed_reach_the_engine(run: Runner, monkeypatch: Any) -> None:
    seen: list[Batching] = []
    original = evaluate.generate

    def spy(*args: Any) -> Any:
        seen.append(args[4])
        return original(*args)

    monkeypatch.setattr(evaluate, "generate", spy)
    run.test(
        data__padding=True,
        data__padding_side="right",
        test_params__batch_size=5,
        test_params__use_cache=False,
        test_params__save_steps=7,
    )
    assert seen == [Batching(5, use_cache=False, padding_side="right", pad_to=48)]


def test_untrained_weights_need_to_be_asked_for(
    run: Runner, model_dirs: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    bare = shutil.copytree(
        model_dirs["gpt2"], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")
    )
    run.test(model=bare, code=2)
    assert "no weights" in capsys.readouterr().err
    run.test(model=bare, test_params__from_scratch=True)


def test_wandb_gets_the_scores(run: Runner, monkeypatch: Any) -> None:
    written: list[dict[str, Any]] = []

    class Writer:
        def __init__(self, *_: Any) -> None:
            pass

        def log(self, values: dict[str, Any]) -> None:
            written.append(values)

        def finish(self) -> None:
            written.append({})

    monkeypatch.setattr(evaluate, "WandbWriter", Writer)
    run.test(wandb={})
    assert "test/exact_match" in written[0] and written[1] == {}


def test_the_log_is_created_with_its_settings(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "deep" / "log.jsonl", {"seed": 1})
    assert log.open(total=3, window=2) == []
    assert json.loads(log.beside(".settings.json").read_text()) == {"seed": 1}
