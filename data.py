"""Data: JSON -> pairs -> token arrays -> batches.

    source = DataSource.open("data/facts.json")
    samples = prepare_train(source.pairs("train"), encoder, max_length=128)
    order = epoch_order(len(samples), samples_per_step=16, seed=1, epoch=0, lengths=samples.lengths)

A *sample* is a prompt and a target that were tokenised separately and joined, so that training and
inference see the same prompt ids. Samples live in flat arrays (`Samples`), which are memory-mapped
from a cache when the same data was prepared before.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from checkpoint import sha256_of
from config import DEFAULT_TEMPLATE, TestData, TrainData, UserError

IGNORE = -100  # the label of a position that is not trained on (torch's cross_entropy default)
SPLIT_NAMES = {"validation": "val"}
POOL = 512  # samples that are sorted by length together; see epoch_order
CHUNK = 1000  # pairs tokenised at a time
NEXT_WORD = re.compile(r"\s*\S*")
LOOK_AHEAD = 24  # characters, longer than nearly every word; see Encoder.cut_prompt
SHOWN_ROWS = 5
LFS_POINTER = b"version https://git-lfs"
CSV_FIELD = 2**31 - 1  # characters; Python's own limit is 131,072


# ------------------------------------------------------------------------------------ reading


class Pair(NamedTuple):
    row: int  # position in its split, counted from 1
    question: str
    answer: str


@dataclass(frozen=True)
class DataSource:
    """Where each split's rows are. JSON files are held in memory, .jsonl and .csv are streamed."""

    path: Path
    splits: dict[str, list[Any] | Path]
    question_key: str = "Question"
    answer_key: str = "Answer"

    @classmethod
    def open(
        cls, data_dir: str | Path, question_key: str = "Question", answer_key: str = "Answer"
    ) -> DataSource:
        """Find the splits of a JSON, .jsonl or .csv file, or of a directory that holds them.

        Raises:
            UserError: missing or broken file, or one that does not have the expected shape.
        """
        path = Path(data_dir)
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
                if p.suffix in (".jsonl", ".csv") and split_name(p.stem) in _SPLITS
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
                splits.update(_read_json(file, question_key, answer_key))
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
        return cls(path, splits, question_key, answer_key)

    @classmethod
    def configured(cls, data: TrainData | TestData) -> DataSource:
        """`open` as a configuration's `data` section says."""
        return cls.open(data.data_dir, data.question_key, data.answer_key)

    def has(self, split: str) -> bool:
        """Whether the split is there and has a row; an empty one counts as absent."""
        rows = self.splits.get(split)
        return rows is not None and next(_records(rows), None) is not None

    def pairs(self, split: str, *, empty_answers: bool = False) -> Iterator[Pair]:
        """The checked (row, question, answer) of a split, in file order.

        Raises:
            UserError: an absent split, or rows without a usable question and answer. The message
                names the first few row numbers of each kind of problem.
        """
        split = split_name(split)
        if split not in self.splits:
            hint = ""
            if not set(_SPLITS) & self.splits.keys():  # then this is another name for one of them
                name = next(iter(self.splits))
                hint = ". " + _fix(self.path, f"{{{split!r}: d.pop({name!r}), **d}}")
            found = ", ".join(self.splits)
            raise UserError(f"{self.path}: no split {split!r}; found {found}{hint}")
        rows = self.splits[split]
        name = str(rows if isinstance(rows, Path) else self.path)
        problems: dict[str, list[int]] = {}
        advice = ""
        count = 0
        for row, record in enumerate(_records(rows), start=1):
            count += 1
            problem = self._problem(record, empty_answers)
            if problem:
                problems.setdefault(problem, []).append(row)
                advice = advice or self._advice(record, name)
            elif not problems:
                yield Pair(row, record[self.question_key], record[self.answer_key])
        if count == 0:
            raise UserError(f"{name}: the split {split!r} is empty")
        if problems:
            lines = [f"  {numbered(rows)}: {problem}" for problem, rows in problems.items()]
            raise UserError(
                f"{name}: {sum(map(len, problems.values()))} of {count} rows of {split!r} cannot "
                "be used (rows count from 1)\n" + "\n".join(lines) + advice
            )

    def _problem(self, record: Any, empty_answers: bool) -> str | None:
        if not isinstance(record, dict):
            return f"found {_kind(record)}; allowed: an object with {self._keys()}"
        for name in (self.question_key, self.answer_key):
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
        if not record[self.answer_key].strip() and not empty_answers:
            return f"{self.answer_key!r} is empty; there is nothing to learn from it"
        return None

    def _advice(self, record: Any, file: str) -> str:
        """Two lines that put right a file whose columns have other names or another separator."""
        if not isinstance(record, dict) or {self.question_key, self.answer_key} <= record.keys():
            return ""
        names = [name for name in record if isinstance(name, str)]
        mark = next((c for c in ";\t|" if names and c in names[0]), None)
        if file.endswith(".csv") and len(names) == 1 and mark:
            return (
                f"\n  its columns are separated by {mark!r}; two lines of Python make it commas:\n"
                f"    import csv; rows = list(csv.reader(open({file!r}, encoding='utf-8-sig', "
                f"newline=''), delimiter={mark!r}))\n"
                f"    csv.writer(open({file!r}, 'w', encoding='utf-8', newline='')).writerows(rows)"
            )
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

    def _keys(self) -> str:
        return f"{self.question_key!r} and {self.answer_key!r}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the contents of the split files, not over their paths; read once a start."""
        files = {name: p for name, p in self.splits.items() if isinstance(p, Path)}
        if not files:
            files[""] = self.path if self.path.is_file() else next(self.path.glob("*.json"))
        parts = [self.question_key, self.answer_key]
        for name, file in sorted(files.items()):
            # Each file by itself: a row moved from one split's end to the next one's start counts.
            parts += [name, file.suffix, sha256_of(file)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def refuse_lfs_pointer(file: Path) -> None:
    """Raise a UserError for what Git LFS leaves where it has not fetched the real file."""
    try:
        with file.open("rb") as handle:
            start = handle.read(len(LFS_POINTER))
    except OSError:
        return  # whoever reads it says why
    if start == LFS_POINTER:
        raise UserError(
            f"{file}: a Git LFS pointer, a few lines in place of the file itself; "
            "`git lfs install && git lfs pull` in its repository fetches the file"
        )


_SPLITS = ("train", "val", "test")


def split_name(name: str) -> str:
    return SPLIT_NAMES.get(name, name)


def numbered(rows: Sequence[int]) -> str:
    """Row numbers for a message: the first few and how many more."""
    shown = ", ".join(map(str, rows[:SHOWN_ROWS]))
    more = len(rows) - SHOWN_ROWS
    return f"row{'s' if len(rows) > 1 else ''} {shown}" + (f" and {more} more" if more > 0 else "")


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


def _fix(file: Path, content: str) -> str:
    """Two lines of Python that write `file` anew, with `content` made of its old content d."""
    return (
        "Two lines of Python put it right:\n"
        f"  import json; d = json.load(open({str(file)!r}, encoding='utf-8-sig'))\n"
        f"  json.dump({content}, open({str(file)!r}, 'w', encoding='utf-8'))"
    )


def _read_json(file: Path, question_key: str, answer_key: str) -> dict[str, list[Any] | Path]:
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
    shape = (
        '{"train": [{"Question": "...", "Answer": "..."}, ...], "test": [...]} ("val" is optional)'
    )
    other = _other_shape(content, f"{{{question_key!r}: q, {answer_key!r}: a}}")
    if other:
        raise UserError(f"{file}: found {other[0]}; allowed: {shape}. {_fix(file, other[1])}")
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file}: found {_kind(content)}; allowed: {shape}")
    wrong = [name for name, rows in content.items() if not isinstance(rows, list)]
    if wrong:
        raise UserError(
            f"{file}: {wrong[0]!r} is {_kind(content[wrong[0]])}, not a list of rows; "
            f"allowed: {shape}"
        )
    twice = set(content) & set(SPLIT_NAMES) and set(content) & set(SPLIT_NAMES.values())
    if twice:
        raise UserError(f"{file}: found both 'val' and 'validation'; keep one of them")
    return {split_name(name): rows for name, rows in content.items()}


