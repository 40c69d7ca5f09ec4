"""Files and shapes of data as people have them: what is read, what is said, what is refused."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from conftest import ROOT, Runner, cli, rows, write_yaml
from data import Conversation
from extras import files
from extras.formats import DataSource

PAIRS = [(row["Question"], row["Answer"]) for row in rows(3)]
LINES = "".join(json.dumps(row) + "\n" for row in rows(3))
BOUNDED = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def write(path: Path, content: Any, encoding: str = "utf-8") -> Path:
    """A file: bytes and texts as they are, anything else as JSON; a list in .jsonl as its lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl" and isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def pairs(path: Path | str, split: str = "train", **keys: Any) -> list[tuple[str, str | None]]:
    source = DataSource.open(path, **keys)
    assert not source.chat
    return [(c.question, c.answer) for c in source.conversations(split)]


def spoken(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in conversation.messages]


def refused(path: Path | str, split: str = "train", **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(DataSource.open(path, **keys).conversations(split))
    return str(caught.value)


def read(tmp_path: Path, *records: Any, **keys: Any) -> tuple[DataSource, list[Conversation]]:
    """The conversations of rows in a .jsonl file."""
    source = DataSource.open(write(tmp_path / "d.jsonl", list(records)), **keys)
    return source, list(source.conversations("train"))


def refused_row(tmp_path: Path, *records: Any) -> str:
    """What is said of the first kind of problem."""
    lines = refused(write(tmp_path / "d.jsonl", list(records))).split("\n")
    assert lines[0].endswith("cannot be used (rows count from 1)")
    return lines[1].strip()


# ------------------------------------------------------------------------------ pairs


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Question", "Answer"),
        ("question", "answer"),
        ("prompt", "completion"),
        ("prompt", "response"),
        ("query", "response"),
        ("input", "output"),
        ("problem", "solution"),
        ("PROMPT", "Target"),
    ],
)
def test_usual_names_of_two_columns_are_recognised(
    tmp_path: Path, question: str, answer: str
) -> None:
    source, (one,) = read(tmp_path, {"id": 7, question: "q", "b,c": 1, answer: "a"})
    assert (one.question, one.answer, source.chat) == ("q", "a", False)
    assert source.remarks() == [
        f"shape: pairs ({question} -> question, {answer} -> answer), columns not used: id, b,c"
    ]


@pytest.mark.parametrize(
    "columns",
    [
        ("problem", "solution", "answer"),
        ("Question", "question", "answer"),
        ("prompt", "chosen", "rejected"),
        ("text",),
        ("instruction", "input", "context", "output"),
        ("question", "input", "answer"),
    ],
)
def test_columns_that_can_mean_several_things_are_not_guessed(
    tmp_path: Path, columns: tuple[str, ...]
) -> None:
    path = write(tmp_path / "d.jsonl", [dict.fromkeys(columns, "x")])
    message = refused(path)
    assert f"is not clear; found the columns {', '.join(map(repr, columns))}\n" in message
    assert "    question_key: NAME\n    answer_key: NAME" in message
    if len(columns) > 1:
        keys = {"question_key": columns[0], "answer_key": columns[-1]}
        assert pairs(path, **keys) == [("x", "x")]


def test_one_key_is_enough_where_the_other_column_is_clear(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"asked": "q", "problem": "p", "answer": "a"}])
    assert pairs(path, question_key="asked") == [("q", "a")]
    assert pairs(path, answer_key="asked") == [("p", "q")]


def test_alpaca_and_dolly_keep_what_an_instruction_is_about(tmp_path: Path) -> None:
    first = {"instruction": "Translate.", "input": "a cat", "output": "un chat", "id": 1}
    second = {"instruction": "Say hello.", "input": "", "output": "hello"}
    source, found = read(tmp_path, first, second)
    assert [(c.question, c.answer) for c in found] == [
        ("Translate.\na cat", "un chat"),
        ("Say hello.", "hello"),
    ]
    assert not source.chat and source.remarks() == [
        "shape: Alpaca (instruction + input -> question, output -> answer), columns not used: id"
    ]
    row = {"instruction": "Who?", "context": "Ann came.", "response": "Ann", "category": "qa"}
    source, (one,) = read(tmp_path, row)
    assert (one.question, one.answer) == ("Who?\nAnn came.", "Ann")
    assert source.remarks() == [
        "shape: Dolly (instruction + context -> question, response -> answer), "
        "columns not used: category"
    ]
    _, (one,) = read(tmp_path, {"instruction": "Who?", "output": "Ann"})
    assert (one.question, one.answer) == ("Who?", "Ann")


