"""Files of data as people have them: which splits they hold, and what is wrong with a row.

`find_splits` and `records` read .json, .jsonl and .csv; `problem` and `advice` speak about a row
that is no question with an answer. data.py makes conversations of the rows.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import UserError
from extras.model_checks import refuse_lfs_pointer

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"validation": "val"}
CSV_FIELD = 2**31 - 1  # characters; Python's own limit is 131,072
SHAPE = '{"train": [{"Question": "...", "Answer": "..."}, ...], "test": [...]} ("val" is optional)'


def split_name(name: str) -> str:
    return SPLIT_NAMES.get(name, name)


def find_splits(path: Path) -> dict[str, list[Any] | Path]:
    """The rows of each split, or the .jsonl or .csv file that they are in.

    Raises:
        UserError: missing or broken file, or one that does not have the expected shape.
    """
    try:
        path.stat()
    except (OSError, ValueError) as error:  # absent, forbidden, too long or not a path at all
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"data.data_dir: {path}: {reason.lower()}") from None
    files = [path]
    if path.is_dir():
        named = [
            p
            for p in sorted(path.iterdir())
            if p.suffix in (".jsonl", ".csv") and split_name(p.stem) in SPLITS
        ]
        files = named or sorted(path.glob("*.json"))
        if not files or (len(files) > 1 and not named):
            found = ", ".join(p.name for p in files) or "none of these"
            raise UserError(
                f"data.data_dir: {path}: a directory must hold train.jsonl (and val.jsonl, "
                f"test.jsonl; or .csv), or exactly one .json file; found {found}"
            )
    splits: dict[str, list[Any] | Path] = {}
    for file in files:
        refuse_lfs_pointer(file)
        if file.suffix == ".json":
            splits.update(_read_json(file))
        elif file.suffix in (".jsonl", ".csv"):
            name = split_name(file.stem) if path.is_dir() else "train"
            if name in splits:
                raise UserError(
                    f"data.data_dir: {path}: {file.name} and {Path(str(splits[name])).name} "
                    f"are both the split {name!r}; keep one of them"
                )
            splits[name] = file
        else:
            raise UserError(f"{file}: found {file.suffix!r}; allowed: .json, .jsonl or .csv")
    return splits


def _read_json(file: Path) -> dict[str, list[Any] | Path]:
    try:
        with file.open(encoding="utf-8-sig") as handle:
            content: Any = json.load(handle, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        hint = "; one object a line? Then name it .jsonl" if error.msg == "Extra data" else ""
        raise UserError(
            f"{file}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}{hint}"
        ) from None
    except (UnicodeDecodeError, OSError, RecursionError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 JSON: {_reason(error)}") from None
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        content = {"train": content}
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file}: found {_kind(content)}; allowed: {SHAPE}")
    wrong = [name for name, rows in content.items() if not isinstance(rows, list)]
    if wrong:
        raise UserError(
            f"{file}: {wrong[0]!r} is {_kind(content[wrong[0]])}, not a list of rows; "
            f"allowed: {SHAPE}"
        )
    if any(name in content and other in content for name, other in SPLIT_NAMES.items()):
        raise UserError(f"{file}: found both 'val' and 'validation'; keep one of them")
    return {split_name(name): rows for name, rows in content.items()}


def records(rows: list[Any] | Path) -> Iterator[Any]:
    """The rows of a split, in file order; those of a file are read one by one.

    Raises:
        UserError: a file that is not what its ending says; the message names the line.
    """
    if not isinstance(rows, Path):
        yield from rows
        return
    try:
        with rows.open(encoding="utf-8-sig", newline="") as handle:
            if rows.suffix == ".csv":
                csv.field_size_limit(CSV_FIELD)
                yield from csv.DictReader(handle)
                return
            for number, line in enumerate(handle, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line, object_pairs_hook=_object)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{rows}, line {number}, column {error.colno}: not valid JSON: "
                        f"{error.msg}; a .jsonl file has one object a line"
                    ) from None
                except (RecursionError, ValueError) as error:
                    message = f"{rows}, line {number}: cannot be read: {_reason(error)}"
                    raise UserError(message) from None
                yield record
    except (UnicodeDecodeError, OSError, csv.Error) as error:
        raise UserError(f"{rows}: cannot be read as UTF-8 text: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply"
    return getattr(error, "strerror", None) or str(error)


def problem(record: Any, question_key: str, answer_key: str, empty_answers: bool) -> str | None:
    """Why a row is no question with an answer; None if it is one."""
    if not isinstance(record, dict):
        return f"found {_kind(record)}; allowed: an object with {question_key!r} and {answer_key!r}"
    for name in (question_key, answer_key):
        if name not in record:
            return f"no {name!r}; found the keys {', '.join(map(repr, record)) or '(none)'}"
        value = record[name]
        if not isinstance(value, str):
            return f"{name!r} is {_kind(value)}; allowed: a string, in quotes"
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return f"{name!r} holds half a surrogate pair, which is not a character"
    if None in record:  # so csv.DictReader names what is beyond the header
        return "more columns than the header; a text with a comma stands in quotes"
    if not record[answer_key].strip() and not empty_answers:
        return f"{answer_key!r} is empty; there is nothing to learn from it"
    return None


def advice(record: Any, question_key: str, answer_key: str, file: str) -> str:
    """What helps where a file's columns have other names or another separator."""
    if not isinstance(record, dict) or {question_key, answer_key} <= record.keys():
        return ""
    names = [name for name in record if isinstance(name, str)]
    mark = next((c for c in ";\t|" if names and c in names[0]), None)
    if file.endswith(".csv") and len(names) == 1 and mark:
        return f"\n  its columns are separated by {mark!r}; allowed: ','"
    if len(names) < 2:
        return ""
    question = next((n for n in names if re.search("quest|prompt|instr", n, re.I)), names[0])
    answers = "answ|resp|complet|output|target"
    answer = next((n for n in names if re.search(answers, n, re.I)), names[-1])
    return (
        "\n  if these are other names for them, two lines under `data:` of the YAML say so:\n"
        f"    question_key: {json.dumps(question, ensure_ascii=False)}\n"
        f"    answer_key: {json.dumps(answer, ensure_ascii=False)}"
    )


def _kind(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "a string"}
    shown = f" {value!r}" if isinstance(value, (bool, int, float)) else ""
    return (
        names.get(type(value), "true or false" if isinstance(value, bool) else "a number") + shown
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For the json module, which would silently take the last of two values of a key."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return made
