"""Shapes of data: what the columns of a row mean, and the conversation that it is.

    source = DataSource.open("data/facts.json")
    for conversation in source.conversations("train"):
        ...

`recognise` looks at the first rows and gives one of two shapes, `Pairs` or `Turns`; every row is
then read as that shape or is a problem. Where the columns can mean several things there is no
guess: the message says which columns there are and how to name them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

from checkpoint import sha256_of
from config import TestData, TrainData, UserError
from data import Conversation, Message, numbered
from extras.files import BadRow, Table, copy_of, ending, find, kind_of, some, split_name

FIRST_ROWS = 1000  # that the shape is recognised from
USED_SPLITS = ("train", "val", "test")

# Names of columns, in small letters, that say which of the two a text is.
QUESTIONS = ("question", "prompt", "query", "instruction", "input", "problem")
ANSWERS = ("answer", "completion", "response", "output", "solution", "target")
CONTEXTS = ("input", "context")  # what an instruction is about: Alpaca's name and Dolly's

ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class RowProblem(Exception):
    """Why a row cannot be used. Rows are grouped by `kind`; `example` is of one of them."""

    def __init__(self, kind: str, example: str = "") -> None:
        super().__init__(f"{kind}; {example}" if example else kind)
        self.kind = kind


@dataclass
class Reading:
    """One pass over the rows of a split: what it allows, and what it counts.

    empty_answers: an answer may be empty, and a conversation without one: a model is to give it.
    """

    empty_answers: bool = False
    numbers: int = 0

    def text(self, record: Any, key: str) -> str:
        """A column's text.

        Raises:
            RowProblem: there is none.
        """
        if type(record) is not dict:
            raise _no_object(record)
        try:
            value = record[key]
        except KeyError:
            found = ", ".join(map(repr, record)) or "(none)"
            raise RowProblem(f"no {key!r}", f"found the keys {found}") from None
        if type(value) is str and value.isascii():
            return value
        return self.text_of(value, repr(key))

    def text_of(self, value: Any, name: str) -> str:
        """A text, or a number as it is written; `name` stands for it in a message."""
        if isinstance(value, str):
            return _checked(value, name)
        if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
            if isinstance(value, float) and not math.isfinite(value):
                raise RowProblem(f"{name} is a number that is none", f"found {value}")
            self.numbers += 1
            return str(value)
        raise RowProblem(f"{name} is {kind_of(value)}; allowed: a text or a number")


def _no_object(record: Any) -> RowProblem:
    if isinstance(record, BadRow):
        return RowProblem(record.problem)
    return RowProblem("a row is not an object with columns", f"found {kind_of(record)}")


def _checked(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowProblem(f"{name} holds half a surrogate pair, which is not a character") from None
    return text


# ------------------------------------------------------------------------------------ shapes


class Shape(Protocol):
    """What the columns of a row mean.

    title: for the line that announces it. columns: those that are used. chat: rows are
    conversations, not pairs of a question and an answer.
    """

    @property
    def title(self) -> str: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def chat(self) -> bool: ...

    def read(self, row: int, record: Any, reading: Reading) -> Conversation:
        """The conversation of a row; raises RowProblem."""


@dataclass(frozen=True)
class Pairs:
    """A question and an answer, each in a column of its own.

    context: Alpaca's `input` or Dolly's `context`, which goes on with the question. system,
    history: columns with a system message and with earlier questions and answers.
    """

    question: str
    answer: str
    kind: str = "pairs"
    context: str | None = None
    system: str | None = None
    history: str | None = None

    @property
    def title(self) -> str:
        asked = " + ".join(filter(None, (self.question, self.context)))
        more = "".join(
            f", {column} -> {meaning}"
            for column, meaning in ((self.system, "system message"), (self.history, "first turns"))
            if column
        )
        return f"{self.kind} ({asked} -> question, {self.answer} -> answer{more})"

    @property
    def columns(self) -> tuple[str, ...]:
        names = (self.question, self.answer, self.context, self.system, self.history)
        return tuple(name for name in names if name is not None)

    @property
    def chat(self) -> bool:
        return bool(self.system or self.history)

    def read(self, row: int, record: Any, reading: Reading) -> Conversation:
        question = reading.text(record, self.question)
        answer = reading.text(record, self.answer)
        if not reading.empty_answers and not answer.strip():
            raise RowProblem(f"{self.answer!r} is empty; there is nothing to learn from it")
        if self.context:
            context = _optional(record, self.context, reading)
            question = f"{question}\n{context}" if context else question
        pair = Conversation.of_pair(row, question, answer)
        if not self.chat:
            return pair
        before = _system(_optional(record, self.system, reading)) if self.system else ()
        if self.history:
            before += _history(record.get(self.history), self.history, reading)
        return pair._replace(messages=before + pair.messages)


def _optional(record: dict[str, Any], key: str, reading: Reading) -> str:
    value = record.get(key)
    return "" if value is None else reading.text_of(value, repr(key))


def _system(text: str) -> tuple[Message, ...]:
    return (Message("system", text),) if text.strip() else ()


def _history(turns: Any, name: str, reading: Reading) -> tuple[Message, ...]:
    """The messages of a list of [question, answer]."""
    messages: list[Message] = []
    wanted = f"{name!r} is not a list of questions with answers"
    if not isinstance(turns or [], list):
        raise RowProblem(wanted, f"found {kind_of(turns)}")
    for turn in turns or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowProblem(wanted, f"it holds {kind_of(turn)}")
        question, answer = (reading.text_of(text, f"a text in {name!r}") for text in turn)
        messages += [Message("user", question), Message("assistant", answer, trained=True)]
    return tuple(messages)


@dataclass(frozen=True)
class Turns:
    """A list of messages, in a column or as the row itself (`column` is None).

    context: a column of messages before them, none of which is trained on. system, tools: columns
    with a system message and with the functions that the model may call.
    """

    column: str | None
    kind: str
    context: str | None = None
    system: str | None = None
    tools: str | None = None
    chat: bool = True

    @property
    def title(self) -> str:
        parts = [f"{' + '.join(filter(None, (self.context, self.column)))} -> messages"]
        parts += [f"{name} -> system message" for name in [self.system] if name]
        parts += [f"{name} -> tools" for name in [self.tools] if name]
        return self.kind if self.column is None else f"{self.kind} ({', '.join(parts)})"

    @property
    def columns(self) -> tuple[str, ...]:
        names = (self.context, self.column, self.system, self.tools)
        return tuple(name for name in names if name is not None)

    def read(self, row: int, record: Any, reading: Reading) -> Conversation:
        messages = _messages(record, self.column, reading)
        if self.context:
            asked = _messages(record, self.context, reading)
            messages = [message._replace(trained=False) for message in asked] + messages
        if self.system:
            text = _optional(record, self.system, reading)
            if messages[0].role != "system":
                messages = [*_system(text), *messages]
            elif text not in ("", messages[0].text):
                raise RowProblem(f"two system messages, one in {self.system!r}")
        if not reading.empty_answers and not any(message.trained for message in messages):
            raise RowProblem("no message that is trained on")
        return Conversation(row, tuple(messages), _tools(record, self.tools))


def _messages(record: Any, column: str | None, reading: Reading) -> list[Message]:
    turns, name = record, "a row"
    if column is not None:
        if not isinstance(record, dict):
            raise _no_object(record)
        if column not in record:
            found = ", ".join(map(repr, record)) or "(none)"
            raise RowProblem(f"no {column!r}", f"found the keys {found}")
        turns, name = record[column], repr(column)
    if not isinstance(turns, list):
        raise RowProblem(f"{name} is not a list of messages", f"found {kind_of(turns)}")
    if not turns:
        raise RowProblem(f"{name} is an empty list of messages")
    return [_message(turn, reading) for turn in turns]


def _message(turn: Any, reading: Reading) -> Message:
    """A turn as {"role": ..., "content": ...} or {"from": ..., "value": ...}."""
    if not isinstance(turn, dict):
        raise RowProblem("a message is not an object", f"found {kind_of(turn)}")
    fields = {name: value for name, value in turn.items() if value is not None}
    named = next((name for name in ("role", "from") if name in fields), None)
    if named is None:
        found = ", ".join(map(repr, turn)) or "(none)"
        raise RowProblem("a message has no 'role' or 'from'", f"found the keys {found}")
    party = fields.pop(named)
    role = ROLES.get(party) if isinstance(party, str) else None
    if role is None:
        raise RowProblem("unknown role", f"found {party!r}; allowed: {', '.join(ROLES)}")
    trained = _is_trained(fields, role)
    content = fields.pop("content" if "content" in fields else "value", None)
    if party == "function_call":
        fields["tool_calls"], content = _calls(content), None
    elif "function_call" in fields:  # how OpenAI wrote one call before there were several
        fields["tool_calls"] = _calls(fields.pop("function_call"))
    elif calls := fields.pop("tool_calls", None):  # some write an empty list for none
        fields["tool_calls"] = _calls(calls)
    if content is None and fields.get("tool_calls"):
        content = ""
    text = _content(content, role, reading)
    if trained and not text.strip() and not fields.get("tool_calls") and not reading.empty_answers:
        raise RowProblem("an assistant message is empty; there is nothing to learn from it")
    return (
        Message(role, text, trained, _encodable(fields)) if fields else Message(role, text, trained)
    )


def _is_trained(fields: dict[str, Any], role: str) -> bool:
    """Take the switches out of a message's fields; assistant messages are trained without one."""
    if "training_detail" in fields:
        raise RowProblem("'training_detail' of a message: parts of one cannot be switched off")
    trained = role == "assistant"
    for name, allowed in (
        ("weight", (0, 1)),
        ("train", (False, True)),
        ("training", (False, True)),
    ):
        if name not in fields:
            continue
        value = fields.pop(name)
        if isinstance(value, bool) != isinstance(allowed[0], bool) or value not in allowed:
            wanted = " or ".join(map(json.dumps, allowed))
            raise RowProblem(f"{name!r} of a message; allowed: {wanted}", f"found {value!r}")
        if value and role != "assistant":
            raise RowProblem(f"{name!r} of a {role} message; only the assistant's are trained on")
        trained = trained and bool(value)
    return trained