def test_alpaca_with_history_and_system_is_a_conversation(tmp_path: Path) -> None:
    row = {
        "instruction": "And Italy?",
        "input": "",
        "output": "Rome",
        "system": "Be brief.",
        "history": [["Capital of France?", "Paris"], ["Spain?", "Madrid"]],
    }
    plain = {"instruction": "Hi", "input": None, "output": "Ho", "system": "", "history": None}
    source, (long, short) = read(tmp_path, row, plain)
    assert source.chat
    assert spoken(long) == [
        ("system", "Be brief."),
        ("user", "Capital of France?"),
        ("assistant", "Paris"),
        ("user", "Spain?"),
        ("assistant", "Madrid"),
        ("user", "And Italy?"),
        ("assistant", "Rome"),
    ]
    assert [m.trained for m in long.messages] == [False, *[False, True] * 3]
    assert spoken(short) == [("user", "Hi"), ("assistant", "Ho")]
    for history in ("x", [["q"]], ["qa"], [["q", None]]):
        assert "row 1: " in refused_row(tmp_path, {**row, "history": history})


def test_numbers_are_read_as_they_are_written_and_counted(tmp_path: Path) -> None:
    text = '{"Question": "q%d", "Answer": %s}\n'
    written = ["0", "588", "-7", "3.50", "1e3", "12345678901234567890.125"]
    path = write(tmp_path / "d.jsonl", "".join(text % pair for pair in enumerate(written)))
    source = DataSource.open(path)
    assert [c.answer for c in source.conversations("train")] == written
    assert source.remarks()[1:] == ["train: 6 texts are numbers, read as written"]
    _, (one,) = read(tmp_path, {"Question": 17, "Answer": "a"})
    assert one.question == "17"


def test_problems_are_grouped_by_their_kind_with_one_example(tmp_path: Path) -> None:
    many = [{"Question": "q", "Answer": float("nan")} for _ in range(9)]
    message = refused(write(tmp_path / "d.json", {"train": [*rows(2), *many]}))
    _, *lines = message.split("\n")
    assert lines == [
        "  rows 3, 4, 5, 6, 7 and 4 more: 'Answer' is a number that is none; found nan"
    ]
    bad = [{"messages": [{"role": f"r{i}", "content": "x"}]} for i in range(300)]
    message = refused(write(tmp_path / "d.json", bad))
    assert message.count("\n") == 1 and "unknown role; found 'r0'; allowed: system" in message


# ----------------------------------------------------------------------- conversations

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def test_openai_messages(tmp_path: Path) -> None:
    turns = [{"role": "developer", "content": "Be brief."}, USER, ANSWER, USER, ANSWER]
    source, (one,) = read(tmp_path, {"messages": turns, "source": "x"})
    assert source.chat and [m.trained for m in one.messages] == [False, False, True, False, True]
    assert spoken(one)[:3] == [("system", "Be brief."), ("user", "q"), ("assistant", "a")]
    assert source.remarks() == [
        "shape: OpenAI messages (messages -> messages), columns not used: source"
    ]


def test_sharegpt_conversations(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "Weather in Rome?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": '{"degrees": 21.50}'},
        {"from": "gpt", "value": "21 degrees"},
    ]
    function = {"name": "weather", "parameters": {"minimum": 0.5}}
    row = {
        "id": "1",
        "conversations": turns,
        "system": "Be brief.",
        "tools": json.dumps([function]),
    }
    source, (one,) = read(tmp_path, row)
    assert spoken(one) == [
        ("system", "Be brief."),
        ("user", "Weather in Rome?"),
        ("assistant", ""),
        ("tool", '{"degrees": 21.50}'),
        ("assistant", "21 degrees"),
    ]
    assert [m.trained for m in one.messages] == [False, False, True, False, True]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    assert one.messages[2].fields == {"tool_calls": [call]}
    assert one.tools == ({"type": "function", "function": function},)
    assert source.remarks() == [
        "shape: ShareGPT conversations (conversations -> messages, system -> system message, "
        "tools -> tools), columns not used: id"
    ]
    both = [{"from": "system", "value": "Be long."}, *turns]
    assert "row 1: two system messages, one in 'system'" in refused_row(
        tmp_path, {**row, "conversations": both}
    )