def _other_shape(content: Any, pair: str) -> tuple[str, str] | None:
    """(what it is, what to make of it, as for `_fix`) of shapes that people often have.

    pair: Python text of a row made of a question q and an answer a.
    """

    def texts(values: Any) -> bool:
        return bool(values) and all(isinstance(value, str) for value in values)

    if isinstance(content, list):
        if all(isinstance(row, list) and len(row) == 2 for row in content):
            return "a list of lists", f"{{'train': [{pair} for q, a in d]}}"
        return "a list", "{'train': d}"
    if not isinstance(content, dict):
        return None
    columns = list(content.values())
    if texts(columns):
        return "questions as keys", f"{{'train': [{pair} for q, a in d.items()]}}"
    if len(columns) == 2 and all(isinstance(c, list) and texts(c) for c in columns):
        return "two columns", f"{{'train': [{pair} for q, a in zip(*d.values())]}}"
    return None


def _records(rows: list[Any] | Path) -> Iterator[Any]:
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


def overlap(source: DataSource) -> dict[str, int]:
    """Counts for a warning: pairs that stand twice in `train`, questions also in `test`.

    Eight bytes of a hash stand for each text, so that a million pairs need little memory; the
    chance that two different ones meet is then about 1 in 30 million.
    """

    def digest(*texts: str) -> bytes:
        return hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest()

    pairs: set[bytes] = set()
    questions: set[bytes] = set()
    total = 0
    for _, question, answer in source.pairs("train"):
        total += 1
        pairs.add(digest(question, answer))
        questions.add(digest(question))
    shared = 0
    if source.splits.get("test"):  # an empty list is no reason not to train
        asked = (digest(pair.question) for pair in source.pairs("test", empty_answers=True))
        shared = sum(question in questions for question in asked)
    return {"duplicates": total - len(pairs), "train_test_overlap": shared}


