"""Data: what is refused and how, what a sample is, truncation, order, batches and the cache."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import data
from config import DEFAULT_TEMPLATE, UserError
from conftest import TOKENIZER, asking, item, rows
from data import (
    IGNORE,
    Conversation,
    Encoder,
    Samples,
    collate,
    cut_question,
    epoch_order,
    hold_out,
    micro_batches,
    pad_prompts,
    prepare_inference,
    prepare_train,
)
from extras.formats import DataSource, overlap
from extras.token_cache import cached_samples

EOS = 0  # in data/tiny-gpt-neo
pair_of = Conversation.of_pair
BOUNDED = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def pairs_of(*texts: tuple[str, str]) -> list[Conversation]:
    return [pair_of(i, question, answer) for i, (question, answer) in enumerate(texts, start=1)]


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refused(path: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        list(DataSource.open(path).conversations(split))
    return str(caught.value)


# -------------------------------------------------------------------------------- bad input


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "no.json") == (
        f"data.data_dir: {tmp_path}/no.json: no such file or directory"
    )
    assert "file name too long" in refused(tmp_path / ("x" * 5000))
    assert "null" in refused(tmp_path / "x\0y")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": [\n{"Question" "a"}]}', "line 2, column 13: not valid JSON: Expecting ':'"),
        ('{"train": [\n', "line 2, column 1: not valid JSON"),
        ("", "line 1, column 1: not valid JSON: Expecting value"),
        ('{"train":\n[]} x', "line 2, column 5: not valid JSON: Extra data"),
        ("[" * 100_000, "lists or objects are nested too deeply"),
        ('{"train": [' + "1" * 5000 + "]}", "cannot be read as JSON: Exceeds the limit"),
        ('{"train": [], "train": [1]}', "an object has the key 'train' twice"),
        ("[[1], [2]]", "found a list; allowed: {"),
        ("17", "found a number 17; allowed: {"),
        ("true", "found true or false True; allowed: {"),
        ('"x"', "found a string; allowed: {"),
        ("null", "found null; allowed: {"),
        ("{}", "found an object; allowed: {"),
        ('{"train": {"a": 1}}', "'train' is an object, not a list of rows; allowed: {"),
        ('{"train": []}', "the split 'train' is empty"),
        ('{"val": [], "validation": []}', "found both 'val' and 'validation'; keep one"),
    ],
)
def test_a_json_file_that_is_broken_or_has_another_shape_is_refused(
    tmp_path: Path, content: str, message: str
) -> None:
    path = write(tmp_path / "d.json", content)
    error = refused(path)
    assert error.startswith(str(path)) and message in error


PAIRS = [(row["Question"], row["Answer"]) for row in rows(3)]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (PAIRS, "found a list; allowed:"),
        (dict(PAIRS), "is a string, not a list of rows; allowed:"),
        ({"data": rows(3), "more": [1]}, "no split 'train'; found data, more"),
    ],
)
def test_other_json_shapes_are_described(tmp_path: Path, content: Any, found: str) -> None:
    assert found in refused(write(tmp_path / "d.json", content))


def test_a_bare_list_of_rows_is_the_training_split(tmp_path: Path) -> None:
    source = DataSource.open(write(tmp_path / "d.json", rows(3)))
    assert [c.answer for c in source.conversations("train")] == [answer for _, answer in PAIRS]
    assert source.splits.keys() == {"train"}


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".json"])
def test_columns_that_are_not_clear_can_be_named_with_two_lines(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"d{kind}"
    if kind == ".csv":
        write(path, "id,User prompt,reply\n1,q,a\n")
    else:
        row = {"id": 1, "User prompt": "q", "reply": "a"}
        write(path, {"train": [row]} if kind == ".json" else json.dumps(row))
    found, explanation, *lines = refused(path).split("\n")
    assert "is not clear; found the columns 'id', 'User prompt', 'reply'" in found
    assert "two lines under `data:` of the YAML say so" in explanation
    keys = yaml.safe_load("\n".join(lines[:2]))
    assert keys == {"question_key": "NAME", "answer_key": "NAME"}
    keys = {"question_key": "User prompt", "answer_key": "reply"}
    assert list(DataSource.open(path, **keys).conversations("train")) == [pair_of(1, "q", "a")]


def test_a_text_beyond_the_header_of_a_csv_is_not_lost(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", "Question,Answer\nWhere?,Paris, France\n")
    assert "row 1: more columns than the header; a text with a comma" in refused(path)


def test_bad_rows_are_grouped_by_problem_with_their_numbers(tmp_path: Path) -> None:
    entries: list[Any] = rows(20)
    for i in (1, 4, 5, 6, 7, 8, 9):
        del entries[i]["Answer"]
    entries[2] = ["a", "b"]
    entries[10] = {}
    entries[11] = {"Question": "q", "Answer": ""}
    entries[12] = {"Question": "q", "Answer": " \n\t"}
    entries[13] = {"Question": None, "Answer": "a"}
    entries[14] = {"Question": "q", "Answer": 3.5}
    entries[15] = {"Question": "q", "Answer": True}
    entries[16] = {"Question": "q", "Answer": ["a"]}
    entries[17] = {"Question": "a \ud83d b", "Answer": "x"}
    path = write(tmp_path / "d.json", {"train": entries})
    first, *lines = refused(path).split("\n")
    assert first == f"{path}: 15 of 20 rows of 'train' cannot be used (rows count from 1)"
    assert [line.strip() for line in lines] == [
        "rows 2, 5, 6, 7, 8 and 2 more: no 'Answer'; found the keys 'Question'",
        "row 3: a row is not an object with columns; found a list",
        "row 11: no 'Question'; found the keys (none)",
        "rows 12, 13: 'Answer' is empty; there is nothing to learn from it",
        "row 14: 'Question' is null; allowed: a text or a number",
        "row 16: 'Answer' is true or false True; allowed: a text or a number",
        "row 17: 'Answer' is a list; allowed: a text or a number",
        "row 18: 'Question' holds half a surrogate pair, which is not a character",
    ]


def test_an_empty_answer_may_be_tested_but_not_trained_on(tmp_path: Path) -> None:
    source = DataSource.open(write(tmp_path / "d.json", {"test": [{"Question": "", "Answer": ""}]}))
    assert list(source.conversations("test", empty_answers=True)) == [pair_of(1, "", "")]
    assert "row 1: 'Answer' is empty" in refused(source.path, "test")


def test_an_absent_split_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", {"train": rows(1), "dev": rows(1)})
    assert refused(path, "test") == f"{path}: no split 'test'; found train, val"


def test_jsonl_is_read_line_by_line_and_a_broken_line_is_named(tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows(3)]
    path = write(tmp_path / "d.jsonl", "\ufeff" + "\r\n".join([lines[0], "", *lines[1:]]))
    assert [pair.question for pair in DataSource.open(path).conversations("train")] == [
        row["Question"] for row in rows(3)
    ]
    write(path, "\n".join([lines[0], lines[1][:-1], lines[2]]))
    assert f"{path}, line 2, column " in refused(path) and "one object a line" in refused(path)
    write(path, lines[0] + "\n" + "1" * 5000)
    assert f"{path}, line 2: cannot be read: Exceeds the limit" in refused(path)
    write(path, '{"Question": "a", "Question": "b", "Answer": "c"}')
    assert "line 1: cannot be read: an object has the key 'Question' twice" in refused(path)
    write(path, "")
    assert f"{path}: the split 'train' is empty" in refused(path)
    path.write_bytes(b'{"Question": "\xff"}')
    assert f"{path}, line 1: the byte 0xff is not UTF-8" in refused(path)


def test_csv_is_read_with_quotes_and_long_fields(tmp_path: Path) -> None:
    long = "x" * 200_000  # beyond the csv module's own limit
    path = write(tmp_path / "d.csv", f'Question,Answer,more\r\n"a, ""b""\nc",{long},1\r\n')
    assert list(DataSource.open(path).conversations("train")) == [pair_of(1, 'a, "b"\nc', long)]
    write(path, "Question,Answer\nonly one\n")
    assert "row 1: fewer columns than the header" in refused(path)


def test_a_directory_holds_named_splits_or_one_json_file(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    assert "a directory must hold train.jsonl" in refused(folder)
    assert "found none of these" in refused(folder)
    write(folder / "any.json", {"train": rows(2), "validation": rows(1)})
    assert set(DataSource.open(folder).splits) == {"train", "val"}
    write(folder / "other.json", {"train": rows(2)})
    assert "exactly one such file; found any.json, other.json" in refused(folder)
    write(folder / "train.jsonl", "\n".join(json.dumps(row) for row in rows(3)))
    write(folder / "validation.jsonl", "\n".join(json.dumps(row) for row in rows(2)))
    write(folder / "test.csv", "Question,Answer\na,b\n")
    write(folder / "notes.jsonl", "not read")
    source = DataSource.open(folder)
    assert {name: len(list(source.conversations(name))) for name in source.splits} == {
        "test": 1,
        "train": 3,
        "val": 2,
    }
    assert "files not used: any.json, notes.jsonl, other.json" in source.remarks()
    write(folder / "val.jsonl", "")
    assert "val.jsonl and validation.jsonl are both the split 'val'" in refused(folder)
    assert "found '.txt'; allowed: .json, .jsonl, .ndjson, .csv" in refused(
        write(tmp_path / "d.txt", "")
    )


def test_duplicates_and_questions_of_the_test_split_in_train_are_counted(tmp_path: Path) -> None:
    train = [*rows(6), rows(1)[0], rows(1)[0], {**rows(2)[1], "Answer": "another"}]
    test = [*rows(3, offset=4), {"Question": rows(1)[0]["Question"], "Answer": ""}]
    path = write(tmp_path / "d.json", {"train": train, "test": test})
    assert overlap(DataSource.open(path)) == {"duplicates": 2, "train_test_overlap": 3}
    for empty in ({"train": train}, {"train": train, "test": []}):
        counts = overlap(DataSource.open(write(path, empty)))
        assert counts == {"duplicates": 2, "train_test_overlap": 0}


# -------------------------------------------------------------------------------- a sample


def tokenizer_that_adds(bos: bool, eos: bool, same: bool = False) -> Any:
    """data/tiny-gpt-neo's tokenizer with another post-processor; `same`: BOS and EOS are one."""
    made = AutoTokenizer.from_pretrained(TOKENIZER)
    if not same:
        made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    first, last = made.bos_token if bos else "", made.eos_token if eos else ""
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}".split(),
        special_tokens=[(made.bos_token, made.bos_token_id), (made.eos_token, made.eos_token_id)],
    )
    return made