def test_openai_tool_calls_and_results(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "2"},
        {"role": "assistant", "content": "a", "reasoning_content": "hm", "tool_calls": []},
        {"role": "assistant", "content": None, "function_call": {"name": "g", "arguments": ""}},
        {"role": "function", "name": "g", "content": "3"},
        ANSWER,
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    _, (one,) = read(tmp_path, {"messages": turns, "tools": tools})
    # Templates write the arguments as JSON, so they are an object here, not a text.
    called = {**call, "function": {"name": "f", "arguments": {"x": 1}}}
    assert [dict(m.fields) for m in one.messages] == [
        {},
        {"tool_calls": [called]},
        {"tool_call_id": "c1", "name": "f"},
        {"reasoning_content": "hm"},
        {"tool_calls": [{"type": "function", "function": {"name": "g", "arguments": {}}}]},
        {"name": "g"},
        {},
    ]
    assert [m.role for m in one.messages][-2:] == ["tool", "assistant"]
    assert one.tools == tuple(tools)


def test_a_bare_list_of_turns_is_a_row(tmp_path: Path) -> None:
    for path in (
        write(tmp_path / "d.jsonl", [[USER, ANSWER], [USER, ANSWER]]),
        write(tmp_path / "d.json", [[USER, ANSWER], [USER, ANSWER]]),
    ):
        source = DataSource.open(path)
        assert [spoken(c) for c in source.conversations("train")] == [
            [("user", "q"), ("assistant", "a")]
        ] * 2
        assert source.chat and source.remarks() == ["shape: each row a list of messages"]


def test_of_prompts_and_completions_as_messages_the_completion_is_trained(tmp_path: Path) -> None:
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    source, (one,) = read(tmp_path, row)
    assert [m.trained for m in one.messages] == [False, False, False, True] and source.chat
    assert "(prompt + completion -> messages)" in source.remarks()[0]


def test_parts_of_text_are_joined_and_images_are_refused(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]
    _, (one,) = read(tmp_path, {"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert one.messages[0].text == "What is this?"
    parts[1] = {"type": "image_url", "image_url": {"url": "x"}}
    message = refused_row(tmp_path, {"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert message == "row 1: a part of a message is not a text, but 'image_url'"


@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}, {"training": False}])
def test_a_message_can_be_switched_off(tmp_path: Path, switch: dict[str, Any]) -> None:
    turns = [USER, {**ANSWER, **switch}, USER, {**ANSWER, "weight": 1, "train": True}]
    _, (one,) = read(tmp_path, {"messages": turns})
    assert [m.trained for m in one.messages] == [False, False, False, True]
    assert all(not m.fields for m in one.messages)
    message = refused_row(tmp_path, {"messages": turns[:2]})
    assert message == "row 1: no message that is trained on"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"weight": 0.5}, "'weight' of a message; allowed: 0 or 1; found 0.5"),
        ({"weight": True}, "'weight' of a message; allowed: 0 or 1; found True"),
        ({"train": 1}, "'train' of a message; allowed: false or true; found 1"),
        ({"training_detail": [1]}, "'training_detail' of a message: parts of one cannot be"),
        ({"role": "user", "train": True}, "'train' of a user message; only the assistant's"),
        ({"role": "bot"}, "unknown role; found 'bot'; allowed: system, developer, user, human"),
        ({"role": None}, "a message has no 'role' or 'from'; found the keys 'role', 'content'"),
        ({"content": None}, "the text of a message (assistant) is null; allowed: a text or a"),
        ({"content": " "}, "an assistant message is empty; there is nothing to learn from it"),
        ({"content": "\ud83d"}, "the text of a message (assistant) holds half a surrogate pair"),
        ({"name": "\ud83d"}, "a field of a message holds half a surrogate pair"),
        ({"tool_calls": [{"function": {}}]}, "a call of a function has no 'name'"),
        ({"tool_calls": "x"}, "a call of a function is a text that is not JSON"),
        (
            {"tool_calls": [{"name": "f", "arguments": "[1]"}]},
            "the arguments of a call are not an object; found a list",
        ),
    ],
)
def test_what_a_message_cannot_have_is_named(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    message = refused_row(tmp_path, {"messages": [USER, {**ANSWER, **change}]})
    assert message.startswith(f"row 1: {problem}")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": []}, "'messages' is an empty list of messages"),
        ({"messages": "x"}, "'messages' is not a list of messages; found a string"),
        ({"messages": ["x"]}, "a message is not an object; found a string"),
        ({"chat": []}, "no 'messages'; found the keys 'chat'"),
        (["x"], "a row is not an object with columns; found a list"),
        ({"messages": [USER]}, "no message that is trained on"),
        ({"messages": [USER, ANSWER], "tools": [1]}, "'tools' is not a list of functions"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "'tools' is a text that is not JSON"),
    ],
)
def test_what_a_conversation_cannot_be_is_named(tmp_path: Path, row: Any, problem: str) -> None:
    good = {"messages": [USER, ANSWER], "tools": None}
    message = refused_row(tmp_path, good, row)
    assert message.startswith(f"row 2: {problem}")


