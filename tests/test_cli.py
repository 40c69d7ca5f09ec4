"""The command line as users meet it: bad input, and every command of the README."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import ROOT, cli, copy_project, imported, process, rows, train_config, write_yaml
from model import AnswerModel


def refused(capsys: Any, *arguments: Any) -> str:
    """Run a command that must end with code 2 and one message; returns the message."""
    assert cli(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    return captured.err


def test_five_mistakes_are_named_in_one_message(tmp_path: Path, capsys: Any) -> None:
    config = train_config("m", "d.json", tmp_path / "run")
    config["data"]["batch_size"] = "eight"
    config["data"]["max_lenght"] = 64
    config["model_params"]["learning_rate"] = -1
    config["trainer"]["checkpoint"]["log_obg"] = "val_bleu"
    config["trainer"]["params"]["accelerator"] = "npu"
    message = refused(capsys, "train", write_yaml(tmp_path / "c.yaml", config))
    assert "5 problems" in message
    for part in (
        "data.batch_size: found 'eight'",
        "data.max_lenght: unknown key; did you mean max_length?",
        "model_params.learning_rate: found -1",
        "trainer.checkpoint.log_obg: found 'val_bleu'",
        "trainer.params.accelerator: found 'npu'",
    ):
        assert part in message
    assert not (tmp_path / "run").exists()


def test_bad_input_gives_one_clear_message(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, capsys: Any
) -> None:
    def run(**changes: Any) -> str:
        settings = {"model": model_dirs["gpt2"], "data": data_file, "run": tmp_path / "run"}
        settings |= {name: changes.pop(name) for name in list(changes) if name in settings}
        path = write_yaml(tmp_path / "c.yaml", train_config(**settings, **changes))
        return refused(capsys, "train", path)

    assert "no such configuration file" in refused(capsys, "train", tmp_path / "absent.yaml")
    assert "no such file or directory" in run(data=tmp_path / "absent.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"train": [\n  {"Question": "a" "Answer": "b"}\n]}')
    assert "broken.json, line 2, column 20: not valid JSON" in run(data=broken)
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(["a", "b"]))
    assert "found a list" in run(data=shape)
    wrong = tmp_path / "wrong.json"
    entries: list[Any] = rows(6)
    del entries[1]["Answer"]
    entries[3]["Answer"] = "  "
    entries[4]["Question"] = None
    wrong.write_text(json.dumps({"train": entries}))
    message = run(data=wrong)
    assert "row 2: no 'Answer'" in message
    assert "row 4: 'Answer' is empty" in message
    assert "row 5: 'Question' is null" in message
    absent = tmp_path / "absent-split.json"
    absent.write_text(json.dumps({"test": rows(3)}))
    assert "no split 'train'; found test" in run(data=absent)
    assert "max_length: found 129; allowed: at most 128" in run(data__max_length=129)
    empty = tmp_path / "no-weights"
    shutil.copytree(model_dirs["gpt2"], empty)
    (empty / "model.safetensors").unlink()
    assert "a config but no weights" in run(model=empty)
    assert "not a local directory" in run(model="no-such/model-anywhere")
    assert "found 'cuda', but this machine has" in run(trainer__params__accelerator="cuda")


def test_a_failed_test_command_writes_nothing(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, capsys: Any
) -> None:
    config = {
        "data": {"data_dir": str(data_file), "split": "tset"},
        "model_name": str(model_dirs["gpt2"]),
        "test_params": {"log_file": str(tmp_path / "out" / "log.jsonl")},
    }
    message = refused(capsys, "test", write_yaml(tmp_path / "t.yaml", config))
    assert "no split 'tset'; found train, val, test" in message
    assert not (tmp_path / "out").exists()
    config["cuda"] = True
    message = refused(capsys, "test", write_yaml(tmp_path / "t.yaml", config))
    assert "cuda: found true, but this machine has cpu" in message


def test_a_csv_with_other_column_names_is_trained_on_and_tested(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, entries in (("train", rows(10)), ("test", rows(3))):
        lines = [f'"{row["Question"]}","{row["Answer"]}"' for row in entries]
        (folder / f"{split}.csv").write_text("\n".join(["asked,told", *lines]))
    keys = ["data.question_key=asked", "data.answer_key=told"]
    config = train_config(
        model_dirs["gpt2"], folder, tmp_path / "run", trainer__params__max_epochs=1
    )
    path = write_yaml(tmp_path / "c.yaml", config)
    assert cli("train", path, "--quiet") == 2
    assert cli("train", path, "--quiet", *keys) == 0
    log = tmp_path / "log.jsonl"
    testing = {
        "data": {"data_dir": str(folder)},
        "model_name": str(tmp_path / "run"),
        "test_params": {"log_file": str(log)},
        "generate_params": {"max_new_tokens": 2},
    }
    assert cli("test", write_yaml(tmp_path / "t.yaml", testing), "--quiet", *keys) == 0
    references = [json.loads(line)["reference"] for line in log.read_text().splitlines()]
    assert references == [row["Answer"] for row in rows(3)]


def test_duplicates_and_overlap_are_counted_in_a_warning(
    model_dirs: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    train = [*rows(8), rows(1)[0], rows(2)[1]]
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"train": train, "val": rows(2, 50), "test": rows(3, offset=6)}))
    config = train_config(model_dirs["gpt2"], data, tmp_path / "run", trainer__params__max_epochs=1)
    assert cli("train", write_yaml(tmp_path / "c.yaml", config)) == 0
    error = capsys.readouterr().err
    assert "2 pairs of train are duplicates, 2 questions of test are in train" in error


def readme_commands() -> list[str]:
    """Every `python sft.py ...` line of the README's shell blocks."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S)
    commands = re.findall(r"python sft\.py [^\n&#]*", "\n".join(blocks).replace("\\\n", " "))
    return [command.strip() for command in commands]


