"""Files of data: which splits a path holds, and the rows in them as they stand.

    found = find("~/facts")  # a file, a directory of them, or hub:ORG/NAME
    for row in found.splits["train"][0].rows():
        ...

JSON, JSON lines, CSV and Parquet; those that are text also behind gzip. What a row means is
extras/formats.py's business.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from config import UserError, first_line
from extras.model_files import refuse_lfs_pointer

SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "eval": "val",
    "test": "test",
}
JSON_LINES, CSV = (".jsonl", ".ndjson"), (".csv", ".tsv")
ENDINGS = (".json", *JSON_LINES, *CSV, ".parquet")
ALLOWED = f"{', '.join(ENDINGS)}; those that are text also with .gz behind"
# train.jsonl, train-3.jsonl, train_00000-of-00002.parquet
SHARD = re.compile(r"(?P<name>[a-z]+)(?:[-_.]?(?P<number>\d+)(?:[-_]of[-_](?P<total>\d+))?)?")
ABOUT_OTHERS = ("dataset_infos.json", "dataset_dict.json")  # what `datasets` notes about a dataset
HUB = "hub:"

SHAPE = '{"train": [{"Question": "...", "Answer": "..."}, ...], "test": [...]} ("val" is optional)'
DELIMITERS = ",;\t|"
CSV_FIELD = 2**31 - 1  # characters; Python's own limit is 131,072
CSV_SAMPLE = 2**16  # characters that a file's way of writing is found out from
PARQUET_ROWS = 1000  # rows in memory at a time
SHOWN_FILES = 5
SHOWN_TEXT = 60  # characters


class BadRow(NamedTuple):
    """Stands for a row that cannot be read as one: why, and the columns that it should have."""

    problem: str
    columns: list[str]


class Written(float):
    """A number with a point, and how it is written: as an answer, 3.50 is not 3.5."""

    text: str

    def __new__(cls, text: str) -> Written:
        made = super().__new__(cls, text)
        made.text = text
        return made

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    """The rows of a split that stand in one file, or what a .json file holds of it, in memory."""

    file: Path
    content: list[Any] | None = None

    def rows(self) -> Iterator[Any]:
        """The rows in their order; those of a file are read one by one.

        Raises:
            UserError: a file that is not what its ending says; the message names the line.
        """
        if self.content is not None:
            return iter(self.content)
        kind = ending(self.file)
        if kind == ".parquet":
            return _parquet_rows(self.file)
        return _csv_rows(self.file) if kind in CSV else _json_lines(self.file)


@dataclass(frozen=True)
class Found:
    """Where each split's rows are, and the names of files beside them that are not read."""

    path: Path
    splits: dict[str, list[Table]]
    unused: list[str] = field(default_factory=list)


def split_name(name: str) -> str:
    """Our name of a split that has several; another one stays as it is."""
    return SPLIT_NAMES.get(name.lower(), name)


def ending(file: Path) -> str:
    """What kind of file a name means: its suffix in small letters, `.gz` aside."""
    kind = Path(file.name.lower().removesuffix(".gz")).suffix
    packed = file.name.lower().endswith(".gz")
    return f"{kind}.gz" if packed and kind not in ENDINGS[:-1] else kind


# -------------------------------------------------------------------------------- finding them


def find(data_dir: str | Path) -> Found:
    """The splits of a file, of a directory, or of a dataset repository on the hub.

    Raises:
        UserError: nothing there, files that cannot be told apart, or a .json file that is broken.
    """
    if str(data_dir).startswith(HUB):
        return _in_directory(_download(str(data_dir).removeprefix(HUB)))
    path = Path(data_dir)
    try:
        path = path.expanduser()
        path.stat()
    except (OSError, ValueError, RuntimeError) as error:  # absent, forbidden or not a path at all
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"data.data_dir: {path}: {reason.lower()}") from None
    return _in_directory(path) if path.is_dir() else Found(path, _splits_in(path, "train"))