@pytest.mark.parametrize("same", [False, True], ids=["bos!=eos", "bos==eos"])
@pytest.mark.parametrize("eos", [False, True], ids=["", "adds-eos"])
@pytest.mark.parametrize("bos", [False, True], ids=["", "adds-bos"])
def test_one_supervised_eos_and_at_most_one_bos_whatever_the_tokenizer_adds(
    bos: bool, eos: bool, same: bool
) -> None:
    made = tokenizer_that_adds(bos, eos, same)
    probe = made("x")["input_ids"]  # the fixture does what it says
    assert (probe[0] == made.bos_token_id, probe[-1] == made.eos_token_id) == (bos, eos)
    encoder = Encoder(made)
    pairs = pairs_of(("Capital of Italy?", "Rome"), ("", "x"), ("Hot?", "cold\n or so "))
    samples = prepare_train(pairs, encoder, 64)
    prompts, _ = prepare_inference(pairs, encoder, 64)
    for i, (pair, prompt) in enumerate(zip(pairs, prompts)):
        ids, labels = item(samples, i).values()
        target = [token for token in labels if token != IGNORE]
        assert labels == [IGNORE] * len(prompt.input_ids) + target
        assert ids == prompt.input_ids + target  # training and inference see the same ids
        assert target[-1] == made.eos_token_id and target.count(made.eos_token_id) == 1
        assert prompt.input_ids[:1].count(made.bos_token_id) == int(bos)
        assert made.bos_token_id not in prompt.input_ids[1:]
        assert made.eos_token_id not in prompt.input_ids[int(bos) :]
        text = f"Question: {pair.question} \nAnswer: {pair.answer}"
        assert made.decode([*ids[int(bos) : -1]]) == text