def test_to_be_tested_a_conversation_needs_no_answer(tmp_path: Path) -> None:
    source = DataSource.open(write(tmp_path / "d.jsonl", [{"messages": [USER]}]))
    (one,) = source.conversations("train", empty_answers=True)
    assert spoken(one) == [("user", "q")]


@pytest.mark.parametrize("weight", [0.5, 0, 2, "0.5"])
def test_rows_are_not_weighted(tmp_path: Path, weight: Any) -> None:
    row = {"Question": "q", "Answer": "a", "weight": 1}
    source, found = read(tmp_path, row, {**row, "weight": None})
    assert len(found) == 2 and "not used" not in source.remarks()[0]
    message = refused_row(tmp_path, row, {**row, "weight": weight})
    assert message == f"row 2: 'weight' of a row: rows are not weighted here; found {weight!r}"
    # Whoever names the columns says that this one is another.
    keys = {"question_key": "Question", "answer_key": "Answer"}
    source, found = read(tmp_path, row, {**row, "weight": weight}, **keys)
    assert len(found) == 2 and "columns not used: weight" in source.remarks()[0]


def test_a_system_message_is_put_in_front_where_there_is_none(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Mine."}, USER, ANSWER]
    _, found = read(tmp_path, {"messages": own}, {"messages": own[1:]}, system="Be brief.")
    assert [c.messages[0].text for c in found] == ["Mine.", "Be brief."]
    assert [c.messages[0].trained for c in found] == [False, False]
    plain, _ = read(tmp_path, *rows(2))
    source, found = read(tmp_path, *rows(2), system="Be brief.")
    assert spoken(found[0]) == [
        ("system", "Be brief."),
        ("user", PAIRS[0][0]),
        ("assistant", PAIRS[0][1]),
    ]
    other = DataSource.open(source.path, system="Be long.")
    assert len({plain.fingerprint, source.fingerprint, other.fingerprint}) == 3


def test_the_fingerprint_covers_which_columns_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"question": "q", "answer": "a", "other": "o"}])
    plain = DataSource.open(path).fingerprint
    named = DataSource.open(path, question_key="question", answer_key="answer").fingerprint
    assert plain == named != DataSource.open(path, answer_key="other").fingerprint


# -------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["d.jsonl", "D.JSONL", "d.ndjson", "d.json", "d.NDJSON"])
@pytest.mark.parametrize("packed", [False, True])
def test_json_lines_under_every_name(tmp_path: Path, name: str, packed: bool) -> None:
    content = gzip.compress(LINES.encode()) if packed else LINES
    assert pairs(write(tmp_path / (name + ".gz" * packed), content)) == PAIRS