def _content(content: Any, role: str, reading: Reading) -> str:
    """A message's text, also when it is a list of parts."""
    name = f"the text of a message ({role})"
    if not isinstance(content, list):
        return reading.text_of(content, name)
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else kind_of(part)
        if kind != "text":
            raise RowProblem(f"a part of a message is not a text, but {kind!r}")
        texts.append(reading.text_of(part.get("text"), name))
    return "".join(texts)


def _calls(value: Any) -> list[dict[str, Any]]:
    """Calls of functions as chat templates take them: OpenAI's form, with arguments as objects."""
    value = _parsed(value, "a call of a function")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowProblem("a call of a function has no 'name'", f"found {kind_of(call)}")
        arguments = _parsed(function.get("arguments") or {}, "the arguments of a call")
        if not isinstance(arguments, dict):
            raise RowProblem(
                "the arguments of a call are not an object", f"found {kind_of(arguments)}"
            )
        around = call if function is not call else {}
        function = {**function, "arguments": arguments}
        calls.append({"type": "function", **around, "function": function})
    return calls


def _tools(record: Any, column: str | None) -> tuple[Mapping[str, Any], ...]:
    """The functions that the model may call, as a list or as JSON in a text."""
    value = record.get(column) if column else None
    if not value:
        return ()
    tools = _parsed(value, repr(column))
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowProblem(f"{column!r} is not a list of functions", f"found {kind_of(tools)}")
    # Templates expect OpenAI's form, in which each is named a function.
    wrapped = [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
        for tool in tools
    ]
    return tuple(_encodable(tool) for tool in wrapped)