def test_a_template_that_is_written_with_the_bos_token_gets_no_second_one() -> None:
    made = tokenizer_that_adds(bos=True, eos=True)
    encoder = Encoder(made, "<s>" + DEFAULT_TEMPLATE)
    assert encoder.prompts(asking("a"))[0].count(made.bos_token_id) == 1
    assert encoder.prompts(asking("a")) == Encoder(made).prompts(asking("a"))


def test_control_tokens_written_in_a_text_stay_text(encoder: Encoder) -> None:
    eos = encoder.tokenizer.eos_token
    assert encoder.tokenizer(eos)["input_ids"] == [EOS]  # it would be one, unguarded
    pairs = pairs_of((f"What is {eos}?{eos}", f"{eos} ends{eos} a text"))
    ids = item(prepare_train(pairs, encoder, 128), 0)["input_ids"]
    assert ids.count(EOS) == 1 and ids[-1] == EOS
    assert EOS not in prepare_inference(pairs, encoder, 128)[0][0].input_ids
    text = encoder.tokenizer.decode(ids[:-1])
    assert text == f"Question: What is {eos}?{eos} \nAnswer: {eos} ends{eos} a text"


def test_braces_in_a_question_are_text(encoder: Encoder) -> None:
    ids = encoder.prompts(asking("What is {question} in {0}?"))[0]
    text = encoder.tokenizer.decode(ids)
    assert text == "Question: What is {question} in {0}? \nAnswer:"