@pytest.mark.parametrize("name", ["d.csv", "D.CSV", "d.tsv", "d.csv.gz", "d.TSV.GZ"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_under_every_name_with_every_delimiter(
    tmp_path: Path, name: str, delimiter: str
) -> None:
    lines = [("id", "Question", "Answer"), ("1", "Two, or; three|four\tfive?", 'So "it" is')]
    path = tmp_path / "plain"
    with path.open("w", newline="") as handle:
        csv.writer(handle, delimiter=delimiter).writerows(lines)
    content = path.read_bytes()
    packed = gzip.compress(content) if name.lower().endswith(".gz") else content
    assert pairs(write(tmp_path / name, packed)) == [lines[1][1:]]


def test_a_damaged_gz_file_is_refused(tmp_path: Path) -> None:
    content = gzip.compress(LINES.encode() * 100)
    assert "cannot be read: " in refused(write(tmp_path / "d.jsonl.gz", content[:-20]))
    assert "cannot be read: " in refused(write(tmp_path / "d.jsonl.gz", LINES))
    assert "allowed: .json, " in refused(write(tmp_path / "d.parquet.gz", content))


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x" / "d.jsonl", LINES)
    assert pairs("~/x/d.jsonl") == PAIRS
    assert pairs("~/x") == PAIRS
    assert "data.data_dir: ~nobody-of-that-name/x: " in refused("~nobody-of-that-name/x")


# ------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("name", ["val", "validation", "valid", "dev", "eval", "Valid"])
def test_validation_has_many_names(tmp_path: Path, name: str) -> None:
    one = write(tmp_path / "d.json", {"train": rows(3), name: rows(1)})
    write(tmp_path / "f" / "train.jsonl", LINES)
    write(tmp_path / "f" / f"{name}.jsonl", rows(1))
    for path in (one, tmp_path / "f"):
        source = DataSource.open(path)
        assert source.has("val") and pairs(path, "val") == PAIRS[:1]
        assert pairs(path, name) == PAIRS[:1]  # as data.split of test.yaml may be written
        assert source.remarks() == ["shape: pairs (Question -> question, Answer -> answer)"]


def test_two_names_of_one_split_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", {"train": rows(3), "dev": rows(1), "valid": []})
    assert refused(path) == f"{path}: found both 'dev' and 'valid'; keep one"
    folder = tmp_path / "f"
    for pair in (
        ("dev.jsonl", "valid.jsonl"),
        ("train.csv", "train.jsonl"),
        ("train-0.jsonl", "train.jsonl"),
        ("data/train.jsonl", "train.jsonl"),
        ("train-00000-of-00002.jsonl", "train-00001-of-00003.jsonl"),
    ):
        made = [write(folder / name, LINES) for name in pair]
        assert f"{folder}: {pair[0]} and {pair[1]} are both the split " in refused(folder)
        for one in made:
            one.unlink()
    write(folder / "train.json", {"train": rows(2), "test": rows(1)})
    write(folder / "test.json", rows(1))
    assert "test.json and train.json are both the split 'test'" in refused(folder)


def test_a_directory_of_json_files_named_by_split(tmp_path: Path) -> None:
    write(tmp_path / "train.json", rows(3))
    write(tmp_path / "test.json", rows(1))
    assert pairs(tmp_path) == PAIRS and pairs(tmp_path, "test") == PAIRS[:1]


def test_shards_are_read_in_order_also_in_a_data_folder(tmp_path: Path) -> None:
    for i in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9):
        write(tmp_path / "data" / f"train-{i:05}-of-00011.jsonl", rows(2, 2 * i))
    write(tmp_path / "data" / "validation-00000-of-00001.jsonl", rows(1))
    write(tmp_path / "dataset_infos.json", {})
    write(tmp_path / "README.md", "about")
    write(tmp_path / ".gitattributes", "")
    write(tmp_path / "notes.txt", "")
    write(tmp_path / "data" / "extra.jsonl", "")
    source = DataSource.open(tmp_path)
    found = list(source.conversations("train"))
    assert [(c.question, c.answer) for c in found] == [tuple(row.values()) for row in rows(22)]
    assert [c.row for c in found] == list(range(1, 23))
    assert source.has("val") and source.remarks()[1:] == [
        "files not used: notes.txt, data/extra.jsonl"
    ]
    before = source.fingerprint
    third = tmp_path / "data" / "train-00003-of-00011.jsonl"
    write(third, rows(2, 100))
    assert DataSource.open(tmp_path).fingerprint != before
    third.unlink()
    assert "of the 11 parts of the split 'train', 1 are not there" in refused(tmp_path)


def test_shards_without_their_number_are_ordered_as_numbers(tmp_path: Path) -> None:
    for i in (10, 9, 2):
        write(tmp_path / f"train_{i}.jsonl", rows(1, i))
    assert [q for q, _ in pairs(tmp_path)] == [rows(1, i)[0]["Question"] for i in (2, 9, 10)]


def test_the_only_file_of_a_directory_may_have_any_name(tmp_path: Path) -> None:
    write(tmp_path / "data" / "my-own.csv", "Question,Answer\nq,a\n")
    assert pairs(tmp_path) == [("q", "a")]
    write(tmp_path / "other.jsonl", LINES)
    assert "exactly one such file; found other.jsonl, my-own.csv" in refused(tmp_path)


def test_splits_that_nobody_reads_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", {"train": rows(3), "extra": rows(1), "spare, ": []})
    source = DataSource.open(path)
    assert source.remarks()[1:] == ["splits not used: extra, 'spare, '"]
    assert len(list(source.conversations("extra"))) == 1  # data.split of test.yaml
    assert source.remarks()[1:] == ["splits not used: 'spare, '"]


# ---------------------------------------------------------------------------- encodings

FOREIGN = [{"Question": "Qu’est-ce que c’est?", "Answer": "Un café noir, 咖啡"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "csv.gz"])
def test_utf8_and_utf16_are_read(tmp_path: Path, encoding: str, kind: str) -> None:
    text = json.dumps(FOREIGN if kind == "json" else FOREIGN[0], ensure_ascii=False)
    if kind.startswith("csv"):
        text = 'Question\tAnswer\r\n{Question}\t"{Answer}"\r\n'.format(**FOREIGN[0])
    content = ("\ufeff" * (encoding == "utf-16-be") + text).encode(encoding)
    path = write(tmp_path / f"d.{kind}", gzip.compress(content) if "gz" in kind else content)
    assert pairs(path) == [tuple(FOREIGN[0].values())]


@pytest.mark.parametrize("packed", [False, True])
def test_another_encoding_is_refused_with_its_line_and_a_command_that_works(
    tmp_path: Path, packed: bool
) -> None:
    text = "Question,Answer\nq,a\nQu’est-ce?,Un café noir\n"
    content = text.encode("cp1252")
    path = write(
        tmp_path / f"my d.csv{'.gz' * packed}", gzip.compress(content) if packed else content
    )
    before = path.read_bytes()
    message = refused(path)
    assert f"{path}, line 3: the byte 0x92 is not UTF-8; in Windows-1252 it is '’'" in message
    copy = follow(message, path)
    assert pairs(copy) == [("q", "a"), ("Qu’est-ce?", "Un café noir")]
    assert path.read_bytes() == before
    assert str(copy) not in refused(path)  # a second time, the copy is another one


def test_a_byte_that_no_character_of_windows_has_is_refused(tmp_path: Path) -> None:
    message = refused(write(tmp_path / "d.csv", b"Question,Answer\nq,\x81\n"))
    assert "line 2: the byte 0x81 is not UTF-8. A copy" in message


def test_utf16_without_its_mark_is_refused_with_a_command_that_works(tmp_path: Path) -> None:
    for encoding in ("utf-16-le", "utf-16-be"):
        path = write(tmp_path / f"{encoding}.jsonl", LINES, encoding)
        assert pairs(follow(refused(path), path)) == PAIRS
    message = refused(write(tmp_path / "d.csv", b"\xff\xfeQ\x00\x00\xd8"))
    assert "d.csv: begins as UTF-16" in message


def follow(message: str, path: Path) -> Path:
    """Run the command at the end of a message; returns the file that it makes."""
    before = set(path.parent.iterdir())
    command = message.rpartition(": ")[2]
    subprocess.run(command, shell=True, check=True)
    (made,) = set(path.parent.iterdir()) - before
    return made


# ---------------------------------------------------------------------------------- CSV


def csv_file(tmp_path: Path, *lines: str) -> Path:
    return write(tmp_path / "d.csv", "\n".join(lines) + "\n")


def test_quotes_behind_a_space_are_quotes(tmp_path: Path) -> None:
    for header in ('"Question", "Answer"', "Question,Answer", "Question, Answer"):
        path = csv_file(tmp_path, header, '"How, many?", "1 ""apple"""', '"q", "a"')
        assert pairs(path) == [("How, many?", '1 "apple"'), ("q", "a")]
    path = csv_file(tmp_path, "Question, Answer", "How many?, 1 apple")
    assert pairs(path) == [("How many?", "1 apple")]


def test_backslashes_before_quotes_are_read_right(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "Question,Answer", r'"He said \"Hi\", \\o/","1"', r'"\"","2"')
    assert pairs(path) == [(r'He said "Hi", \o/', "1"), ('"', "2")]
    path = csv_file(tmp_path, "Question,Answer", r'"He said \"Hi\"",1', r"\frac,2")
    assert 'd.csv, line 3: in this file \\" stands for a quote' in refused(path)
    path = csv_file(tmp_path, "Question,Answer", r'"in C:\",\frac', r"\n,C:\new")  # none escapes
    assert pairs(path) == [("in C:\\", "\\frac"), ("\\n", "C:\\new")]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["q,a", 'How wide?,"12 inches', "q,a"], "line 3: a quote opens in this row and is never"),
        (['How wide?,"12 inches', "q,a", 'r,"b, c"'], "line 2: a text goes on behind the quote"),
        (['"a\nb",c', 'a 12" board,c', "q,a"], "line 4: a quote within a text that does not begin"),
        (['"He said "hi" to",a'], "line 2: a text goes on behind the quote that ends it"),
    ],
)
def test_a_stray_quote_is_refused_with_its_line(
    tmp_path: Path, lines: list[str], problem: str
) -> None:
    message = refused(csv_file(tmp_path, "Question,Answer", *lines))
    assert f"d.csv, {problem}" in message and "twice" in message


