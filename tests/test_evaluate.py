"""The `test` command: every key, the log, restarts, comparisons."""

from __future__ import annotations

import json
import os
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

from conftest import ROOT, cli, rows, train, train_config, write_yaml
from extras.answer_log import AnswerLog
from extras.generation import Batching


def config_of(model: Path, data: Path, log: Path, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "data": {"data_dir": str(data), "max_prompt_length": 48},
        "generate_params": {"max_new_tokens": 12},
        "model_name": str(model),
        "seed": 1,
        "test_params": {"log_file": str(log), "batch_size": 3, "save_steps": 4},
    }
    for path, value in changes.items():
        section, _, name = path.partition("__")
        if name:
            config[section][name] = value
        else:
            config[section] = value
    return config


def run_test(config: dict[str, Any], *overrides: str) -> int:
    path = Path(config["test_params"]["log_file"]).with_suffix(".yaml")
    return cli("test", write_yaml(path, config), *overrides)


def log_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    text = Path(config["test_params"]["log_file"]).read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def base(model_dirs: dict[str, Path], data_file: Path, tmp_path: Path) -> dict[str, Any]:
    return config_of(model_dirs["gpt2"], data_file, tmp_path / "log.jsonl")


def test_the_log_has_every_answer_in_file_order_and_the_summary_its_scores(
    base: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    assert run_test(base) == 0
    records = log_of(base)
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
    base: dict[str, Any], model_dirs: dict[str, Path], tmp_path: Path, tokenizer: Any
) -> None:
    assert run_test(base) == 0
    model = AutoModelForCausalLM.from_pretrained(model_dirs["gpt2"]).eval()
    for record in log_of(base):
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
def test_keys_that_must_not_change_an_answer(
    path: str, value: Any, base: dict[str, Any], model_dirs: Any, data_file: Path, tmp_path: Path
) -> None:
    other = config_of(model_dirs["gpt2"], data_file, tmp_path / "other.jsonl", **{path: value})
    assert run_test(base) == run_test(other) == 0
    for ours, theirs in zip(log_of(base), log_of(other), strict=True):
        assert ours["generated"] == theirs["generated"]


@pytest.mark.parametrize(
    "path, value",
    [
        ("data__max_prompt_length", 12),
        ("data__split", "val"),
        ("data__prompt_template", "{question} ->"),
        ("generate_params", {"max_new_tokens": 3}),
        ("generate_params", {"max_new_tokens": 12, "do_sample": True}),
        ("generate_params", {"max_new_tokens": 12, "no_repeat_ngram_size": 1}),
    ],
)
def test_keys_that_change_answers(
    path: str, value: Any, base: dict[str, Any], model_dirs: Any, data_file: Path, tmp_path: Path
) -> None:
    other = config_of(model_dirs["gpt2"], data_file, tmp_path / "other.jsonl", **{path: value})
    assert run_test(base) == run_test(other) == 0
    assert [r["generated"] for r in log_of(base)] != [r["generated"] for r in log_of(other)]


def test_the_seed_changes_sampled_answers_only(
    base: dict[str, Any], model_dirs: Any, data_file: Path, tmp_path: Path
) -> None:
    results = {}
    for sample in (False, True):
        for seed in (1, 2):
            config = config_of(
                model_dirs["gpt2"],
                data_file,
                tmp_path / f"{sample}-{seed}.jsonl",
                seed=seed,
                generate_params={"max_new_tokens": 12, "do_sample": sample},
            )
            assert run_test(config) == 0
            results[sample, seed] = [r["generated"] for r in log_of(config)]
    assert results[False, 1] == results[False, 2]
    assert results[True, 1] != results[True, 2]


def test_truncation_off_leaves_long_questions_whole(
    model_dirs: Any, data_file: Path, tmp_path: Path, capsys: Any
) -> None:
    for flag, text in ((True, "7 question cut"), (False, "0 question cut")):
        config = config_of(
            model_dirs["gpt2"],
            data_file,
            tmp_path / f"{flag}.jsonl",
            data__max_prompt_length=11,
            data__truncate_promt=flag,
        )
        assert run_test(config) == 0
        assert text in capsys.readouterr().out


def test_metrics_off_leaves_bleu_and_rouge_out(base: dict[str, Any], tmp_path: Path) -> None:
    assert run_test(base, "test_params.do_compute_metrics=false") == 0
    scores = json.loads((tmp_path / "log.summary.json").read_text())["scores"]
    assert "bleu" not in scores and "rougeL" not in scores and "exact_match" in scores