def test_a_tokenizer_without_eos_is_refused() -> None:
    made = AutoTokenizer.from_pretrained(TOKENIZER)
    made.eos_token = None
    with pytest.raises(UserError, match="the tokenizer has no EOS token"):
        Encoder(made)


# ------------------------------------------------------------------------------ truncation

LONG = "Which element has the symbol Fe, and what is its atomic number in the table?"


def sizes(encoder: Encoder, question: str, answer: str) -> tuple[int, int, int]:
    """Ids of the bare template, of the prompt and of the target."""
    template, prompt = encoder.prompts(asking("", question))
    (((_, _, mask),),) = encoder.encode(pairs_of((question, answer)))
    return len(template), len(prompt), sum(mask)


def parts(encoder: Encoder, samples: Samples, i: int = 0) -> tuple[str, str, bool]:
    """(prompt, target, whether it ends with EOS) of a sample, as texts."""
    ids, prompt = samples.sample(i)[0], len(samples.prompt(i))
    ended = bool(ids[-1] == EOS)
    decode = encoder.tokenizer.decode
    return decode(ids[:prompt]), decode(ids[prompt : len(ids) - ended]), ended


def test_a_sample_that_just_fits_is_left_whole(encoder: Encoder) -> None:
    _, prompt, target = sizes(encoder, LONG, "Iron")
    for truncate in (True, False):
        samples = prepare_train(pairs_of((LONG, "Iron")), encoder, prompt + target, truncate)
        assert parts(encoder, samples) == (f"Question: {LONG} \nAnswer:", " Iron", True)
        assert samples.counts.describe() == "1 kept, 0 question cut, 0 answer cut, 0 dropped"


def test_the_question_is_cut_from_its_end_and_the_template_stays_whole(encoder: Encoder) -> None:
    template, prompt, target = sizes(encoder, LONG, "Iron")
    lengths = []
    for max_length in range(template + target, prompt + target):
        samples = prepare_train(pairs_of((LONG, "Iron")), encoder, max_length)
        text, answer, ended = parts(encoder, samples)
        question = text.removeprefix("Question: ").removesuffix(" \nAnswer:")
        assert text == f"Question: {question} \nAnswer:"  # template words whole
        assert LONG.startswith(question) and len(question) < len(LONG)
        assert (answer, ended) == (" Iron", True)
        assert samples.lengths[0] <= max_length
        assert (samples.counts.question_cut, samples.counts.rows) == (1, {"question_cut": [1]})
        lengths.append(len(question))
    assert len(lengths) > 10 and lengths == sorted(set(lengths))  # more room, more question


def test_an_answer_that_does_not_fit_alone_is_cut_and_learns_no_end(encoder: Encoder) -> None:
    template, _, target = sizes(encoder, LONG, "Iron, number 26")
    for missing in range(1, target):
        room = template + target - missing
        samples = prepare_train(pairs_of((LONG, "Iron, number 26")), encoder, room)
        text, answer, ended = parts(encoder, samples)
        assert text == "Question:  \nAnswer:"  # the question gave way first
        assert " Iron, number 26".startswith(answer) and not ended
        assert samples.lengths[0] == room and EOS not in item(samples, 0)["labels"]
        assert samples.counts.rows == {"question_cut": [1], "answer_cut": [1]}


def test_a_sample_without_any_target_is_dropped_and_counted_as_that_only(encoder: Encoder) -> None:
    template, _, _ = sizes(encoder, LONG, "Iron")
    pairs = pairs_of((LONG, "Iron"), ("", "Iron"))
    for room in (2, template):
        samples = prepare_train(pairs, encoder, room)
        assert len(samples) == 0
        text = "0 kept, 0 question cut, 0 answer cut, 2 dropped (rows 1, 2)"
        assert samples.counts.describe() == text


def test_without_truncation_the_tail_is_lost_and_the_question_left_alone(encoder: Encoder) -> None:
    _, prompt, target = sizes(encoder, LONG, "Iron, number 26")
    pairs = pairs_of(("a", "b"), (LONG, "Iron, number 26"))
    for room in range(prompt - 2, prompt + target):
        samples = prepare_train(pairs, encoder, room, truncate_prompt=False)
        assert parts(encoder, samples, 0) == ("Question: a \nAnswer:", " b", True)
        if room <= prompt:
            assert (len(samples), samples.counts.rows) == (1, {"dropped": [2]})
        else:
            text, answer, ended = parts(encoder, samples, 1)
            assert text == f"Question: {LONG} \nAnswer:" and not ended
            assert " Iron, number 26".startswith(answer) and answer
            assert samples.lengths[1] == room
            assert samples.counts.rows == {"answer_cut": [2]}