def test_what_is_written_in_another_way_far_down_is_refused(tmp_path: Path) -> None:
    many = ["q,a"] * files.CSV_SAMPLE
    path = csv_file(tmp_path, "Question,Answer", *many, 'q, "a"')
    assert f"d.csv, line {len(many) + 2}: a quote within a text" in refused(path)


def test_a_header_given_twice_is_refused(tmp_path: Path) -> None:
    message = refused(csv_file(tmp_path, "Question,Answer,Answer", "q,a,checked"))
    assert "d.csv, line 1: two columns have the name 'Answer'" in message
    path = csv_file(tmp_path, "Question,Answer,,", "q,a,,")  # as Excel leaves empty columns
    assert pairs(path) == [("q", "a")]


def test_the_line_that_names_the_delimiter_is_none_of_data(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", "\ufeffsep=;\r\nQuestion;Answer\r\nq, r;a\r\n")
    assert pairs(path) == [("q, r", "a")]
    write(path, 'sep=;\nQuestion;Answer\nq;"a\n')
    assert "d.csv, line 3: a quote opens" in refused(path)


def test_a_file_without_a_header_loses_no_row(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "How many are 0 and 1?,1 apple", "And 2?,3 apples")
    message = refused(path)
    assert "found the columns 'How many are 0 and 1?', '1 apple'" in message
    assert "question_key: NAME" in message and f"a copy such as {tmp_path}/d-named.csv" in message


def test_the_delimiter_is_the_one_that_makes_even_rows(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "Question;Answer", "a, b;c", "d;e, f, g")
    assert pairs(path) == [("a, b", "c"), ("d", "e, f, g")]
    path = csv_file(tmp_path, "id;Question (a, b or c);Answer", "1;q;a", "2;q, r;s")
    assert pairs(path, question_key="Question (a, b or c)") == [("q", "a"), ("q, r", "s")]
    path = csv_file(tmp_path, '"Question, in full",Answer', "q, a")
    assert pairs(path, question_key="Question, in full") == [("q", " a")]
    path = csv_file(tmp_path, "Question;b,Answer", "q;2,a")
    assert "d.csv, line 1: the columns may be separated by ',' or ';'" in refused(path)
    path = csv_file(tmp_path, "sep=,", "Question;b,Answer", "q;2,a")
    assert pairs(path, question_key="Question;b") == [("q;2", "a")]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("Where?,Paris, France", "more columns than the header; a text with a comma stands in"),
        ("Where?", "fewer columns than the header"),
    ],
)
def test_rows_of_another_width_are_named(tmp_path: Path, row: str, problem: str) -> None:
    message = refused(csv_file(tmp_path, "Question,Answer", "q,a", "", row, row))
    assert "2 of 3 rows" in message and f"rows 2, 3: {problem}" in message


