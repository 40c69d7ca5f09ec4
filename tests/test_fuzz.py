"""Anything as data file, configuration or override gives a result or one clear error.

And texts of all kinds survive the way from the data file into tokens and back.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from config import TestConfig as ForTest  # pytest would collect a name like Test*
from config import TrainConfig as ForTrain
from config import UserError, load, resolved, to_yaml, walk
from data import Conversation, Encoder, prepare_inference, prepare_train
from extras.formats import DataSource, overlap

T = TypeVar("T")
FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def answered(work: Callable[[], T]) -> T | None:
    """The result, or None after a `UserError`; any other exception fails the test."""
    try:
        return work()
    except UserError as error:
        message = str(error)
        assert message.strip() and len(message) < 20_000
        message.encode("utf-8")  # can be printed and logged anywhere
        return None


# ------------------------------------------------------------------------------------- data

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # half surrogates as well
ROW = st.fixed_dictionaries(
    {}, optional={"Question": ANY_TEXT | JSON, "Answer": ANY_TEXT | JSON, "other": JSON}
)
NEARLY_DATA = st.dictionaries(
    st.sampled_from(["train", "val", "validation", "test", ""]), st.lists(ROW | JSON, max_size=5)
)


pair_of = Conversation.of_pair


def read_everything(path: Path) -> dict[str, list[Conversation]]:
    source = DataSource.open(path)
    pairs = {
        split: list(source.conversations(split, empty_answers=True)) for split in source.splits
    }
    assert len(source.fingerprint) == 64
    if "train" in source.splits:
        overlap(source)
    return pairs


@FUZZ
@given(JSON | NEARLY_DATA)
@example({"train": [{"Question": "\ud800", "Answer": "a"}]})
@example({"train": [{"Question": "\x00", "Answer": "\x00"}]})
@example({"\ud800": [1]})
@example({"\ud800": 1})
@example({"train": [{"\ud800": 1}]})
def test_any_json_value_as_data_file_gives_pairs_or_a_clear_error(
    tmp_path: Path, value: Any
) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(value))
    pairs = answered(lambda: read_everything(path))
    for split, found in (pairs or {}).items():
        given_rows = value.get(split) or value["validation"]
        assert [(p.question, p.answer) for p in found] == [
            (str(row["Question"]), str(row["Answer"])) for row in given_rows
        ]
    path = path.with_suffix(".jsonl")
    lines = value if isinstance(value, list) else [value]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    answered(lambda: read_everything(path))


PIECES = st.sampled_from(
    [
        *(
            text.encode()
            for text in '{ } [ ] : , " \n \\ \\u \\ud800 1e999 NaN null 0 -'.split(" ")
        ),
        *(b"train", b"Question", b"Answer", b"\xff", b"\x00", b"\xef\xbb\xbf", b"'", b"&a", b"*a"),
        *(b"!!bool", b"<<", b"?", b"|", b"%", b"---", b"data", b"seed", b"  ", b"\t", b"- "),
    ]
)
BYTES = st.binary(max_size=40) | st.lists(PIECES, max_size=20).map(b"".join)


@FUZZ
@given(BYTES, st.sampled_from([".json", ".jsonl", ".csv"]))
@example(b'{"train": [' + b"9" * 5000 + b"]}", ".json")
@example(b'{"train": ' + b"[" * 50_000, ".json")
@example(b"[" * 50_000, ".jsonl")
@example(b'"' + b"x" * 300_000, ".csv")
@example(b"Question,Answer\n\x00,\x00", ".csv")
def test_any_bytes_as_data_file_give_pairs_or_a_clear_error(
    tmp_path: Path, content: bytes, suffix: str
) -> None:
    path = tmp_path / f"d{suffix}"
    path.write_bytes(content)
    answered(lambda: read_everything(path))


@FUZZ
@given(st.text(max_size=50))
@example("\0")
@example("~" * 300)
@example("/" * 300)
def test_any_text_as_data_dir_gives_a_clear_error(tmp_path: Path, name: str) -> None:
    answered(lambda: DataSource.open(tmp_path / "absent" / name))


# ---------------------------------------------------------------------------- configuration

VALID: dict[Any, dict[str, Any]] = {
    ForTrain: {
        "data": {"data_dir": "d", "truncate_prompt": True},
        "model_name": "m",
        "model_params": {
            "adam_betas": [0.9, 0.9],
            "layers_not_to_freeze": [-1],
            "val_generate_params": {"do_sample": True, "bad_words_ids": [[1]]},
        },
        "seed": 1,
        "trainer": {
            "checkpoint": {"dirpath": "r", "log_obg": "val_loss", "mode": "min"},
            "params": {"overfit_batches": 0.5, "val_check_interval": 3, "precision": 16},
        },
        "wandb": {"api": None, "args": {"name": "n"}},
    },
    ForTest: {
        "data": {"data_dir": "d"},
        "generate_params": {"eos_token_id": [1, 2], "top_k": 50},
        "model_name": "m",
        "test_params": {"log_file": "l"},
        "wandb": None,
    },
}
KINDS = st.sampled_from([ForTrain, ForTest])
NAMES = sorted({name for kind in VALID for path, _ in walk(kind) for name in path.split(".")})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["last", "max", "16", "val_bleu", "cpu", 2**40, 0, 1, -1, 1.0, 0.5])
)
YAMLABLE = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(NAMES) | st.text(max_size=5) | st.integers() | st.booleans(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


def accepted_or_refused(kind: Any, path: Path, overrides: list[str] | None = None) -> Any:
    config = answered(lambda: load(kind, path, overrides))
    if config is not None:  # then it can be written down and read again
        again = path.with_name("again.yaml")
        again.write_text(to_yaml(config), encoding="utf-8")
        assert resolved(load(kind, again)) == resolved(config)
    return config


@FUZZ
@given(KINDS, YAMLABLE)
def test_any_yaml_value_as_configuration_gives_one_or_a_clear_error(
    tmp_path: Path, kind: Any, value: Any
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    accepted_or_refused(kind, path)


@st.composite
def mutated(draw: Any) -> tuple[Any, Any]:
    """A valid configuration after one to three keys were dropped, replaced or added."""
    kind = draw(KINDS)
    content = json.loads(json.dumps(VALID[kind]))
    for _ in range(draw(st.integers(1, 3))):
        node = content
        while isinstance(node, dict) and node:
            name = draw(st.sampled_from(sorted(node, key=str)))
            deeper = isinstance(node[name], dict) and node[name] and draw(st.booleans())
            if deeper:
                node = node[name]
                continue
            change = draw(st.sampled_from(["drop", "replace", "add"]))
            if change == "drop":
                del node[name]
            elif change == "replace":
                node[name] = draw(YAMLABLE)
            else:
                node[draw(st.sampled_from(NAMES))] = draw(YAMLABLE)
            break
    return kind, content


@FUZZ
@given(mutated())
def test_a_mutated_configuration_gives_one_or_a_clear_error(
    tmp_path: Path, case: tuple[Any, Any]
) -> None:
    kind, content = case
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    accepted_or_refused(kind, path)


@pytest.mark.parametrize("kind", list(VALID))
def test_the_configuration_that_is_mutated_is_valid(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(VALID[kind]))
    assert accepted_or_refused(kind, path) is not None


@FUZZ
@given(BYTES)
@example(b"a: &a {b: *a}")
@example(b"a: &a [*a]")
@example(b"seed: 0x" + b"f" * 5000)
@example(b"seed: " + b"9" * 5000)
@example(b"a: !!timestamp x")
@example(b"a: !!bool x")
@example(b"a: " + b"{" * 5000)
@example(b"data: {data_dir: d}\nmodel_name: m\ntrainer: {checkpoint: {dirpath: '\\0'}}")
def test_any_bytes_as_yaml_file_give_a_configuration_or_a_clear_error(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    accepted_or_refused(ForTrain, path)


PATHS = st.lists(st.sampled_from([*NAMES, "", "0", "x"]), min_size=1, max_size=4).map(".".join)
VALUES = st.text(max_size=10) | st.text(string.punctuation + "a1\n", max_size=10)


@FUZZ
@given(
    KINDS,
    st.lists(ANY_TEXT | st.tuples(PATHS, VALUES).map("=".join), min_size=1, max_size=3),
)
@example(ForTrain, ["data.data_dir=\udcff"])  # how Python gives a byte that is not UTF-8
@example(ForTrain, ["seed=0x" + "f" * 5000])
def test_any_override_gives_a_configuration_or_a_clear_error(
    tmp_path: Path, kind: Any, overrides: list[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(VALID[kind]))
    accepted_or_refused(kind, path, overrides)


# -------------------------------------------------------------------------------- round trip

TEXTS = st.text(max_size=60)
EXAMPLES = [
    "",
    " ",
    "  leading and trailing  ",
    "emoji 👩‍👩‍👧‍👦 🇫🇷 👍🏽 😀",
    "مرحبا بالعالم שלום עולם \u202eright to left\u202c",
    "e\u0301 is not \u00e9, nor z\u0351\u036b\u0343 what it seems, ﬁ \u00a0",
    "  spaces , before . and  after ' n't 's \t\r\n\n ",  # which old tokenizers clean up
    "हिन्दी 日本語 한국어 ไทย",
    "".join(map(chr, range(0x20))) + "\x7f\u0080\x85\ufeff\u2028",
    "\U0010ffff\U0001f600\ufffd\ud7ff\ue000",
    "<|endoftext|>",
    "<|endoftext|> inside <|endoftext|>",
    "a" * 100_000,
    "x y\n" * 25_000,
]


def survives(encoder: Encoder, question: str, answer: str, path: Path) -> None:
    """From the JSON file to token ids of training and of inference, and back."""
    content = {"train": [{"Question": question, "Answer": answer}]}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (pair,) = DataSource.open(path).conversations("train", empty_answers=True)
    assert (pair.question, pair.answer) == (question, answer)
    samples = prepare_train([pair], encoder, max_length=10**6)
    ids, prompt = samples.sample(0)[0], len(samples.prompt(0))
    decode = encoder.tokenizer.decode
    assert decode(ids[:prompt]) == f"Question: {question} \nAnswer:"
    space = "" if answer[:1].isspace() else " "
    assert decode(ids[prompt:-1]) == space + answer
    eos = encoder.tokenizer.eos_token_id
    assert ids[-1] == eos and eos not in ids[:-1]
    (asked,), _ = prepare_inference([pair], encoder, max_prompt_length=10**6)
    assert asked.input_ids == ids[:prompt].tolist()


@FUZZ
@given(TEXTS, TEXTS)
def test_any_text_survives_the_round_trip_through_tokens(
    encoder: Encoder, tmp_path: Path, question: str, answer: str
) -> None:
    survives(encoder, question, answer, tmp_path / "d.json")


@pytest.mark.parametrize("text", EXAMPLES, ids=lambda text: ascii(text[:12]))
def test_unusual_texts_survive_the_round_trip_through_tokens(
    encoder: Encoder, tmp_path: Path, text: str
) -> None:
    survives(encoder, text, text, tmp_path / "d.json")


@FUZZ
@given(TEXTS, TEXTS, st.integers(2, 40), st.booleans())
@example("a" * 100_000, "b" * 100_000, 40, True)
@example("a b " * 25_000, "c", 40, True)
def test_any_text_is_cut_to_what_fits_and_every_loss_is_counted(
    encoder: Encoder, question: str, answer: str, max_length: int, truncate: bool
) -> None:
    whole = prepare_train([pair_of(1, question, answer)], encoder, 10**6)
    samples = prepare_train([pair_of(1, question, answer)], encoder, max_length, truncate)
    counts = samples.counts
    assert counts.kept == len(samples) == 1 - counts.dropped
    if not len(samples):
        return
    ids, all_ids = samples.sample(0)[0], whole.sample(0)[0]
    prompt, all_prompt = len(samples.prompt(0)), len(whole.prompt(0))
    target, full_target = ids[prompt:].tolist(), all_ids[all_prompt:].tolist()
    assert len(ids) <= max_length and target and target == full_target[: len(target)]
    assert counts.answer_cut == (target != full_target)
    assert counts.question_cut == (ids[:prompt].tolist() != all_ids[:all_prompt].tolist())
    text = encoder.tokenizer.decode(ids[:prompt])
    kept = text.removeprefix("Question: ").removesuffix(" \nAnswer:")
    assert text == f"Question: {kept} \nAnswer:" and question.startswith(kept)
    assert truncate or kept == question
    if counts.question_cut and counts.answer_cut:
        assert kept == ""  # the question gives way before the answer does