def test_counts_name_the_first_few_rows_and_samples_keep_their_row(encoder: Encoder) -> None:
    pairs = pairs_of(*[(LONG, "Iron") if i % 2 else ("a", "b") for i in range(30)])
    _, prompt, target = sizes(encoder, LONG, "Iron")
    samples = prepare_train(pairs, encoder, prompt + target - 1)
    text = "30 kept, 15 question cut (rows 2, 4, 6, 8, 10 ...), 0 answer cut, 0 dropped"
    assert samples.counts.describe() == text
    dropping = prepare_train(pairs, encoder, prompt, truncate_prompt=False)
    assert dropping.counts.describe() == (
        "15 kept, 0 question cut, 0 answer cut, 15 dropped (rows 2, 4, 6, 8, 10 ...)"
    )
    assert dropping.rows.tolist() == list(range(1, 30, 2))


def test_chunks_of_pairs_do_not_show(encoder: Encoder, monkeypatch: Any) -> None:
    pairs = pairs_of(*[(row["Question"], row["Answer"]) for row in rows(23)])
    whole = prepare_train(pairs, encoder, 24)
    monkeypatch.setattr(data, "CHUNK", 4)
    chunked = prepare_train(iter(pairs), encoder, 24)
    assert whole.counts == chunked.counts and len(whole) == 23
    assert same(whole, chunked)


WORDS = st.sampled_from(
    ["What", "capital", "of", "internationalization", "", "\n", "日本語の", "😀", "Fe?", "hydrogen"]
)


@BOUNDED
@given(st.lists(WORDS, max_size=12).map(" ".join), st.integers(0, 40))
def test_cutting_keeps_the_longest_part_of_the_question_that_fits(
    encoder: Encoder, question: str, room: int
) -> None:
    ends = range(len(question), 0, -1)
    fitting = (end for end in ends if len(encoder.prompts(asking(question[:end]))[0]) <= room)
    (cut,) = (cut_question(encoder, asked, room) for asked in asking(question))
    assert encoder.prompts([cut]) == encoder.prompts(asking(question[: next(fitting, 0)]))


def test_prompts_for_inference_are_cut_the_same_way(encoder: Encoder) -> None:
    pairs = pairs_of(("a", "b"), (LONG, "Iron"))
    prompts, counts = prepare_inference(pairs, encoder, 12)
    assert [prompts[1].input_ids] == encoder.prompts(
        [cut_question(encoder, *asking(LONG), 12)]
    ) and len(prompts) == 2
    assert (prompts[1].row, prompts[1].question, prompts[1].reference) == (2, LONG, "Iron")
    assert counts.describe() == "2 kept, 1 question cut (row 2), 0 answer cut, 0 dropped"
    whole, counts = prepare_inference(pairs, encoder, 12, truncate_prompt=False)
    assert whole[1].input_ids == encoder.prompts(asking(LONG))[0] and counts.question_cut == 0


# --------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def samples(encoder: Encoder) -> Samples:
    return prepare_train(
        pairs_of(*[(row["Question"], row["Answer"]) for row in rows(29)]), encoder, 64
    )


@pytest.mark.parametrize("static", [None, (5, 64)])
def test_a_batch_has_the_targets_of_labels_shifted_by_hand(
    samples: Samples, static: tuple[int, int] | None
) -> None:
    chosen = np.array([3, 0, 7, 4])
    batch = collate(samples, chosen, static)
    height, width = static or (4, int(samples.lengths[chosen].max()))
    assert batch.input_ids.shape == (height, width)
    labels = torch.full((height, width), IGNORE)
    expected = torch.zeros((height, width), dtype=torch.long)
    for b, i in enumerate(chosen):
        sample = item(samples, int(i))
        expected[b, : len(sample["input_ids"])] = torch.tensor(sample["input_ids"])
        labels[b, : len(sample["labels"])] = torch.tensor(sample["labels"])
    assert torch.equal(batch.input_ids, expected)
    shifted = torch.full_like(labels, IGNORE)
    shifted[:, :-1] = labels[:, 1:]  # position t predicts token t + 1
    positions = (shifted.flatten() != IGNORE).nonzero().flatten()
    count = int(samples.target_lengths[chosen].sum())
    assert torch.equal(batch.target_positions[:count], positions)
    assert torch.equal(batch.target_ids[:count], shifted.flatten()[positions])
    if static:  # one shape for every batch
        assert len(batch.target_ids) == len(batch.target_positions) == height * width
        assert set(batch.target_ids[count:].tolist()) == {IGNORE}
    else:
        assert len(batch.target_ids) == count
    assert batch.rows.tolist() == chosen.tolist()


