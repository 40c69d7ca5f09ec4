"""`ask`: one question, lines of a pipe, a prompt on a terminal."""

from __future__ import annotations

import builtins
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from config import GenerateParams
from conftest import ROOT, Runner, asking, cli, process, rows, write_data
from data import Encoder, Prompt
from device import Device
from extras.ask import Talk
from extras.generation import Batching, Decoding, generate
from model import open_model

ASK = [sys.executable, str(ROOT / "sft.py"), "ask"]


@pytest.fixture(scope="module")
def trained(model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run whose template is not the default."""
    base = tmp_path_factory.mktemp("ask")
    data = write_data(base / "data.json", train=rows(11), val=rows(3))
    return Runner(model_dirs, data, base)(
        model="gpt2",
        data__prompt_template="Q: {question} A:",
        trainer__params__max_epochs=30,
    )


def test_the_streamed_text_is_the_engines_answer_in_pieces(
    trained: Path, tokenizer: Any, capsys: Any, monkeypatch: Any
) -> None:
    model = open_model(trained / "best").model.eval()
    encoder, device = Encoder(tokenizer, "Q: {question} A:"), Device("cpu")
    question = "Is water wet? (4)"
    prompt = Prompt(*asking(question), *encoder.prompts(asking(question)))
    decoding = Decoding(GenerateParams(max_new_tokens=80), seed=0)
    (whole,) = generate(model, [prompt], device, decoding, Batching())
    pieces: list[str] = []
    original = print
    monkeypatch.setattr(builtins, "print", lambda *a, **k: (pieces.append(a[0]), original(*a, **k)))
    Talk(model, encoder, device).ask(question)
    text = tokenizer.decode(whole.tokens, skip_special_tokens=True)
    assert capsys.readouterr().out.removesuffix(" [...]\n").strip() == text.strip()
    assert sum(map(bool, pieces)) > len(whole.tokens) / 2 > 2  # as they came, not at the end


def test_a_character_of_several_tokens_is_shown_whole(
    trained: Path, tokenizer: Any, capsys: Any, monkeypatch: Any
) -> None:
    from extras import ask
    from extras.generation import Answer

    tokens = tokenizer(" né 東京 🙂", add_special_tokens=False)["input_ids"]

    def scripted(model: Any, prompts: Any, *_: Any, on_token: Any, **__: Any) -> Any:
        for count in range(1, len(tokens) + 1):
            on_token(prompts[0], tokens[:count])
        yield Answer(prompts[0], tokens, True)

    monkeypatch.setattr(ask, "generate", scripted)
    model = open_model(trained / "best").model.eval()
    Talk(model, Encoder(tokenizer), Device("cpu")).ask("q")
    assert capsys.readouterr().out == "né 東京 🙂\n"


def test_one_question_is_answered_with_the_checkpoints_own_template(
    trained: Path, capsys: Any
) -> None:
    assert cli("ask", trained, "Capital of Italy? (5)") == 0
    assert capsys.readouterr().out == "Rome\n"
    assert cli("ask", next(trained.glob("step-*")), "Capital of Italy? (5)") == 0
    assert capsys.readouterr().out == "Rome\n"


def test_lines_of_a_pipe_are_answered_each_on_a_line(trained: Path) -> None:
    result = process("ask", trained, input="Capital of Italy? (5)\n\nOpposite of hot? (8)\n")
    assert (result.returncode, result.stdout, result.stderr) == (0, "Rome\ncold\n", "")


def test_whoever_stops_reading_gets_no_traceback(trained: Path) -> None:
    asking = subprocess.Popen(
        [*ASK, str(trained)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert asking.stdin and asking.stdout and asking.stderr
    asking.stdin.write(b"Capital of Italy? (5)\n")
    asking.stdin.flush()
    assert asking.stdout.read(4) == b"Rome"
    asking.stdout.close()
    asking.stdin.write(b"Capital of Italy? (5)\n" * 3)
    asking.stdin.close()
    assert asking.stderr.read() == b""
    assert asking.wait(60) == 0


@pytest.mark.parametrize("end", [b"\x04", b"\x03", b"\n"], ids=["Ctrl-D", "Ctrl-C", "empty line"])
def test_a_prompt_on_a_terminal_answers_and_ends_cleanly(trained: Path, end: bytes) -> None:
    ours, theirs = pty.openpty()
    asking = subprocess.Popen([*ASK, str(trained)], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""

    def wait_for(text: bytes, count: int) -> None:
        nonlocal seen
        while seen.count(text) < count:
            seen += os.read(ours, 1000)

    wait_for(b"> ", 1)
    os.write(ours, b"Capital of Italy? (5)\n")
    wait_for(b"Rome\r\n", 1)
    wait_for(b"> ", 2)
    time.sleep(0.2)  # until the terminal is set up for the next line
    if end == b"\x03":  # the terminal is not this process group's own, so it sends no signal
        asking.send_signal(signal.SIGINT)
    else:
        os.write(ours, end)
    assert asking.wait(60) == 0
    assert b"Traceback" not in seen
    os.close(ours)


def test_what_cannot_be_asked_is_one_message(trained: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli("ask", trained, "word " * 200) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: the question has ") and "context is 128" in message
    assert cli("ask", tmp_path / "nothing", "x") == 2
    assert "not a local directory" in capsys.readouterr().err
    assert cli("ask", tmp_path, "x") == 2
    assert "the directory has no config.json" in capsys.readouterr().err