def test_prompts_beyond_the_context_are_refused(base: dict[str, Any], capsys: Any) -> None:
    assert run_test(base, "generate_params.max_new_tokens=120") == 2
    message = capsys.readouterr().err
    assert "data.max_prompt_length + generate_params.max_new_tokens" in message
    assert "at most 128" in message


def test_a_run_directory_means_its_best_model_and_its_template(
    model_dirs: Any, data_file: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    training = train_config(
        model_dirs["gpt2"], data_file, run, data__prompt_template="Q: {question} A:"
    )
    assert train(training) == 0
    config = config_of(model_dirs["gpt2"], data_file, tmp_path / "log.jsonl")
    config["test_params"]["test_model_path"] = str(run)
    assert run_test(config) == 0
    assert str(run / "best") in capsys.readouterr().out
    settings = json.loads((tmp_path / "log.settings.json").read_text())
    assert settings["template"] == "Q: {question} A:"
    (tmp_path / "log.jsonl").unlink()
    assert run_test(config, "data.prompt_template='{question}'") == 2
    assert "was trained with 'Q: {question} A:'" in capsys.readouterr().err
    weights = run / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run_test(config) == 2
    assert "damaged: model.safetensors" in capsys.readouterr().err


def test_a_log_of_another_test_is_not_touched(base: dict[str, Any], capsys: Any) -> None:
    assert run_test(base) == 0
    before = Path(base["test_params"]["log_file"]).read_bytes()
    capsys.readouterr()
    assert run_test(base, "generate_params.max_new_tokens=3", "seed=4") == 2
    message = capsys.readouterr().err
    assert "generate_params.max_new_tokens: there 12, now 3" in message
    assert "seed: there 1, now 4" in message
    assert Path(base["test_params"]["log_file"]).read_bytes() == before
    assert run_test(base) == 0  # the same test again: everything is there
    assert Path(base["test_params"]["log_file"]).read_bytes() == before


@pytest.mark.parametrize("keep", [0, 1, 3, 4, 6])
@pytest.mark.parametrize("tail", [b"", b'{"question": "ha', b"garbage\n"])
def test_a_cut_log_goes_on_byte_for_byte(
    keep: int, tail: bytes, base: dict[str, Any], tmp_path: Path
) -> None:
    assert run_test(base) == 0
    log = Path(base["test_params"]["log_file"])
    whole = log.read_bytes()
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:keep]) + tail)
    assert run_test(base) == 0
    assert log.read_bytes() == whole