def test_a_batch_without_samples_has_no_target(samples: Samples) -> None:
    batch = collate(samples, np.zeros(0, dtype=np.int64))
    assert batch.input_ids.shape == (1, 1) and len(batch.target_ids) == 0
    static = collate(samples, np.zeros(0, dtype=np.int64), static_shape=(2, 8))
    assert static.input_ids.shape == (2, 8) and set(static.target_ids.tolist()) == {IGNORE}


def test_a_sample_without_prompt_has_no_target_at_its_first_token(tokenizer: Any) -> None:
    bare = prepare_train(pairs_of(("", "Rome")), Encoder(tokenizer, "{question}"), 16)
    assert bare.target_lengths[0] == bare.lengths[0] - 1
    batch = collate(bare, np.array([0]))
    assert batch.target_ids.tolist() == item(bare, 0)["input_ids"][1:]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [None, 3, 6])
def test_prompts_are_padded_on_the_side_and_to_the_length_asked_for(
    side: str, length: int | None
) -> None:
    padded = pad_prompts([[5, 6], [1, 2, 3, 4], [0]], side, length)
    width = max(4, length or 0)
    for b, ids in enumerate([[5, 6], [1, 2, 3, 4], [0]]):
        filler = [0] * (width - len(ids))
        expected = ids + filler if side == "right" else filler + ids
        assert padded["input_ids"][b].tolist() == expected
        mask = padded["attention_mask"][b].tolist()
        # Masked by position: the last prompt is the padding token itself, and is seen.
        assert mask == ([1] * len(ids) + [0] * len(filler))[:: 1 if side == "right" else -1]


# ----------------------------------------------------------------------------------- order


@BOUNDED
@given(st.integers(1, 3000), st.integers(1, 700), st.booleans(), st.integers(0, 3))
def test_an_epochs_order_is_a_permutation(
    count: int, per_step: int, grouped: bool, epoch: int
) -> None:
    lengths = np.random.default_rng(count).integers(1, 200, count) if grouped else None
    order = epoch_order(count, per_step, 1, epoch, lengths)
    assert np.array_equal(np.sort(order), np.arange(count))


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epochs_order_depends_on_seed_and_epoch_and_nothing_else(grouped: bool) -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 1000) if grouped else None
    order = epoch_order(1000, 16, 5, 2, lengths)
    np.random.seed(99)
    torch.manual_seed(99)
    assert np.array_equal(order, epoch_order(1000, 16, 5, 2, lengths))
    assert not np.array_equal(order, epoch_order(1000, 16, 5, 3, lengths))
    assert not np.array_equal(order, epoch_order(1000, 16, 6, 2, lengths))
    assert not np.array_equal(order, np.arange(1000))
    assert np.array_equal(epoch_order(1000, 16, 5, 2, lengths, shuffle=False), np.arange(1000))


def padding_share(order: np.ndarray, lengths: np.ndarray, size: int) -> float:
    cells = tokens = 0
    for start in range(0, len(order), size):
        members = lengths[order[start : start + size]]
        cells += members.max() * len(members)
        tokens += members.sum()
    return 1 - tokens / cells


def test_grouping_by_length_saves_padding_and_orders_steps_at_random() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 8000)
    size = 16
    plain = epoch_order(8000, size, 1, 0)
    grouped = epoch_order(8000, size, 1, 0, lengths)
    assert padding_share(plain, lengths, size) > 0.35
    assert padding_share(grouped, lengths, size) < 0.05
    means = lengths[grouped].reshape(-1, size).mean(axis=1)
    correlation = np.corrcoef(np.arange(len(means)), means)[0, 1]
    assert abs(correlation) < 0.1  # 500 steps: 0.045 is one standard deviation
    # A step says nothing about the next one: within a pool the steps are shuffled too.
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.15


def test_the_last_short_step_is_not_made_of_the_longest_samples() -> None:
    lengths = np.arange(1000)
    means = []
    for epoch in range(40):
        order = epoch_order(1000, 16, 1, epoch, lengths)
        last = order[992:]
        assert len(last) == 8
        means.append(lengths[last].mean())
    assert abs(np.mean(means) - 500) < 60  # its standard deviation is about 16