def _parsed(value: Any, name: str) -> Any:
    """A value that may be written as JSON in a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowProblem(f"{name} is a text that is not JSON") from None


def _encodable(fields: dict[str, Any]) -> dict[str, Any]:
    try:
        _checked(json.dumps(fields, ensure_ascii=False), "a field of a message")
    except (TypeError, ValueError, RecursionError):
        raise RowProblem("a field of a message cannot be written as JSON") from None
    return fields


# ------------------------------------------------------------------------------- recognising


def recognise(
    rows: list[Any], question_key: str | None, answer_key: str | None, file: Path
) -> Shape:
    """The shape of a file's first rows.

    Args:
        question_key, answer_key: names of columns that the user has given.

    Raises:
        UserError: it is not clear.
    """
    columns = columns_of(rows)
    known = {name.lower(): name for name in columns}
    if question_key is None and answer_key is None:
        if not columns and any(isinstance(row, list) for row in rows):
            return Turns(None, "each row a list of messages")
        shape = _turns(rows, known) or _instructions(columns, known)
        if shape is not None:
            return shape
    question = [question_key] if question_key else _named(columns, QUESTIONS)
    answer = [answer_key] if answer_key else _named(columns, ANSWERS)
    if len(question) == len(answer) == 1:
        return Pairs(question[0], answer[0])
    raise UserError(_unclear(columns, file))


def columns_of(rows: list[Any]) -> list[str]:
    """The names of all columns that some row has."""
    names: dict[str, None] = {}
    for row in rows:
        if isinstance(row, (dict, BadRow)):
            names |= dict.fromkeys(row if isinstance(row, dict) else row.columns)
    return list(names)


def _named(columns: list[str], names: tuple[str, ...]) -> list[str]:
    return [column for column in columns if column.lower() in names]


def _turns(rows: list[Any], known: dict[str, str]) -> Turns | None:
    """Columns that hold lists of messages."""

    def holds_messages(name: str) -> bool:
        if name not in known:
            return False
        values = (row.get(known[name]) for row in rows if isinstance(row, dict))
        value = next(filter(None, values), None)
        return isinstance(value, list) and all(isinstance(turn, dict) for turn in value)

    system, tools = known.get("system"), known.get("tools", known.get("functions"))
    for name in ("messages", "conversations", "conversation"):
        if holds_messages(name):
            kind = "OpenAI" if name == "messages" else "ShareGPT"
            return Turns(known[name], f"{kind} {name}", system=system, tools=tools)
    if holds_messages("prompt") and holds_messages("completion"):
        kind = "prompts and completions as messages"
        return Turns(known["completion"], kind, known["prompt"], system, tools)
    return None


def _instructions(columns: list[str], known: dict[str, str]) -> Pairs | None:
    """Alpaca's and Dolly's columns."""
    context, answer = _named(columns, CONTEXTS), _named(columns, ANSWERS)
    if "instruction" not in known or len(context) > 1 or len(answer) != 1:
        return None
    kind = {"output": "Alpaca", "response": "Dolly"}.get(answer[0].lower(), "instructions")
    return Pairs(
        known["instruction"],
        answer[0],
        kind,
        context[0] if context else None,
        known.get("system"),
        known.get("history"),
    )


def _unclear(columns: list[str], file: Path) -> str:
    """Which columns there are, and how to say what they mean."""
    found = ", ".join(map(repr, columns)) or "none"
    lines = [
        f"{file}: which column is the question and which the answer is not clear; "
        f"found the columns {found}",
        "  two lines under `data:` of the YAML say so, with the names of two of these columns:",
        "    question_key: NAME",
        "    answer_key: NAME",
    ]
    if ending(file) in (".csv", ".tsv"):
        lines.append(
            "  if that is a row already, put a line with the names of the columns in front of it, "
            f"in a copy such as {copy_of(file, 'named')}"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ a source


@dataclass(frozen=True)
class DataSource:
    """Where each split's rows are, and how they become conversations.

    JSON files are held in memory, the others are streamed. question_key, answer_key: names of
    columns, where they are not recognised. system: put in front of conversations that begin
    without a system message. numbers: of the splits that were read, how many texts were numbers.
    """

    path: Path
    splits: dict[str, list[Table]]
    question_key: str | None = None
    answer_key: str | None = None
    system: str | None = None
    unused_files: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        data_dir: str | Path,
        question_key: str | None = None,
        answer_key: str | None = None,
        system: str | None = None,
    ) -> DataSource:
        """Find the splits of a file, of a directory, or of "hub:ORG/NAME".

        Raises:
            UserError: missing or broken file, or one that does not have the expected shape.
        """
        found = find(data_dir)
        return cls(found.path, found.splits, question_key, answer_key, system, found.unused)

    @classmethod
    def configured(
        cls, data: TrainData | TestData, trained_system: str | None = None
    ) -> DataSource:
        """`open` as a configuration's `data` section says.

        Args:
            trained_system: the system message of the model's training, where that section has none.
        """
        system = trained_system if data.system is None else data.system
        return cls.open(data.data_dir, data.question_key, data.answer_key, system)

    def rows(self, split: str) -> Iterator[Any]:
        for table in self.splits.get(split, []):
            yield from table.rows()

    def has(self, split: str) -> bool:
        """Whether the split is there and has a row; an empty one counts as absent."""
        return next(self.rows(split), None) is not None

    @functools.cached_property
    def first_rows(self) -> tuple[Path, list[Any]]:
        """The file and the rows that show what the columns are."""
        for split in dict.fromkeys([*USED_SPLITS, *self.splits]):
            rows = list(itertools.islice(self.rows(split), FIRST_ROWS))
            if rows:
                return self.splits[split][0].file, rows
        return self.path, []

    @functools.cached_property
    def shape(self) -> Shape:
        """What the columns mean.

        Raises:
            UserError: it is not clear.
        """
        file, rows = self.first_rows
        return recognise(rows, self.question_key, self.answer_key, file)

    @functools.cached_property
    def weighted(self) -> bool:
        """Whether rows have a weight, which may only be 1; where columns are named, none counts."""
        named = self.question_key or self.answer_key
        return not named and "weight" in columns_of(self.first_rows[1])

    @property
    def chat(self) -> bool:
        """Whether the rows are conversations, not pairs of a question and an answer."""
        return self.shape.chat

    def conversations(self, split: str, *, empty_answers: bool = False) -> Iterator[Conversation]:
        """The conversations of a split, in file order.

        Args:
            empty_answers: as in `Reading`.

        Raises:
            UserError: an absent split, columns that are not clear, or rows that cannot be used.
                The message names the first few row numbers of each kind of problem.
        """
        split = split_name(split)
        if split not in self.splits:
            raise UserError(f"{self.path}: no split {split!r}; found {', '.join(self.splits)}")
        tables = self.splits[split]
        name = str(tables[0].file if len(tables) == 1 else self.path)
        if not self.has(split):
            raise UserError(f"{name}: the split {split!r} is empty")
        shape, reading = self.shape, Reading(empty_answers)
        system = Message("system", self.system) if self.system else None
        problems: dict[str, tuple[RowProblem, list[int]]] = {}
        row = 0
        for row, record in enumerate(self.rows(split), start=1):
            try:
                conversation = shape.read(row, record, reading)
                if self.weighted:
                    _refuse_weight(record)
            except RowProblem as problem:
                problems.setdefault(problem.kind, (problem, []))[1].append(row)
                continue
            if system and conversation.messages[0].role != "system":
                messages = (system, *conversation.messages)
                conversation = conversation._replace(messages=messages)
            if not problems:
                yield conversation
        if problems:
            count = sum(len(rows) for _, rows in problems.values())
            lines = [f"  {numbered(rows)}: {problem}" for problem, rows in problems.values()]
            raise UserError(
                f"{name}: {count} of {row} rows of {split!r} cannot be used "
                "(rows count from 1)\n" + "\n".join(lines)
            )
        self.numbers[split] = reading.numbers

    def remarks(self) -> list[str]:
        """What a user should know of the data: its shape, and all that is not used."""
        used = {*self.shape.columns, *(["weight"] if self.weighted else [])}
        unused = [_shown(name) for name in columns_of(self.first_rows[1]) if name not in used]
        lines = [f"shape: {self.shape.title}"]
        if unused:
            lines[0] += f", columns not used: {', '.join(unused)}"
        others = [_shown(s) for s in self.splits if s not in USED_SPLITS and s not in self.numbers]
        if others:
            lines.append(f"splits not used: {', '.join(others)}")
        if self.unused_files:
            lines.append(f"files not used: {some(self.unused_files)}")
        for split, count in self.numbers.items():
            if count:
                texts = "text is a number" if count == 1 else "texts are numbers"
                lines.append(f"{split}: {count:,} {texts}, read as written")
        return lines

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the contents of the files, not over their paths, and what they mean."""
        parts = [*self.shape.columns]
        # A file that holds several splits is read once.
        held = [(split, table) for split, tables in sorted(self.splits.items()) for table in tables]
        for file, (split, table) in {table.file: (split, table) for split, table in held}.items():
            # Each by itself: a row moved from one split's end to the next one's start counts.
            parts += [split if table.content is None else "", ending(file), sha256_of(file)]
        parts += [self.system] if self.system else []
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _shown(name: str) -> str:
    return name if name.isprintable() and name.strip(" ,") == name != "" else repr(name)