# --------------------------------------------------------------------------------- tokenising


class Encoder:
    """Prompts and targets as token ids, whatever the tokenizer adds by itself.

    A prompt gets the tokens that the tokenizer puts in front of a text (BOS, or nothing) and none
    of those that it puts behind; a target is one space, the answer and one EOS.
    """

    def __init__(self, tokenizer: Any, template: str = DEFAULT_TEMPLATE) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no EOS token, so answers could "
                "never end; set eos_token in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.eos: int = tokenizer.eos_token_id
        plain = self._ids(["a"], special=False)[0]
        added = self._ids(["a"], special=True)[0]
        start = next((i for i in range(len(added)) if added[i : i + len(plain)] == plain), 0)
        self.prefix: list[int] = added[:start]
        # "<|endoftext|>" inside a question or an answer is text like any other and never a
        # control token, unless the template itself is written with control tokens.
        self.special_in_template = any(t in template for t in tokenizer.all_special_tokens)

    def _ids(
        self, texts: list[str], *, special: bool = False, split: bool = True
    ) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=special,
            split_special_tokens=split,
            return_attention_mask=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def prompts(self, questions: list[str]) -> list[list[int]]:
        """Token ids of each question in the template."""
        texts = [self.template.replace("{question}", question) for question in questions]
        prompts = self._ids(texts, split=not self.special_in_template)
        # A template that is written with the BOS token has the prefix already.
        size = len(self.prefix)
        return [ids if ids[:size] == self.prefix else self.prefix + ids for ids in prompts]

    def targets(self, answers: list[str]) -> list[list[int]]:
        """Token ids of each answer, with one EOS at the end and none before."""
        return [[*ids, self.eos] for ids in self._ids([" " + answer for answer in answers])]

    def cut_prompt(self, question: str, room: int) -> list[int]:
        """The prompt with its question shortened from the end until it has at most `room` ids.

        The template's words stay whole; with no room for them either, the result is longer than
        `room`. Bisection over characters, then a look further on: a whole word often is one
        token where a part of it is three, so that bisection alone stops within a word that fits.
        """
        low, high = 0, len(question)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self.prompts([question[:middle]])[0]) <= room:
                low = middle
            else:
                high = middle - 1
        best = self.prompts([question[:low]])[0]
        while low < len(question):
            word = NEXT_WORD.match(question, low, low + LOOK_AHEAD)
            ends = range(low + 1, (word.end() if word else low) + 1)
            longer = self.prompts([question[:end] for end in ends])
            fitting = [(end, ids) for end, ids in zip(ends, longer) if len(ids) <= room]
            if not fitting:
                break
            low, best = fitting[-1]
        return best

    def fingerprint(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend else json.dumps(self.tokenizer.get_vocab())
        parts = [vocabulary, self.template, str(self.prefix), str(self.eos)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass
class Counts:
    """What truncation did; row numbers count from 1, and only the first few are kept."""

    kept: int = 0
    question_cut: int = 0
    answer_cut: int = 0
    dropped: int = 0
    rows: dict[str, list[int]] = field(default_factory=dict)

    def add(self, kind: str, row: int) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        rows = self.rows.setdefault(kind, [])
        if len(rows) < SHOWN_ROWS:
            rows.append(row)

    def describe(self) -> str:
        parts = [f"{self.kept:,} kept"]
        for kind in ("question_cut", "answer_cut", "dropped"):
            count, rows = getattr(self, kind), self.rows.get(kind, [])
            where = f" ({numbered(rows)}{' ...' if count > len(rows) else ''})" if count else ""
            parts.append(f"{count:,} {kind.replace('_', ' ')}{where}")
        return ", ".join(parts)


@dataclass
class Samples:
    """Tokenised samples in flat arrays.

    tokens: int32 [all tokens]; starts: int64 [N + 1]; prompt_lengths: int32 [N];
    rows: int32 [N], each sample's row in the data file, counted from 1.
    """

    tokens: np.ndarray
    starts: np.ndarray
    prompt_lengths: np.ndarray
    rows: np.ndarray
    counts: Counts = field(default_factory=Counts)
    index: np.ndarray | None = None  # a subset of the samples; None is all of them

    def __post_init__(self) -> None:
        if self.index is None:
            self.index = np.arange(len(self.prompt_lengths))
        self.lengths = np.diff(self.starts)[self.index]
        # A first token cannot be a target, nothing stands before it (only with an empty prompt).
        self.target_lengths = self.lengths - np.maximum(self.prompt_lengths[self.index], 1)

    def __len__(self) -> int:
        assert self.index is not None
        return len(self.index)

    def ids(self, i: int) -> tuple[np.ndarray, int]:
        """(token ids [T], how many of them are the prompt) of sample i."""
        assert self.index is not None
        j = self.index[i]
        return self.tokens[self.starts[j] : self.starts[j + 1]], int(self.prompt_lengths[j])

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        """`input_ids`, `attention_mask` and `labels` of sample i, each a list of length T."""
        ids, prompt = self.ids(i)
        tokens = ids.tolist()
        labels = [IGNORE] * prompt + tokens[prompt:]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}

    def row(self, i: int) -> int:
        assert self.index is not None
        return int(self.rows[self.index[i]])

    def subset(self, indices: np.ndarray) -> Samples:
        assert self.index is not None
        return Samples(
            self.tokens,
            self.starts,
            self.prompt_lengths,
            self.rows,
            self.counts,
            self.index[indices],
        )


def prepare_train(
    pairs: Iterable[Pair],
    encoder: Encoder,
    max_length: int,
    truncate_promt: bool = True,
    directory: Path | None = None,
) -> Samples:
    """Tokenise pairs into samples of at most `max_length` ids.

    Args:
        pairs: (row, question, answer), for instance from `DataSource.pairs`.
        truncate_promt: true shortens the question of a sample that is too long, and the answer
            only if it does not fit beside an empty question (it then has no EOS to learn);
            false leaves the question alone and drops the sample's tail. A sample without any
            target id left is dropped. All of it is counted in `Samples.counts`.
        directory: where to write the arrays; None keeps them in memory.
    """
    counts = Counts()
    lengths: list[np.ndarray] = []
    kept_rows: list[np.ndarray] = []
    sink = _Sink(directory)
    for chunk in _chunks(pairs, CHUNK):
        prompts = encoder.prompts([pair.question for pair in chunk])
        targets = encoder.targets([pair.answer for pair in chunk])
        flat: list[int] = []
        sizes: list[tuple[int, int]] = []
        rows: list[int] = []
        for (row, question, _), prompt, target in zip(chunk, prompts, targets):
            if len(prompt) + len(target) > max_length:
                whole = prompt
                if truncate_promt:
                    prompt = encoder.cut_prompt(question, max_length - len(target))
                room = max_length - len(prompt)
                if room < 1:
                    counts.add("dropped", row)
                    continue
                if prompt != whole:
                    counts.add("question_cut", row)
                if room < len(target):
                    counts.add("answer_cut", row)
                    target = target[:room]
            counts.kept += 1
            flat += prompt
            flat += target
            sizes.append((len(prompt), len(prompt) + len(target)))
            rows.append(row)
        sink.write(np.array(flat, dtype=np.int32))
        lengths.append(np.array(sizes, dtype=np.int32).reshape(-1, 2))
        kept_rows.append(np.array(rows, dtype=np.int32))
    both = np.concatenate(lengths) if lengths else np.zeros((0, 2), dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(both[:, 1], dtype=np.int64)])
    rows_array = np.concatenate(kept_rows) if kept_rows else np.zeros(0, dtype=np.int32)
    return Samples(sink.close(), starts, both[:, 0].copy(), rows_array, counts)