def _splits_in(file: Path, name: str) -> dict[str, list[Table]]:
    """What a file holds: the split `name`, or the splits that a .json file names itself."""
    refuse_lfs_pointer(file)
    if ending(file) not in ENDINGS:
        raise UserError(f"{file}: found {ending(file)!r}; allowed: {ALLOWED}")
    if ending(file) != ".json":
        return {name: [Table(file)]}
    content = _read_json(file)
    if content is LINES:
        return {name: [Table(file)]}
    if isinstance(content, list) and (not content or any(map(_like_a_row, content))):
        return {name: [Table(file, content)]}
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file}: found {kind_of(content)}; allowed: {SHAPE}")
    splits: dict[str, list[Table]] = {}
    names: dict[str, str] = {}
    for written, rows in content.items():
        if not isinstance(rows, list):
            raise UserError(
                f"{file}: {written!r} is {kind_of(rows)}, not a list of rows; allowed: {SHAPE}"
            )
        split = split_name(written)
        if split in names:
            raise UserError(f"{file}: found both {names[split]!r} and {written!r}; keep one")
        names[split] = written
        splits[split] = [Table(file, rows)]
    return splits


def _like_a_row(value: Any) -> bool:
    """Whether this is an object, or a conversation as a bare list of its turns."""
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)
    )


def _in_directory(folder: Path) -> Found:
    """The files that are named by split, in `folder` or its `data`, or the only one there."""
    here = [file for place in (folder, folder / "data") for file in _files(place)]
    known = [file for file in here if ending(file) in ENDINGS and file.name not in ABOUT_OTHERS]
    named: dict[str, list[Path]] = {}
    for file in known:
        match = SHARD.fullmatch(_stem(file))
        if match and match["name"] in SPLIT_NAMES:
            named.setdefault(split_name(match["name"]), []).append(file)
    if not named and len(known) != 1:
        raise UserError(
            f"data.data_dir: {folder}: a directory must hold train.jsonl (and val.jsonl, "
            f"test.jsonl; or {', '.join(e for e in ENDINGS if e != '.jsonl')}), or exactly one "
            f"such file; found {some([file.name for file in known]) or 'none of these'}"
        )
    splits: dict[str, list[Table]] = {}
    for name, files in (named or {"train": known}).items():
        held: dict[str, list[Table]] = {}
        for file in _in_order(folder, name, files):
            for split, tables in _splits_in(file, name).items():
                held.setdefault(split, []).extend(tables)
        for split, tables in held.items():
            if split in splits:
                raise _both(folder, splits[split][0].file, tables[0].file, split)
            splits[split] = tables
    used = {table.file for tables in splits.values() for table in tables}
    others = [str(f.relative_to(folder)) for f in here if f not in used and not _is_about(f)]
    return Found(folder, splits, others)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))


def _is_about(file: Path) -> bool:
    """Whether nobody would take this file for data."""
    return file.name in ABOUT_OTHERS or file.stem.upper() in ("README", "LICENSE")


def _stem(file: Path) -> str:
    """The name without its endings, in small letters."""
    return file.name.lower().removesuffix(".gz").removesuffix(ending(file))


def _in_order(folder: Path, split: str, files: list[Path]) -> list[Path]:
    """The files of a split, which must be one, or the numbered parts of one.

    Raises:
        UserError: files that are no parts of the same, or a part is missing.
    """
    parts: dict[int, Path] = {}
    first, total = None, None
    for file in files:
        match = SHARD.fullmatch(_stem(file))
        number = int(match["number"]) if match and match["number"] else None
        total = int(match["total"]) if match and match["total"] else None
        group = (file.parent, match and match["name"], ending(file), total)
        first = first or group
        if len(files) > 1 and (number is None or number in parts or group != first):
            other = files[0] if file != files[0] else files[1]
            raise _both(folder, min(file, other), max(file, other), split)
        parts[number or 0] = file
    missing = [number for number in range(total or 0) if number not in parts]
    if missing:
        raise UserError(
            f"data.data_dir: {folder}: of the {total} parts of the split {split!r}, "
            f"{len(missing)} are not there, the first of them number {missing[0]}"
        )
    return [parts[number] for number in sorted(parts)]