def _refuse_weight(record: dict[str, Any]) -> None:
    weight = record.get("weight")
    if weight not in (None, 1, "1", ""):
        raise RowProblem("'weight' of a row: rows are not weighted here", f"found {weight!r}")


def overlap(source: DataSource) -> dict[str, int]:
    """Counts for a warning: rows that stand twice in `train`, questions also in `test`.

    A question is all that stands before the first answer. Eight bytes of a hash stand for each
    text, so that a million rows need little memory; the chance that two different ones meet is
    then about 1 in 30 million.
    """

    def digest(*messages: Message) -> bytes:
        text = "\0".join(m.text + repr(m.fields) if m.fields else m.text for m in messages)
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    def asked(conversation: Conversation) -> bytes:
        before = itertools.takewhile(lambda m: m.role != "assistant", conversation.messages)
        return digest(*before)

    whole: set[bytes] = set()
    questions: set[bytes] = set()
    total = 0
    for conversation in source.conversations("train"):
        total += 1
        whole.add(digest(*conversation.messages))
        questions.add(asked(conversation))
    shared = 0
    if source.has("test"):  # an empty one is no reason not to train
        tested = source.conversations("test", empty_answers=True)
        shared = sum(asked(conversation) in questions for conversation in tested)
    return {"duplicates": total - len(whole), "train_test_overlap": shared}