@BOUNDED
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), st.integers(0, 2**31))
def test_micro_batches_share_out_a_step_among_all_ranks(
    count: int, batch_size: int, world_size: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 50, 100)
    step = rng.permutation(100)[:count]
    ranks = [micro_batches(step, batch_size, lengths, r, world_size) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1  # nobody waits for another
    assert len(ranks[0]) == -(-count // (batch_size * world_size))
    every = [members for batches in ranks for members in batches]
    assert all(len(members) <= batch_size for members in every)
    assert sorted(np.concatenate(every)) == sorted(step)
    # Like lengths together: a later batch of a rank has nothing shorter than an earlier one.
    for batches in ranks:
        full = [lengths[members] for members in batches if len(members)]
        assert all(a.max() <= b.min() for a, b in itertools.pairwise(full))


@BOUNDED
@given(st.integers(2, 29), st.floats(0.001, 0.999), st.integers(0, 5))
def test_holding_out_splits_without_loss_in_file_order(
    samples: Samples, count: int, fraction: float, seed: int
) -> None:
    some = samples.subset(np.arange(count))
    train, val = hold_out(some, fraction, seed)
    assert 1 <= len(val) < count and abs(len(val) - count * fraction) <= 1
    train_rows, val_rows = train.rows.tolist(), val.rows.tolist()
    assert train_rows == sorted(train_rows) and val_rows == sorted(val_rows)
    assert sorted(train_rows + val_rows) == list(range(1, count + 1))
    assert val_rows == hold_out(some, fraction, seed)[1].rows.tolist()


def test_holding_out_depends_on_the_seed_and_needs_two_samples(samples: Samples) -> None:
    chosen = {tuple(hold_out(samples, 0.3, seed)[1].rows.tolist()) for seed in range(5)}
    assert len(chosen) == 5
    with pytest.raises(UserError, match="one training sample is too few"):
        hold_out(samples.subset(np.array([0])), 0.1, 0)


# ----------------------------------------------------------------------------------- cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_tokenizing(monkeypatch: Any) -> Any:
    def forbid() -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise AssertionError("the tokenizer was called")

        monkeypatch.setattr(Encoder, "_tokenize", fail)

    return forbid


def same(a: Samples, b: Samples) -> bool:
    return (
        len(a) == len(b)
        and a.counts == b.counts
        and a.rows.tolist() == b.rows.tolist()
        and all(item(a, i) == item(b, i) for i in range(len(a)))
    )


def test_a_second_start_reads_the_cache_and_gets_the_same(
    cache: Path, data_file: Path, encoder: Encoder, no_tokenizing: Any, tmp_path: Path
) -> None:
    source = DataSource.open(data_file)
    plain = prepare_train(source.conversations("train"), encoder, 14)
    assert plain.counts.question_cut > 0  # something for the cache to remember
    made, counted = cached_samples(source, "train", encoder, 14, True)
    no_tokenizing()
    moved = tmp_path / "elsewhere" / "another-name.json"  # the key is the content, not the path
    moved.parent.mkdir()
    shutil.move(data_file, moved)
    read, again = cached_samples(DataSource.open(moved), "train", encoder, 14, True)
    assert (
        same(plain, made)
        and same(made, read)
        and counted == again == overlap(DataSource.open(moved))
    )
    assert len(list(cache.iterdir())) == 1


def test_the_cache_key_covers_everything_the_result_depends_on(
    cache: Path, data_file: Path, tokenizer: Any
) -> None:
    source, encoder = DataSource.open(data_file), Encoder(tokenizer)
    cached_samples(source, "train", encoder, 32, True)
    changed = json.loads(data_file.read_text())
    changed["train"][0]["Answer"] += "!"
    other_data = DataSource.open(write(data_file.with_name("other.json"), changed))
    other_tokenizer = tokenizer_that_adds(bos=True, eos=False)
    for arguments in (
        (source, "val", encoder, 32, True),
        (source, "train", encoder, 33, True),
        (source, "train", encoder, 32, False),
        (source, "train", Encoder(tokenizer, "Q: {question} A:"), 32, True),
        (source, "train", Encoder(other_tokenizer), 32, True),
        (other_data, "train", encoder, 32, True),
    ):
        before = len(list(cache.iterdir()))
        got, _ = cached_samples(*arguments)
        assert len(list(cache.iterdir())) == before + 1
        fresh = prepare_train(arguments[0].conversations(arguments[1]), *arguments[2:])
        assert same(got, fresh)


def test_a_row_moved_to_another_split_changes_the_fingerprint(tmp_path: Path) -> None:
    lines = [json.dumps(row) + "\n" for row in rows(3)]
    folder = tmp_path / "d"
    write(folder / "test.jsonl", "".join(lines[:2]))
    write(folder / "train.jsonl", lines[2])
    before = DataSource.open(folder).fingerprint
    assert before == DataSource.open(folder).fingerprint
    write(folder / "test.jsonl", lines[0])
    write(folder / "train.jsonl", "".join(lines[1:]))  # the bytes in a row are the same
    assert DataSource.open(folder).fingerprint != before


@pytest.mark.parametrize("truncate", [True, False])
def test_a_cache_that_cannot_be_written_is_done_without(
    data_file: Path, encoder: Encoder, tmp_path: Path, monkeypatch: Any, truncate: bool
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "file" / "cache"))  # works for root as well
    source = DataSource.open(data_file)
    got, counts = cached_samples(source, "train", encoder, 24, truncate)
    assert same(got, prepare_train(source.conversations("train"), encoder, 24, truncate))
    assert counts == overlap(source)


def test_a_full_disk_is_named_and_leaves_nothing_behind(
    cache: Path, data_file: Path, encoder: Encoder, monkeypatch: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"cannot write the token cache: No space left.*SFT_CACHE"):
        cached_samples(DataSource.open(data_file), "train", encoder, 24, True)
    assert list(cache.iterdir()) == []


def test_bad_rows_leave_nothing_in_the_cache(cache: Path, tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "d.json", {"train": [*rows(2), {"Question": "q"}]})
    for _ in range(2):
        with pytest.raises(UserError, match="row 3: no 'Answer'"):
            cached_samples(DataSource.open(path), "train", encoder, 24, True)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", ["no meta", "empty meta", "short ids", "empty index", "gone"])
def test_a_damaged_entry_is_made_again(
    cache: Path, data_file: Path, encoder: Encoder, damage: str
) -> None:
    source = DataSource.open(data_file)
    plain = prepare_train(source.conversations("train"), encoder, 24)
    cached_samples(source, "train", encoder, 24, True)
    (entry,) = cache.iterdir()
    if damage == "no meta":
        (entry / "meta.json").unlink()
    elif damage == "empty meta":
        (entry / "meta.json").write_text("")
    elif damage == "short ids":
        content = (entry / "input_ids.bin").read_bytes()
        (entry / "input_ids.bin").write_bytes(content[: len(content) // 2 // 4 * 4])
    elif damage == "empty index":
        (entry / "index.npy").write_bytes(b"")
    else:
        (entry / "target_mask.bin").unlink()
    assert same(plain, cached_samples(source, "train", encoder, 24, True)[0])
    assert [path.name for path in cache.iterdir()] == [entry.name]
    assert (entry / "meta.json").stat().st_size > 0


def test_an_entry_half_written_by_a_killed_process_is_not_read(
    cache: Path, data_file: Path, encoder: Encoder
) -> None:
    source = DataSource.open(data_file)
    cached_samples(source, "train", encoder, 24, True)
    (entry,) = cache.iterdir()
    entry.rename(cache / f".{entry.name}-killed")  # the name of an entry while it is written
    (cache / f".{entry.name}-killed" / "input_ids.bin").write_bytes(b"")
    plain = prepare_train(source.conversations("train"), encoder, 24)
    assert same(plain, cached_samples(source, "train", encoder, 24, True)[0])


def test_a_split_of_which_nothing_is_left_is_cached_too(
    cache: Path, data_file: Path, encoder: Encoder
) -> None:
    for _ in range(2):
        got, _ = cached_samples(DataSource.open(data_file), "train", encoder, 2, True)
        assert len(got) == 0 and got.counts.dropped == 22


def test_two_starts_at_once_share_the_work(
    cache: Path, data_file: Path, encoder: Encoder, monkeypatch: Any
) -> None:
    """The first one encodes slowly; the second one waits for it and takes what it made."""
    from extras import token_cache

    rows_encoded: list[int] = []
    original, started = token_cache.prepare_train, threading.Event()

    def slow(conversations: Any, *rest: Any) -> Samples:
        started.set()
        read = list(conversations)
        rows_encoded.append(len(read))
        time.sleep(0.5)
        return original(read, *rest)

    monkeypatch.setattr(token_cache, "prepare_train", slow)

    def start() -> Samples:
        return cached_samples(DataSource.open(data_file), "train", encoder, 64, True)[0]

    with ThreadPoolExecutor() as pool:  # a lock is of an open file, so threads have two as well
        first = pool.submit(start)
        started.wait(10)
        second = pool.submit(start)
        assert same(first.result(), second.result())
    assert rows_encoded == [22]
    assert len(list(cache.iterdir())) == 1
