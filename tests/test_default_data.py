"""The default data and model: reproducible, split without leaks, and usable by transformers."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoConfig, PreTrainedTokenizerBase

from conftest import ROOT, TOKENIZER

DATA = ROOT / "data"

Splits = dict[str, list[dict[str, str]]]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return json.loads((DATA / "facts.json").read_text(encoding="utf-8"))


def run(script: str, *args: str | Path) -> subprocess.CompletedProcess:
    """Run data/<script> as a user does."""
    command = [sys.executable, str(DATA / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_facts_script_reproduces_the_file(tmp_path: Path) -> None:
    out = tmp_path / "facts.json"
    made = run("make_facts.py", "--out", out)
    assert made.returncode == 0, made.stderr
    assert out.read_bytes() == (DATA / "facts.json").read_bytes()


def test_facts_check_notices_one_changed_byte(tmp_path: Path) -> None:
    out = tmp_path / "facts.json"
    assert run("make_facts.py", "--check", "--out", out).returncode == 1  # absent
    content = (DATA / "facts.json").read_bytes()
    out.write_bytes(content)
    assert run("make_facts.py", "--check", "--out", out).returncode == 0
    out.write_bytes(content.replace(b"Paris", b"Paras", 1))
    checked = run("make_facts.py", "--check", "--out", out)
    assert checked.returncode == 1, checked.stderr
    assert b"Paras" in out.read_bytes()  # --check writes nothing


def test_model_script_reproduces_the_directory(tmp_path: Path) -> None:
    out = tmp_path / "model"
    made = run("make_model.py", "--out", out)
    assert made.returncode == 0, made.stderr
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in TOKENIZER.iterdir()
    }


def test_model_check_notices_one_changed_byte(tmp_path: Path) -> None:
    out = tmp_path / "model"
    shutil.copytree(TOKENIZER, out)
    assert run("make_model.py", "--check", "--out", out).returncode == 0
    config = out / "config.json"
    config.write_bytes(config.read_bytes().replace(b"global", b"glabal", 1))
    checked = run("make_model.py", "--check", "--out", out)
    assert checked.returncode == 1
    assert "config.json" in checked.stdout


def test_split_sizes_and_format(splits: Splits) -> None:
    assert list(splits) == ["train", "val", "test"]
    assert len(splits["train"]) >= 2000
    assert len(splits["val"]) >= 150
    assert len(splits["test"]) >= 300
    for pair in [pair for pairs in splits.values() for pair in pairs]:
        assert list(pair) == ["Question", "Answer"]
        for text in pair.values():
            # Exact match strips its two sides; an answer that has an edge to strip, or a doubled
            # space, would be a slip in a table.
            assert text and text == " ".join(text.split())


def test_no_question_comes_twice(splits: Splits) -> None:
    """Neither inside a split nor across two: so no leak, and no question with two answers."""
    questions = [pair["Question"] for pairs in splits.values() for pair in pairs]
    assert len(questions) == len(set(questions))


def load_make_facts() -> ModuleType:
    """data/make_facts.py as a module; `data` is not a package."""
    spec = importlib.util.spec_from_file_location("make_facts", DATA / "make_facts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_facts"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_every_held_out_fact_and_phrasing_is_trained_but_never_together(splits: Splits) -> None:
    """Test and val ask trained facts in trained phrasings; only the combination is new."""
    cells = {}  # question -> (fact, phrasing), both with the relation's number
    relations = load_make_facts().relations()
    for r, relation in enumerate(relations):
        for x, answer in relation.rows.items():
            for phrasing in relation.phrasings:
                cells[phrasing.format(x=x)] = ((r, x, answer), (r, phrasing))
    seen = {name: [cells[pair["Question"]] for pair in pairs] for name, pairs in splits.items()}
    assert sum(map(len, seen.values())) == len(cells)
    for name, pairs in splits.items():  # the answers in the file are those of the tables
        assert [pair["Answer"] for pair in pairs] == [fact[2] for fact, _ in seen[name]]

    facts = {name: {fact for fact, _ in pairs} for name, pairs in seen.items()}
    phrasings = {name: {phrasing for _, phrasing in pairs} for name, pairs in seen.items()}
    for held_out in ("val", "test"):
        assert not set(seen[held_out]) & set(seen["train"])
        assert facts[held_out] <= facts["train"]
        assert phrasings[held_out] <= phrasings["train"]
    assert not set(seen["val"]) & set(seen["test"])
    assert facts["test"] == facts["train"]  # every fact is tested,
    assert len(seen["test"]) == len(facts["test"])  # in exactly one phrasing
    assert phrasings["test"] == {(r, p) for r, rel in enumerate(relations) for p in rel.phrasings}
    answers = {pair["Answer"] for pair in splits["train"]}
    assert {pair["Answer"] for pair in splits["test"] + splits["val"]} <= answers


def test_tokenizer_is_fast_complete_and_adds_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.is_fast
    assert tokenizer("")["input_ids"] == []
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.unk_token == "<|endoftext|>"
    # Text of every Unicode block needs all bytes UTF-8 uses; none may become the unknown token.
    code_points = [*range(0x3000), *range(0x3000, 0xD800, 97), *range(0xE000, 0x110000, 97)]
    every = "".join(map(chr, code_points))
    ids = tokenizer(every)["input_ids"]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == every


def test_an_entity_has_the_same_tokens_in_questions_and_answers(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """This lets the tiny model carry a fact over to a phrasing it has not seen it in."""
    ids = tokenizer(" Paris")["input_ids"]
    assert len(ids) == 1
    for question in ("Paris is the capital of which country?", "Which country's capital is Paris?"):
        assert ids[0] in tokenizer(f"Question: {question} \nAnswer:")["input_ids"]


def test_config_has_both_attention_kinds_and_a_window_that_matters() -> None:
    config = AutoConfig.from_pretrained(TOKENIZER)
    assert config.architectures == ["GPTNeoForCausalLM"]
    assert set(config.attention_layers) == {"global", "local"}
    assert len(config.attention_layers) == config.num_layers
    assert config.window_size < config.max_position_embeddings
    assert config.hidden_size % config.num_heads == 0


def test_config_and_tokenizer_agree(tokenizer: PreTrainedTokenizerBase) -> None:
    config = AutoConfig.from_pretrained(TOKENIZER)
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id == config.bos_token_id == tokenizer.eos_token_id
    assert config.max_position_embeddings == tokenizer.model_max_length


def test_there_are_no_weights() -> None:
    assert {p.name for p in TOKENIZER.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