CELL = st.text(st.sampled_from('ab ,;\t|"\n\\é'), max_size=8)


@BOUNDED
@given(st.lists(st.tuples(CELL, CELL.filter(str.strip)), min_size=1, max_size=5))
def test_what_pythons_csv_module_writes_is_read_or_refused_but_never_another(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("csv") / "d.csv"
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        with path.open("w", newline="", encoding="utf-8") as handle:
            csv.writer(handle, quoting=quoting).writerows([("Question", "Answer"), *cells])
        assert pairs(path) == cells


# ------------------------------------------------------------------------------ Parquet


def parquet(path: Path, records: list[dict[str, Any]], row_group: int = 1000) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.Table.from_pylist(records), path, row_group_size=row_group)
    return path


def test_parquet_is_read(tmp_path: Path) -> None:
    assert pairs(parquet(tmp_path / "d.parquet", rows(2500), row_group=700)) == [
        tuple(row.values()) for row in rows(2500)
    ]
    folder = tmp_path / "hf"
    for i in range(2):
        parquet(folder / "data" / f"train-{i:05}-of-00002.parquet", rows(2, 2 * i))
    assert pairs(folder) == [tuple(row.values()) for row in rows(4)]
    # A column of messages has all fields in each, most of them null.
    turns = [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "name": "x"}]
    source = DataSource.open(parquet(tmp_path / "m.parquet", [{"messages": turns, "n": 1}]))
    (one,) = source.conversations("train")
    assert [m.trained for m in one.messages] == [False, False, False, True]
    assert [dict(m.fields) for m in one.messages] == [{}, {}, {}, {"name": "x"}]
    assert "columns not used: n" in source.remarks()[0]
    numbers = [{"Question": "q", "Answer": 7}, {"Question": "q", "Answer": None}]
    assert "row 2: 'Answer' is null" in refused(parquet(tmp_path / "n.parquet", numbers))
    assert "cannot be read as Parquet" in refused(write(tmp_path / "b.parquet", b"PAR1 no"))


