"""Generation: token for token what transformers' `generate` gives for one prompt at a time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from config import GenerateParams
from conftest import KINDS, asking, rows
from data import Encoder, Prompt
from device import Device
from extras.generation import Batching, Decoding, generate
from model import AnswerModel, load_model

DEVICE = Device("cpu")
NEW = 20


def prompts_of(tokenizer: Any, count: int = 11) -> list[Prompt]:
    """Prompts of 10 to 40 tokens: all longer than tiny GPT-Neo's local window of 8."""
    encoder = Encoder(tokenizer)
    asked = asking(*(row["Question"] for row in rows(count)))
    return [Prompt(*both) for both in zip(asked, encoder.prompts(asked))]


def one_by_one(directory: Path, prompts: list[Prompt], ends: list[int], **kwargs: Any) -> list[Any]:
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
            **kwargs,
        )
        tokens = output[0, ids.shape[1] :].tolist()
        ended = tokens[-1] in ends
        answers.append((prompt.row, tokens[:-1] if ended else tokens, ended))
    return answers


def ours(
    directory: Path, prompts: list[Prompt], params: GenerateParams, **kwargs: Any
) -> list[Any]:
    model = AnswerModel(load_model(str(directory))[0]).eval()
    shuffled = list(prompts)
    random.Random(3).shuffle(shuffled)
    batching = Batching(**kwargs)
    answers = list(generate(model, shuffled, DEVICE, Decoding(params, seed=5), batching))
    return sorted((a.prompt.row, a.tokens, a.ended) for a in answers)


@pytest.fixture(scope="module")
def ends(model_dirs: dict[str, Path], tokenizer: Any) -> dict[str, list[int]]:
    """Tokens that end answers of each model at different lengths, so that places get refilled."""
    found = {}
    for kind in KINDS:
        answers = one_by_one(model_dirs[kind], prompts_of(tokenizer), [0])
        middle = [tokens[3 + i % 9] for i, (_, tokens, _) in enumerate(answers) if len(tokens) > 12]
        found[kind] = [0, *middle[:4]]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_equal_generate_one_by_one(
    kind: str, model_dirs: dict[str, Path], tokenizer: Any, ends: dict[str, list[int]]
) -> None:
    prompts = prompts_of(tokenizer)
    expected = one_by_one(model_dirs[kind], prompts, ends[kind])
    lengths = {len(tokens) for _, tokens, _ in expected}
    assert len(lengths) > 2, "answers of one length would not test refilling"
    params = GenerateParams(max_new_tokens=NEW, eos_token_id=ends[kind])
    for side in ("left", "right"):
        for pad_to in (None, 60):
            for use_cache in (True, False):
                for batch_size in (3, 16):
                    got = ours(
                        model_dirs[kind],
                        prompts,
                        params,
                        padding_side=side,
                        pad_to=pad_to,
                        use_cache=use_cache,
                        batch_size=batch_size,
                    )
                    assert got == expected, (side, pad_to, use_cache, batch_size)


@pytest.mark.parametrize(
    "name, value",
    [
        ("no_repeat_ngram_size", 2),
        ("repetition_penalty", 1.7),
        ("min_new_tokens", 15),
        ("bad_words_ids", None),
        ("suppress_tokens", None),
        ("begin_suppress_tokens", None),
    ],
)
def test_each_processor_acts_as_in_transformers(
    name: str, value: Any, model_dirs: dict[str, Path], tokenizer: Any, ends: dict[str, list[int]]
) -> None:
    prompts, kind = prompts_of(tokenizer), "llama"
    plain = one_by_one(model_dirs[kind], prompts, ends[kind])
    if value is None:  # forbid what is generated otherwise
        first = sorted({tokens[0] for _, tokens, _ in plain if tokens})
        value = [[token] for token in first] if name == "bad_words_ids" else first
    expected = one_by_one(model_dirs[kind], prompts, ends[kind], **{name: value})
    assert expected != plain, "the setting must make a difference here"
    params = GenerateParams(max_new_tokens=NEW, eos_token_id=ends[kind], **{name: value})
    for use_cache in (True, False):
        got = ours(model_dirs[kind], prompts, params, batch_size=4, use_cache=use_cache)
        assert got == expected


def test_long_runs_shift_the_cache(model_dirs: dict[str, Path], tokenizer: Any) -> None:
    """More tokens than SHIFT_EVERY in one batch whose rows come and go."""
    prompts = prompts_of(tokenizer, 30)
    params = GenerateParams(max_new_tokens=NEW)
    expected = ours(model_dirs["qwen2"], prompts, params, batch_size=1)
    assert ours(model_dirs["qwen2"], prompts, params, batch_size=4) == expected


SAMPLING = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3}


def test_a_sampled_answer_depends_on_its_own_prompt_row_and_seed_only(
    model_dirs: dict[str, Path], tokenizer: Any
) -> None:
    prompts = prompts_of(tokenizer)
    params = GenerateParams(max_new_tokens=NEW, **SAMPLING)
    whole = ours(model_dirs["llama"], prompts, params, batch_size=4)
    assert ours(model_dirs["llama"], prompts, params, batch_size=1) == whole
    assert ours(model_dirs["llama"], prompts[4:7], params, batch_size=16) == whole[4:7]
    model = AnswerModel(load_model(str(model_dirs["llama"]))[0]).eval()
    other = generate(model, prompts, DEVICE, Decoding(params, seed=6), Batching())
    assert sorted((a.prompt.row, a.tokens, a.ended) for a in other) != whole


@pytest.mark.parametrize(
    "setting",
    [
        {"top_k": 1},
        {"top_k": 0, "top_p": 1e-6},
        {"top_k": 0, "temperature": 1e-4},
        {"top_k": 0, "min_p": 1.0},
        {"top_k": 0, "epsilon_cutoff": 0.999},
    ],
)
def test_each_sampling_setting_at_its_sharpest_is_greedy(
    setting: dict[str, Any], model_dirs: dict[str, Path], tokenizer: Any
) -> None:
    prompts = prompts_of(tokenizer, 4)
    greedy = ours(model_dirs["gpt2"], prompts, GenerateParams(max_new_tokens=8))
    free = GenerateParams(max_new_tokens=8, do_sample=True, top_k=0)
    assert ours(model_dirs["gpt2"], prompts, free) != greedy
    sharp = GenerateParams(max_new_tokens=8, do_sample=True, **setting)
    assert ours(model_dirs["gpt2"], prompts, sharp) == greedy


@pytest.mark.parametrize("setting", [{"typical_p": 0.2}, {"eta_cutoff": 0.9}])
def test_entropy_dependent_cutoffs_change_what_is_drawn(
    setting: dict[str, Any], model_dirs: dict[str, Path], tokenizer: Any
) -> None:
    prompts = prompts_of(tokenizer, 4)
    results = [
        ours(
            model_dirs["gpt2"],
            prompts,
            GenerateParams(max_new_tokens=8, do_sample=True, top_k=0, **changes),
        )
        for changes in ({}, setting)
    ]
    assert results[0] != results[1]


def test_generation_leaves_every_generator_alone(
    model_dirs: dict[str, Path], tokenizer: Any
) -> None:
    before = DEVICE.rng_state()["torch"], random.getstate(), np.random.get_state()[1].tolist()
    ours(model_dirs["gpt2"], prompts_of(tokenizer, 3), GenerateParams(**SAMPLING))
    after = DEVICE.rng_state()["torch"], random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