def test_lines_that_are_there_are_not_computed_again(
    base: dict[str, Any], monkeypatch: Any, capsys: Any
) -> None:
    import evaluate

    assert run_test(base) == 0
    log = Path(base["test_params"]["log_file"])
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:4]))
    asked: list[int] = []
    original = evaluate.generate

    def counting(model: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        asked.extend(prompt.row for prompt in prompts)
        return original(model, prompts, *args, **kwargs)

    monkeypatch.setattr(evaluate, "generate", counting)
    assert run_test(base) == 0
    assert asked == [5, 6, 7]
    assert "4 of 7 answers are there already" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_test_keeps_the_answers_it_has_begun(
    number: signal.Signals, base: dict[str, Any], monkeypatch: Any, capfd: Any
) -> None:
    import evaluate

    assert run_test(base) == 0
    log = Path(base["test_params"]["log_file"])
    whole = log.read_bytes()
    log.unlink()
    asked: list[int] = []
    original = evaluate.generate

    def interrupted(model: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        asked.extend(prompt.row for prompt in prompts)
        if len(asked) == 4:
            os.kill(os.getpid(), number)
        return original(model, prompts, *args, **kwargs)

    monkeypatch.setattr(evaluate, "generate", interrupted)
    assert run_test(base) == 128 + number
    assert "4 of 7 answers are kept" in capfd.readouterr().out
    assert log.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    assert run_test(base) == 0
    assert asked == [1, 2, 3, 4, 5, 6, 7], "no answer is computed twice"
    assert log.read_bytes() == whole


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_test_goes_on_byte_for_byte(
    number: signal.Signals, model_dirs: Any, tmp_path: Path
) -> None:
    """A real process, killed while it writes; `cmp` of the two files at the end."""
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"test": rows(60)}))
    changes = {"generate_params": {"max_new_tokens": 20}, "test_params__save_steps": 6}
    whole = config_of(model_dirs["gpt_neo"], data, tmp_path / "whole.jsonl", **changes)
    parts = config_of(model_dirs["gpt_neo"], data, tmp_path / "parts.jsonl", **changes)
    assert run_test(whole) == 0
    path = write_yaml(tmp_path / "parts.yaml", parts)
    command = [sys.executable, str(ROOT / "sft.py"), "test", str(path)]
    kills = 0
    for _ in range(20):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        log = Path(parts["test_params"]["log_file"])
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
    compared = subprocess.run(["cmp", tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"])
    assert compared.returncode == 0


def test_a_full_disk_keeps_what_is_there(
    base: dict[str, Any], monkeypatch: Any, capsys: Any
) -> None:
    original = os.fsync
    calls = [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(28, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert run_test(base) == 2
    assert "No space left on device; make room" in capsys.readouterr().err
    assert len(log_of(base)) >= 4
    assert run_test(base) == 0
    assert len(log_of(base)) == 7


def test_several_models_are_compared_with_the_first(
    model_dirs: Any, data_file: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    training = train_config(model_dirs["gpt2"], data_file, run, trainer__params__max_epochs=6)
    assert train(training) == 0
    config = config_of(model_dirs["gpt2"], data_file, tmp_path / "log.jsonl")
    config["test_params"]["test_model_path"] = [None, str(run)]
    assert run_test(config) == 0
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
    model_dirs: Any, tmp_path: Path, capsys: Any
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"test": [{"Question": "a\u2028b\x85c", "Answer": "d\re"}]}))
    config = config_of(model_dirs["gpt2"], data, tmp_path / "log.jsonl")
    assert run_test(config) == 0
    assert cli("test", "--compare", tmp_path / "log.jsonl", tmp_path / "log.jsonl") == 0
    (tmp_path / "rows.jsonl").write_text('{"Question": "a"}\n')
    assert cli("test", "--compare", tmp_path / "log.jsonl", tmp_path / "rows.jsonl") == 2
    assert "not a log of answers" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo"])
def test_padding_beyond_the_context_harms_nothing(
    kind: str, model_dirs: Any, data_file: Path, tmp_path: Path
) -> None:
    texts = []
    for side in ("left", "right"):
        for length in (48, 1000):
            config = config_of(
                model_dirs[kind],
                data_file,
                tmp_path / f"{side}-{length}.jsonl",
                data__padding=True,
                data__padding_side=side,
                data__max_prompt_length=length,
            )
            assert run_test(config) == 0
            texts.append([r["generated"] for r in log_of(config)])
    assert texts[1:] == texts[:-1]


def test_the_keys_of_speed_reach_the_engine(
    base: dict[str, Any], monkeypatch: Any, tmp_path: Path
) -> None:
    import evaluate

    seen: list[Batching] = []
    original = evaluate.generate

    def spy(*args: Any) -> Any:
        seen.append(args[4])
        return original(*args)

    monkeypatch.setattr(evaluate, "generate", spy)
    changes = ["data.padding=true", "data.padding_side=right", "test_params.batch_size=5"]
    assert run_test(base, *changes, "test_params.use_cache=false", "test_params.save_steps=7") == 0
    assert seen == [Batching(5, use_cache=False, padding_side="right", pad_to=48)]


def test_untrained_weights_need_to_be_asked_for(
    base: dict[str, Any], model_dirs: Any, tmp_path: Path, capsys: Any
) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(model_dirs["gpt2"], bare)
    (bare / "model.safetensors").unlink()
    assert run_test(base, f"model_name={bare}") == 2
    assert "no weights" in capsys.readouterr().err
    assert run_test(base, f"model_name={bare}", "test_params.from_scratch=true") == 0


def test_wandb_gets_the_scores(base: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    import evaluate

    written: list[dict[str, Any]] = []

    class Writer:
        def __init__(self, *_: Any) -> None:
            pass

        def log(self, values: dict[str, Any]) -> None:
            written.append(values)

        def finish(self) -> None:
            written.append({})

    monkeypatch.setattr(evaluate, "WandbWriter", Writer)
    assert run_test(base | {"wandb": {}}) == 0
    assert "test/exact_match" in written[0] and written[1] == {}


def test_the_log_is_created_with_its_settings(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "deep" / "log.jsonl", {"seed": 1})
    assert log.open(total=3, window=2) == []
    assert json.loads(log.beside(".settings.json").read_text()) == {"seed": 1}