def _both(folder: Path, one: Path, other: Path, split: str) -> UserError:
    names = " and ".join(str(file.relative_to(folder)) for file in (one, other))
    return UserError(
        f"data.data_dir: {folder}: {names} are both the split {split!r}; keep one of them"
    )


def some(names: list[str]) -> str:
    """The first few names, and how many more."""
    more = len(names) - SHOWN_FILES
    return ", ".join(names[:SHOWN_FILES]) + (f" and {more} more" if more > 0 else "")


def _download(repository: str) -> Path:
    """The data files of a dataset repository on the hub, in the hub's own cache."""
    from huggingface_hub import snapshot_download

    patterns = [f"*{e}" for e in ENDINGS] + [f"*{e}.gz" for e in ENDINGS if e != ".parquet"]
    try:
        place = snapshot_download(repository, repo_type="dataset", allow_patterns=patterns)
    except Exception as error:  # of the hub, of HTTP, of the network, of the disk
        raise UserError(
            f"data.data_dir: {HUB}{repository}: cannot be fetched as a dataset from the hub: "
            f"{type(error).__name__}: "
            f"{first_line(error)}"
        ) from None
    if not Path(place).is_dir():  # without a file to fetch, there is no directory either
        raise UserError(f"data.data_dir: {HUB}{repository}: found no data file; allowed: {ALLOWED}")
    return Path(place)


# ------------------------------------------------------------------------------------ text


@contextmanager
def _text(file: Path) -> Iterator[TextIO]:
    """Open a text file; what is wrong with its bytes is said with the line.

    Raises:
        UserError: also while it is read.
    """
    try:
        with _open(file, "rb") as handle:
            start = handle.read(4)
        encoding = _encoding(file, start)
        with _open(file, "rt", encoding=encoding, newline="") as handle:
            yield handle
    except UnicodeDecodeError as error:
        raise UserError(_not_text(file, error)) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read: {_reason(error)}") from None


def _open(file: Path, mode: str, **how: Any) -> Any:
    return (gzip.open if file.name.lower().endswith(".gz") else open)(file, mode, **how)


def _encoding(file: Path, start: bytes) -> str:
    """UTF-8, or what the mark at the beginning of a file says."""
    if start.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if 0 in start[:2]:
        name = "UTF-16BE" if start[0] == 0 else "UTF-16LE"
        raise UserError(
            f"{file}, line 1: found a zero byte; this looks like {name} without the mark that "
            f"says so. A copy in UTF-8: {_iconv(file, name)}"
        )
    return "utf-8"


def _not_text(file: Path, error: UnicodeDecodeError) -> str:
    """The line and the byte that are not UTF-8, and how to convert the file."""
    if error.encoding != "utf-8":
        return f"{file}: begins as {error.encoding.upper()}, but is none: {error.reason}"
    number, byte = _first_bad_byte(file)
    meant = byte.decode("cp1252", errors="ignore")
    guess = f"; in Windows-1252 it is {meant!r}" if meant else ""
    return (
        f"{file}, line {number}: the byte 0x{byte.hex()} is not UTF-8{guess}. A copy in UTF-8, if "
        f"that is the encoding (else name its own): {_iconv(file, 'WINDOWS-1252')}"
    )


def _first_bad_byte(file: Path) -> tuple[int, bytes]:
    """The first byte that is not UTF-8, and the number of its line."""
    with _open(file, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return number, line[error.start : error.start + 1]
    raise UserError(f"{file}: changes while it is read")


def _iconv(file: Path, encoding: str) -> str:
    """A command that writes a copy in UTF-8 beside the file."""
    source, copy = shlex.quote(str(file)), shlex.quote(str(copy_of(file, "utf8")))
    if file.name.lower().endswith(".gz"):
        return f"gzip -dc {source} | iconv -f {encoding} -t UTF-8 > {copy}"
    return f"iconv -f {encoding} -t UTF-8 {source} > {copy}"


def copy_of(file: Path, word: str) -> Path:
    """The path of a copy to make, at which there is nothing yet."""
    name = file.name[:-3] if file.name.lower().endswith(".gz") else file.name
    stem, _, suffix = name.rpartition(".")
    for number in itertools.count(1):
        copy = file.with_name(f"{stem}-{word}{number if number > 1 else ''}.{suffix}")
        if not copy.exists():
            break
    return copy


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply"
    return getattr(error, "strerror", None) or str(error)


# ------------------------------------------------------------------------------------ JSON


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For the json module, which would silently take the last of two values of a key."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return made


LINES = object()
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=Written)