def test_the_readme_shows_train_and_test() -> None:
    kinds = {shlex.split(command)[2] for command in readme_commands()}
    assert {"train", "test"} <= kinds


@pytest.mark.slow
def test_the_readme_commands_run_in_order(tmp_path: Path) -> None:
    """In a copy of the project, as after cloning; ranks and other machines are left to others."""
    copy = copy_project(tmp_path / "sft")
    for command in readme_commands():
        words = [sys.executable, *shlex.split(command)[1:]]
        result = subprocess.run(words, cwd=copy, capture_output=True, text=True, timeout=400)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        print(command, "->", result.stdout.splitlines()[-1])
    scores = json.loads((copy / "runs/facts/test.summary.json").read_text())["scores"]
    assert scores["exact_match"]["value"] >= 0.9
    assert scores["ended_by_eos"]["value"] >= 0.99  # it learned where an answer ends
    untrained = json.loads((copy / "runs/untrained/test.summary.json").read_text())["scores"]
    assert untrained["exact_match"]["value"] <= 0.01


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=str)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    from config import TestConfig, TrainConfig, load

    schema: Any = TrainConfig if path.name == "trainer.yaml" else TestConfig
    config = load(schema, path)
    # Every key of the seed's description is written out, for people to find.
    assert set(yaml.safe_load(path.read_text())) >= {"data", "model_name", "seed"}
    assert config.seed == 42


def test_help_needs_no_torch() -> None:
    for words in (["--help"], ["train", "--help"], ["test", "--help"]):
        assert "torch" not in imported(*words, code=0)


def test_an_unknown_command_is_an_error() -> None:
    assert process("trian", "x.yaml").returncode == 2


def test_too_little_memory_ends_with_what_to_change(
    model_dirs: dict[str, Path],
    data_file: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(AnswerModel, "forward", forward)
    config = train_config(model_dirs["gpt2"], data_file, tmp_path / "run")
    assert cli("train", write_yaml(tmp_path / "config.yaml", config)) == 1
    message = capsys.readouterr().err
    assert "error: out of memory: halve data.batch_size" in message
    assert "Traceback" not in message
