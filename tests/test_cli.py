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

from conftest import (
    ROOT,
    Runner,
    cli,
    copy_project,
    imported,
    lines_of,
    process,
    rows,
    write_data,
)
from model import AnswerModel


def test_bad_input_ends_with_code_2_and_one_clear_message(
    run: Runner, model_dirs: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    def refused(**changes: Any) -> str:
        run(code=2, **changes)
        message = capsys.readouterr().err
        assert message.startswith("error: ") and "Traceback" not in message
        return message

    assert cli("train", tmp_path / "absent.yaml") == 2
    assert "no such configuration file" in capsys.readouterr().err
    assert "data.batch_size: found 'eight'" in refused(name="eight", data__batch_size="eight")
    assert not (tmp_path / "eight").exists()
    assert "no such file or directory" in refused(data=tmp_path / "absent.json")
    entries: list[Any] = rows(6)
    del entries[1]["Answer"]
    entries[4]["Question"] = None
    message = refused(data=write_data(tmp_path / "wrong.json", train=entries))
    assert "row 2: no 'Answer'" in message and "row 5: 'Question' is null" in message
    assert "max_length: found 129; allowed: at most 128" in refused(data__max_length=129)
    weights = shutil.ignore_patterns("*.safetensors")
    empty = shutil.copytree(model_dirs["gpt2"], tmp_path / "empty", ignore=weights)
    assert "a config but no weights" in refused(model=empty)
    assert "not a local directory" in refused(model="no-such/model-anywhere")
    message = refused(trainer__params__accelerator="cuda")
    assert "found 'cuda', but this machine has" in message


def test_a_failed_test_command_writes_nothing(run: Runner, tmp_path: Path, capsys: Any) -> None:
    log = str(tmp_path / "out" / "log.jsonl")
    run.test(code=2, data__split="tset", test_params__log_file=log)
    assert "no split 'tset'; found train, val, test" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    run.test(code=2, cuda=True)
    assert "cuda: found true, but this machine has" in capsys.readouterr().err


def test_a_csv_with_other_column_names_is_trained_on_and_tested(
    run: Runner, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, entries in (("train", rows(10)), ("test", rows(3))):
        lines = [f'"{row["Question"]}","{row["Answer"]}"' for row in entries]
        (folder / f"{split}.csv").write_text("\n".join(["asked,told", *lines]))
    columns = {"data__question_key": "asked", "data__answer_key": "told"}
    run(data=folder, code=2)
    directory = run(data=folder, **columns)
    log = run.test(model=directory, data=folder, **columns)
    references = [record["reference"] for record in lines_of(log)]
    assert references == [row["Answer"] for row in rows(3)]


def test_duplicates_and_overlap_are_counted_in_a_warning(
    run: Runner, tmp_path: Path, capsys: Any
) -> None:
    train = [*rows(8), rows(1)[0], rows(2)[1]]
    data = write_data(tmp_path / "d.json", train=train, val=rows(2, 50), test=rows(3, offset=6))
    run(data=data, trainer__params__max_epochs=1)
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
    run: Runner, monkeypatch: Any, capsys: Any
) -> None:
    def forward(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(AnswerModel, "forward", forward)
    run(code=1)
    message = capsys.readouterr().err
    assert "error: out of memory: halve data.batch_size" in message
    assert "Traceback" not in message