def _read_json(file: Path) -> Any:
    """The value in a .json file; LINES for one that has an object on each line."""
    try:
        with _text(file) as handle:
            text = handle.read()
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and "\n" not in text[: error.pos].strip():
            return LINES
        raise UserError(
            f"{file}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {_reason(error)}") from None


def _json_lines(file: Path) -> Iterator[Any]:
    decode = DECODER.decode
    with _text(file) as handle:
        for number, line in enumerate(handle, start=1):
            try:
                yield decode(line)
            except json.JSONDecodeError as error:
                if not line.strip():
                    continue
                listed = number == 1 and line.strip() == "["
                hint = "; a list over several lines? Then name it .json" if listed else ""
                raise UserError(
                    f"{file}, line {number}, column {error.colno}: not valid JSON: {error.msg}; "
                    f"there is one object a line in such a file{hint}"
                ) from None
            except (RecursionError, ValueError) as error:
                message = f"{file}, line {number}: cannot be read: {_reason(error)}"
                raise UserError(message) from None


# ------------------------------------------------------------------------------------ CSV


class Dialect(NamedTuple):
    """How a CSV file is written, apart from what all of them share.

    spaces: one may stand behind a delimiter. backslashes: a quote within a text is written \\".
    declared: a first line such as "sep=;" gives the delimiter, as Excel has it.
    """

    delimiter: str
    spaces: bool
    backslashes: bool
    declared: bool

    @property
    def quoted(self) -> re.Pattern[str]:
        """A field in quotes, from the beginning of a row or a delimiter on."""
        start = rf"(?:^|{re.escape(self.delimiter)}){' *' if self.spaces else ''}"
        inside = r'(?:[^"\\]|\\.|"")*' if self.backslashes else r'[^"]*(?:""[^"]*)*'
        return re.compile(f'{start}"{inside}"', re.DOTALL)


def _dialect(file: Path, sample: str) -> Dialect:
    """Find out how a file is written from its beginning."""
    declared = re.match(r"sep=(.)\r?\n", sample, re.IGNORECASE)
    text = sample[declared.end() :] if declared else sample
    delimiter = declared[1] if declared else _delimiter(file, text)
    mark = re.escape(delimiter)
    # In a well-formed field, a quote that stands alone is its last character, so that nothing but
    # a delimiter or the end of the line may follow it.
    goes_on = rf'(?=[^"\r\n{mark}])'
    spaces = re.search(rf'{mark} +"{goes_on}', text) or re.search(rf"{mark} +\S", _header_of(text))
    backslashes = re.search(rf'\\"{goes_on}', text)
    return Dialect(delimiter, bool(spaces), bool(backslashes), bool(declared))


def _delimiter(file: Path, sample: str) -> str:
    """What separates the columns: it stands in the header, and makes rows as wide as that."""
    usual = "\t" if ending(file) == ".tsv" else ","
    header = _header_of(sample)
    present = [mark for mark in DELIMITERS if mark in header]
    if len(present) < 2:
        return present[0] if present else usual
    even = [mark for mark in present if _is_even(sample, mark)]
    if not even and usual in present:
        return usual  # rows of other widths are told one by one
    if len(even) != 1:
        names = " or ".join(map(repr, even or present))
        raise UserError(
            f"{file}, line 1: the columns may be separated by {names}; a first line of its own "
            f"says which, such as sep={present[0]}"
        )
    return even[0]


def _header_of(sample: str) -> str:
    """The first line without what stands in quotes in it."""
    return re.sub(r'"[^"]*"', "", sample.lstrip("\r\n").partition("\n")[0])


def _is_even(sample: str, mark: str) -> bool:
    rows = list(csv.reader(io.StringIO(sample, newline=""), delimiter=mark))
    if len(sample) == CSV_SAMPLE:
        rows.pop()  # it may go on behind the sample
    return len({len(row) for row in rows if row}) == 1