def test_without_pyarrow_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refused(write(tmp_path / "d.parquet", b"PAR1"))
    assert "pip install -r requirements-data.txt" in message
    assert "pyarrow" in (ROOT / "requirements-data.txt").read_text()


# ----------------------------------------------------------------------------- the hub

SHA = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = {
    "README.md": b"about",
    "data/train-00000-of-00001.jsonl": LINES.encode(),
    "data/test-00000-of-00001.jsonl": json.dumps(rows(1)[0]).encode(),
    "model.bin": b"not wanted",
}


class Hub(BaseHTTPRequestHandler):
    """The four questions that huggingface_hub asks about a dataset repository, org/facts."""

    fetched: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        place, _, name = self.path.partition(f"/resolve/{SHA}/")
        if name and place == "/datasets/org/facts":
            self.fetched.append(name)
            self.answer(200, REPOSITORY[name])
        elif "/tree/" in self.path and "org/facts" in self.path:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": "1" * 40}
                for name, content in REPOSITORY.items()
            ]
            self.answer(200, json.dumps(entries).encode())
        elif self.path.startswith("/api/datasets/org/facts"):
            files = [{"rfilename": name} for name in REPOSITORY]
            info = {"id": "org/facts", "sha": SHA, "siblings": files}
            self.answer(200, json.dumps(info).encode())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, code: int, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{hash(content) & 0xFFFFFF:040x}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.fetched.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


READ_FROM_HUB = """
import json, sys
from config import UserError
from extras.formats import DataSource
try:
    source = DataSource.open(sys.argv[1])
    found = [c.question for split in ("train", "test") for c in source.conversations(split)]
    print(json.dumps([found, source.remarks()]))
except UserError as error:
    print(json.dumps(str(error)))
"""


def from_hub(name: str, endpoint: str, home: Path) -> Any:
    """What a process of its own reads: huggingface_hub looks at the endpoint when imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    environment |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", READ_FROM_HUB, name]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_fetched_and_kept(hub: str, tmp_path: Path) -> None:
    asked = [question for question, _ in PAIRS]
    expected = [[*asked, asked[0]], ["shape: pairs (Question -> question, Answer -> answer)"]]
    assert from_hub("hub:org/facts", hub, tmp_path) == expected
    assert set(Hub.fetched) == {n for n in REPOSITORY if n.endswith(".jsonl")}
    Hub.fetched.clear()
    assert from_hub("hub:org/facts", hub, tmp_path) == expected
    assert Hub.fetched == []
    message = from_hub("hub:org/absent", hub, tmp_path)
    assert message.startswith("data.data_dir: hub:org/absent: cannot be fetched as a dataset")
    assert "\n" not in message
    message = from_hub("hub:../x", hub, tmp_path)
    assert message.startswith("data.data_dir: hub:../x: cannot be fetched as a dataset")


def test_without_a_network_the_hub_is_named(tmp_path: Path) -> None:
    message = from_hub("hub:org/facts", "http://127.0.0.1:9", tmp_path)
    assert message.startswith("data.data_dir: hub:org/facts: cannot be fetched as a dataset")


# ------------------------------------------------------------------------ the command line


def test_train_and_test_announce_the_shape_and_what_is_not_used(
    run: Runner, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "mine"
    records = [{"id": i, "prompt": f"q{i}", "completion": i} for i in range(8)]
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl", "old.jsonl"):
        write(folder / name, records)
    directory = run(data=folder, trainer__params__max_steps=1)
    shown = capsys.readouterr().out
    shape = "shape: pairs (prompt -> question, completion -> answer), columns not used: id"
    for line in (shape, "files not used: old.jsonl", "train: 8 texts are numbers, read as written"):
        assert f"          {line}\n" in shown
    assert "8 samples to train, 8 to validate" in shown  # nothing was held out
    config = {
        "data": {"data_dir": str(folder)},
        "model_name": str(directory),
        "test_params": {"log_file": str(tmp_path / "log.jsonl")},
        "generate_params": {"max_new_tokens": 2},
    }
    assert cli("test", write_yaml(tmp_path / "t.yaml", config)) == 0
    shown = capsys.readouterr().out
    assert shape in shown and "test: 8 texts are numbers" in shown
    run(code=2, data=write(tmp_path / "d.csv", 'Question,Answer\nq,"a\n'))
    assert "d.csv, line 2: a quote opens" in capsys.readouterr().err