class _Sink:
    """Collects int32 arrays in memory, or in a file that is memory-mapped at the end."""

    def __init__(self, directory: Path | None) -> None:
        self.path = directory / "tokens.bin" if directory else None
        self.handle = self.path.open("wb") if self.path else None
        self.parts: list[np.ndarray] = []

    def write(self, array: np.ndarray) -> None:
        if self.handle:
            array.tofile(self.handle)
        else:
            self.parts.append(array)

    def close(self) -> np.ndarray:
        if self.handle is None or self.path is None:
            return np.concatenate(self.parts) if self.parts else np.zeros(0, dtype=np.int32)
        self.handle.close()
        return _map(self.path)


def _map(path: Path) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=np.int32)
    return np.memmap(path, dtype=np.int32, mode="r")


def _chunks(items: Iterable[Pair], size: int) -> Iterator[list[Pair]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


# -------------------------------------------------------------------------------- the cache


def cached_samples(
    source: DataSource, split: str, encoder: Encoder, max_length: int, truncate_promt: bool
) -> tuple[Samples, dict[str, int]]:
    """`prepare_train` of a split and `overlap` of the data, remembered between runs.

    The cache key is a hash of everything the result depends on: the data's content, the
    tokenizer, the template and the lengths. An entry appears by renaming a finished directory, so
    a reader never sees half of one. `SFT_CACHE` names another place than ~/.cache/sft.
    """
    parts = (source.fingerprint, split, encoder.fingerprint(), max_length, truncate_promt, "v1")
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    root = Path(os.environ.get("SFT_CACHE", "~/.cache/sft")).expanduser()
    entry = root / name
    found = _read_entry(entry)
    if found is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    except OSError:  # a read-only home: the same work, in memory
        samples = prepare_train(source.pairs(split), encoder, max_length, truncate_promt)
        return samples, overlap(source)
    try:
        _write_entry(scratch, source, split, encoder, max_length, truncate_promt)
        if _read_entry(entry) is None:  # else another process was first
            shutil.rmtree(entry, ignore_errors=True)
        scratch.rename(entry)
    except OSError as error:
        if _read_entry(entry) is None:
            raise UserError(
                f"{root}: cannot write the token cache: {error.strerror}; free some space, or "
                "set SFT_CACHE to another directory"
            ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    made = _read_entry(entry)
    if made is None:
        raise UserError(f"{entry}: the token cache changes while it is used; start again")
    return made


_ARRAYS = ("starts", "prompt_lengths", "rows")


def _read_entry(entry: Path) -> tuple[Samples, dict[str, int]] | None:
    """What the cache holds; None if that is nothing, or damaged (say, by a loss of power)."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        arrays = {n: np.load(entry / f"{n}.npy", mmap_mode="r") for n in _ARRAYS}
        samples = Samples(_map(entry / "tokens.bin"), **arrays, counts=Counts(**meta["counts"]))
        if len(samples.tokens) == samples.starts[-1] and len(samples) == samples.counts.kept:
            return samples, meta["overlap"]
    except (OSError, ValueError, EOFError, LookupError, TypeError):
        pass
    return None


def _write_entry(
    directory: Path,
    source: DataSource,
    split: str,
    encoder: Encoder,
    max_length: int,
    truncate_promt: bool,
) -> None:
    samples = prepare_train(source.pairs(split), encoder, max_length, truncate_promt, directory)
    for name in _ARRAYS:
        np.save(directory / f"{name}.npy", getattr(samples, name))
    meta = {"counts": asdict(samples.counts), "overlap": overlap(source)}
    (directory / "meta.json").write_text(json.dumps(meta))


def hold_out(samples: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Split samples into (train, val), at random from `seed`, both in file order."""
    if len(samples) < 2:
        raise UserError(
            "data: one training sample is too few to hold some out for validation; "
            "add rows, or a 'val' split"
        )
    count = min(max(1, round(len(samples) * fraction)), len(samples) - 1)
    chosen = np.random.default_rng([seed, 0x56414C]).permutation(len(samples))[:count]
    held = np.zeros(len(samples), dtype=bool)
    held[chosen] = True
    return samples.subset(np.flatnonzero(~held)), samples.subset(np.flatnonzero(held))


# ---------------------------------------------------------------------------------- batches


def epoch_order(
    count: int,
    samples_per_step: int,
    seed: int,
    epoch: int,
    lengths: np.ndarray | None = None,
    shuffle: bool = True,
) -> np.ndarray:
    """The order of samples in an epoch; step k trains on order[k * S : (k + 1) * S].

    A pure function of its arguments, so a resumed run finds its place without replaying anything.

    With `lengths`, the shuffled samples are taken in pools of at least POOL; each pool is sorted
    by length, cut into steps, and the steps of the pool are shuffled again. Which samples may meet
    in a step is then limited to those of like length in the same random pool, while the order of
    steps does not depend on length. Nothing depends on how a step is split into micro-batches
    and ranks. A step of at least POOL samples is an unrestricted random draw.

    Returns:
        int64 [count], a permutation.
    """
    if not shuffle:
        return np.arange(count)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(count)
    if lengths is None:
        return order
    # The samples of the last, shorter step are a random draw, not the longest of the last pool.
    whole = count - count % samples_per_step
    pool = -(-POOL // samples_per_step) * samples_per_step
    parts = []
    for start in range(0, whole, pool):
        members = order[start : min(start + pool, whole)]
        members = members[np.argsort(lengths[members], kind="stable")]
        steps = members.reshape(-1, samples_per_step)
        parts.append(steps[rng.permutation(len(steps))].ravel())
    return np.concatenate([*parts, order[whole:]])


def micro_batches(
    rows: np.ndarray, batch_size: int, lengths: np.ndarray, rank: int = 0, world_size: int = 1
) -> list[np.ndarray]:
    """Split one step's samples into this rank's micro-batches, samples of like length together.

    Every rank gets the same number of micro-batches; in a short last step some may be empty.
    """
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    round_size = batch_size * world_size
    rounds = [rows[i : i + round_size] for i in range(0, len(rows), round_size)]
    return [members[rank::world_size] for members in rounds]


@dataclass
class Batch:
    """A micro-batch: right-padded rows, or all samples behind each other in one row.

    input_ids: int64 [B, T]; packed, it is [1, T] and `lengths` has the samples' lengths, so that
    each is attended to alone. target_positions: int64 [M], indices into the B * T positions whose
    *next* token is a target. target_ids: int64 [M], those next tokens; IGNORE fills up static
    shapes. rows: the samples' indices, on the host. prefix: cached outputs of frozen blocks,
    [B, T, C], see freeze.PrefixCache.

    No attention mask: a causal model cannot look at padding that comes after.
    """

    input_ids: torch.Tensor
    target_positions: torch.Tensor
    target_ids: torch.Tensor
    rows: np.ndarray
    prefix: torch.Tensor | None = None
    lengths: list[int] | None = None


def collate(
    samples: Samples,
    rows: np.ndarray,
    pad_id: int = 0,
    static_shape: tuple[int, int] | None = None,
    packed: bool = False,
) -> Batch:
    """Gather samples into a `Batch`.

    Args:
        packed: without any padding, for a model that can tell the samples apart.
        pad_id: any id that the model knows; what it is changes nothing.
        static_shape: (B, T) to pad to, for devices that compile for each shape.
    """
    parts = [samples.ids(int(i)) for i in rows]
    lengths = [len(ids) for ids, _ in parts] or [1]
    if packed:
        height, width = 1, sum(lengths)
        starts = np.cumsum([0, *lengths])
    else:
        height, width = static_shape or (len(lengths), max(lengths))
        starts = np.arange(height) * width
    input_ids = np.full(height * width, pad_id, dtype=np.int64)
    positions: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for start, (ids, prompt) in zip(starts, parts):
        input_ids[start : start + len(ids)] = ids
        # Position t predicts token t + 1; a token without one before it cannot be a target.
        first = max(prompt, 1)
        positions.append(np.arange(first - 1, len(ids) - 1) + start)
        targets.append(ids[first:])
    position = np.concatenate(positions) if positions else np.zeros(0)
    target = np.concatenate(targets) if targets else np.zeros(0)
    if static_shape:
        missing = height * width - len(position)
        position = np.concatenate([position, np.zeros(missing)])
        target = np.concatenate([target, np.full(missing, IGNORE)])
    return Batch(
        torch.from_numpy(input_ids.reshape(height, width)),
        torch.from_numpy(position.astype(np.int64)),
        torch.from_numpy(target.astype(np.int64)),
        np.asarray(rows),
        lengths=lengths if packed else None,
    )


# -------------------------------------------------------------------------------- inference


@dataclass
class Prompt:
    row: int
    question: str
    reference: str
    input_ids: list[int]


def prepare_inference(
    pairs: Iterable[Pair], encoder: Encoder, max_prompt_length: int, truncate_promt: bool = True
) -> tuple[list[Prompt], Counts]:
    """Tokenise the questions of pairs exactly as `prepare_train` does.

    With `truncate_promt`, a question is shortened from its end until its prompt has at most
    `max_prompt_length` ids; otherwise it is left whole.
    """
    prompts: list[Prompt] = []
    counts = Counts()
    for chunk in _chunks(pairs, CHUNK):
        for pair, ids in zip(chunk, encoder.prompts([pair.question for pair in chunk])):
            if truncate_promt and len(ids) > max_prompt_length:
                ids = encoder.cut_prompt(pair.question, max_prompt_length)
                counts.add("question_cut", pair.row)
            counts.kept += 1
            prompts.append(Prompt(pair.row, pair.question, pair.answer, ids))
    return prompts, counts


def pad_prompts(
    prompts: Sequence[list[int]], side: str, length: int | None = None, pad_id: int = 0
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64 [B, T], of prompts padded on one side.

    T is the longest prompt's length, or `length` if that is more.
    """
    width = max([length or 0, *map(len, prompts)])
    input_ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for b, ids in enumerate(prompts):
        place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        input_ids[b, place] = torch.tensor(ids, dtype=torch.long)
        attention_mask[b, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