def _csv_rows(file: Path) -> Iterator[dict[str, str] | BadRow]:
    """Rows as dictionaries. Python's csv module reads them; what it lets pass is refused here."""
    csv.field_size_limit(CSV_FIELD)
    with _text(file) as handle:
        dialect = _dialect(file, handle.read(CSV_SAMPLE))
    quoted = dialect.quoted
    lines: list[str] = []  # of the row that is being read
    header: list[str] = []
    with _text(file) as handle:
        if dialect.declared:
            handle.readline()
        reader = csv.reader(
            _remembering(handle, lines),
            delimiter=dialect.delimiter,
            skipinitialspace=dialect.spaces,
            escapechar="\\" if dialect.backslashes else None,
            strict=True,
        )
        first = 0  # line of the row, from 0
        try:
            for fields in reader:
                row = "".join(lines)
                lines.clear()
                if '"' in row or dialect.backslashes:
                    _refuse_stray_quote(row, dialect, quoted)
                if len(fields) == len(header):
                    yield dict(zip(header, fields))
                elif not header:
                    header = _header(fields)
                elif fields:
                    more = "more" if len(fields) > len(header) else "fewer"
                    hint = "; a text with a comma stands in quotes"
                    comma = dialect.delimiter == ","
                    problem = f"{more} columns than the header{hint if comma else ''}"
                    yield BadRow(problem, header)
                first = reader.line_num
        except (csv.Error, _CsvProblem) as error:
            place = f"{file}, line {first + 1 + dialect.declared}"
            raise UserError(f"{place}: {_csv_problem(error, lines)}") from None


class _CsvProblem(Exception):
    """What is wrong with a row, in words about the file."""


def _remembering(handle: TextIO, lines: list[str]) -> Iterator[str]:
    for line in handle:
        lines.append(line)
        yield line


def _header(fields: list[str]) -> list[str]:
    names = [name.strip() for name in fields]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise _CsvProblem(
            f"two columns have the name {twice!r}; allowed: a name of its own for each"
        )
    return names


def _csv_problem(error: Exception, lines: list[str]) -> str:
    """What is wrong with a row; `lines` are its lines where the csv module gave up."""
    shown = lines[0].strip()[:SHOWN_TEXT] if lines else ""
    way_out = (
        'a quote within a text is written twice (""), and a text that holds one stands in quotes '
        "as a whole"
    )
    if "unexpected end" in str(error):
        return f"a quote opens in this row and is never closed: {shown!r}; {way_out}"
    if "expected after" in str(error):
        return f"a text goes on behind the quote that ends it: {shown!r}; {way_out}"
    return str(error)


def _refuse_stray_quote(row: str, dialect: Dialect, quoted: re.Pattern[str]) -> None:
    """Raise _CsvProblem for a quote within a text that does not stand in quotes itself.

    The csv module takes it for an ordinary character, which is a guess: it may as well be that
    another one is missing, or that it stands behind a space.
    """
    shown = row.strip()[:SHOWN_TEXT]
    if '"' in quoted.sub("", row):
        raise _CsvProblem(
            f"a quote within a text that does not begin with one: {shown!r}; allowed: the whole "
            'text in quotes, its own ones twice (""), and no space between a comma and a quote'
        )
    if dialect.backslashes and "\\" in re.sub(r'\\["\\]', "", row):
        raise _CsvProblem(
            f'in this file \\" stands for a quote, so a backslash is written \\\\; found one '
            f"alone: {shown!r}"
        )


# ------------------------------------------------------------------------------------ Parquet


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(
            f"{file}: Parquet files need pyarrow: pip install -r requirements-data.txt"
        ) from None
    try:
        for batch in ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as Parquet: {first_line(error)}") from None


def kind_of(value: Any) -> str:
    """What a value is, in words for a message."""
    names = {type(None): "null", dict: "an object", list: "a list", str: "a string"}
    if isinstance(value, bool):
        return f"true or false {value!r}"
    if isinstance(value, (int, float)):
        return f"a number {value}"
    return names.get(type(value), f"a value of the type {type(value).__name__}")
