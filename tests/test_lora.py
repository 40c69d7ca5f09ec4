"""Adapters: the mathematics and the files of PEFT, and all that holds for other runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_ranks import run_ranks
from test_zoo import SHORT_LIST
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import freeze
import lora
import sft
import zoo
from checkpoint import State
from config import Adapter, ModelParams
from conftest import (
    KINDS,
    Runner,
    conversations,
    metrics_of,
    newest,
    set_up,
)
from data import Encoder, collate, prepare_train
from extras.console import SilentRecorder
from model import AnswerModel, load_model, open_model

SMALL = {"r": 4, "alpha": 8}
STEP = {"trainer__params__max_steps": 3, "model_params__learning_rate": 1e-2}


def adapter_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / lora.WEIGHTS)


def fill(model: torch.nn.Module, seed: int = 0) -> None:
    """Values for every B, which is zero at first and hides A."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)


def attached(place: Path, seed: int = 3, **more: Any) -> tuple[Any, dict[str, Any]]:
    """A model as training opens it, with an adapter that does something."""
    model, _ = load_model(str(place))
    params = ModelParams(adapter=Adapter(**(SMALL | more)))
    freeze.apply(model, params)
    config = lora.attach(model, params.adapter, seed)
    fill(model)
    return model, config


def loss_and_gradients(model: Any, tokenizer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Our packed, chunked loss on eight samples, and the gradients of A and B by PEFT's names."""
    samples = prepare_train(conversations(8), Encoder(tokenizer), 64)
    answers = AnswerModel(model)
    answers.train()
    loss = answers(collate(samples, np.arange(len(samples)), packed=answers.can_pack))
    loss.backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), named


def reference(model: Any, tokenizer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from a PEFT model: one sample at a time, with transformers' own loss."""
    samples = prepare_train(conversations(8), Encoder(tokenizer), 64)
    total = torch.zeros(())
    model.train()
    for i in range(len(samples)):
        ids, mask = (torch.from_numpy(a.astype(np.int64)) for a in samples.sample(i))
        labels = ids.masked_fill(mask == 0, -100)
        loss = model(input_ids=ids[None], labels=labels[None]).loss * (mask[1:] > 0).sum()
        loss.backward()
        total += loss.detach()
    named = {
        n.removeprefix(lora.PREFIX).replace(".default", ""): p.grad
        for n, p in model.named_parameters()
        if p.grad is not None
    }
    return total, named


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_our_files_and_has_the_same_loss_gradients_and_merged_weights(
    kind: str, model_dirs: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    model, config = attached(model_dirs[kind])
    lora.save(model, dict(lora.saved(model)), config, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(model_dirs[kind])
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    loss, found = loss_and_gradients(model, tokenizer)
    expected_loss, expected = reference(theirs, tokenizer)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    assert len(found) == 2 * len(lora.targets(model, lora.ALL_LINEAR))
    for name, grad in expected.items():
        assert grad.any(), name
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4 * float(grad.norm()))
    lora.merge(model)
    merged = theirs.merge_and_unload()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)
    assert not any("lora" in name for name in model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_files_that_peft_wrote(
    kind: str, rslora: bool, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_dirs[kind])
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=rslora)
    theirs = peft.get_peft_model(base, config).eval()
    fill(theirs)
    theirs.save_pretrained(tmp_path)
    ours = open_model(tmp_path).model.eval()
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours.logits(ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_our_files_are_those_that_peft_writes(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    model, config = attached(model_dirs["llama"], target_modules=["q_proj", "v_proj"])
    (tmp_path / "ours").mkdir()
    lora.save(model, dict(lora.saved(model)), config, tmp_path / "ours")
    base = AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "theirs")
    ours, theirs = (adapter_of(tmp_path / name) for name in ("ours", "theirs"))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }
    with safe_open(tmp_path / "ours" / lora.WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    written = json.loads((tmp_path / "theirs" / lora.CONFIG).read_text())
    written["target_modules"].sort()
    for key, value in json.loads((tmp_path / "ours" / lora.CONFIG).read_text()).items():
        assert written[key] == value, key


def test_the_first_step_starts_from_the_loss_of_the_base(run: Runner) -> None:
    whole, adapted = run(**STEP), run(**STEP, model_params__adapter=SMALL)
    first = [metrics_of(one)[0]["loss"] for one in (whole, adapted)]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    losses = [line["loss"] for line in metrics_of(adapted) if "loss" in line]
    assert losses[1] != first[1]


def test_a_checkpoint_holds_the_adapter_and_what_it_is_one_of(
    run: Runner, model_dirs: dict[str, Path]
) -> None:
    directory = run(**STEP, model_params__adapter=SMALL)
    names = {path.name for path in newest(directory).iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "generation_config.json",
        "manifest.json", "sft.json", "tokenizer.json", "tokenizer_config.json", "trainer.yaml",
        "trainer_state.pt",
    }  # fmt: skip
    about = json.loads((directory / "best" / "sft.json").read_text())
    assert about["base"] == str(model_dirs["gpt_neo"])
    assert about["base_fingerprint"] == open_model(model_dirs["gpt_neo"]).fingerprint
    size = sum(t.numel() for t in adapter_of(newest(directory)).values())
    assert (newest(directory) / lora.WEIGHTS).stat().st_size < 4 * size + 10_000
    state = torch.load(newest(directory) / "trainer_state.pt", weights_only=True)
    moments = [s["exp_avg"].numel() for s in state["optimizer"]["state"].values()]
    assert sum(moments) == size
    peft.AutoPeftModelForCausalLM.from_pretrained(directory / "best")


def test_a_resumed_run_has_the_same_bits(run: Runner) -> None:
    changes = {
        "model_params__adapter": SMALL | {"dropout": 0.2},
        "trainer__checkpoint__every_n_train_steps": 2,
        "trainer__checkpoint__save_top_k": 9,
    }
    whole = run(**changes)
    again = run(**changes, trainer__ckpt_path=str(whole / "step-000004"))
    for name, tensor in adapter_of(newest(whole)).items():
        assert torch.equal(adapter_of(newest(again))[name], tensor), name
    ends = [[line for line in metrics_of(one) if line["step"] > 4] for one in (whole, again)]
    assert ends[0] == ends[1]


def test_the_base_stays_as_it_is_to_the_bit(run: Runner) -> None:
    made = set_up(run.config(**STEP, model_params__adapter=SMALL))
    before = {n: p.clone() for n, p in made.model.model.named_parameters()}
    sft.loop(made, State(), SilentRecorder(), sft.Stop())
    for name, parameter in made.model.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
    assert [kind for kind, _, trained in made.kinds if trained] == ["adapter"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_blocks_that_train_whole_are_saved_as_peft_does(
    kind: str, run: Runner, model_dirs: dict[str, Path]
) -> None:
    directory = run(
        model=kind, **STEP, model_params__adapter=SMALL, model_params__layers_not_to_freeze=[-1]
    )
    config = json.loads((directory / "best" / lora.CONFIG).read_text())
    block = {"llama": "model.layers.2", "gpt2": "transformer.h.2"}[kind]
    assert config["modules_to_save"] == [block]
    names = {name.removeprefix(lora.PREFIX) for name in adapter_of(directory / "best")}
    assert {n for n in names if n.startswith(block)} == {
        n for n, _ in open_model(model_dirs[kind]).model.model.named_parameters() if block in n
    }
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(directory / "best").eval()
    ours = open_model(directory / "best").model.eval()
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    run.resume(directory, "trainer.params.max_steps=4")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_the_adapter_that_one_process_trains(
    strategy: str, run: Runner, uneven: Path, tmp_path: Path
) -> None:
    changes = {
        "data": uneven,
        "model": "qwen2",
        "model_params__adapter": SMALL,
        "model_params__layers_not_to_freeze": [1],
        "trainer__params__precision": "64",
        "trainer__params__strategy": strategy,
    }
    alone = run(**changes, data__batch_size=8)
    shared = run.file(**changes, data__batch_size=4, name="ranks")
    run_ranks(2, tmp_path / "output", "train", shared)
    expected, found = (adapter_of(newest(tmp_path / name)) for name in (alone.name, "ranks"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("precision", ["16", "bf16", "bf16-true"])
def test_every_precision(precision: str, run: Runner) -> None:
    directory = run(
        model="llama",
        **STEP,
        model_params__adapter=SMALL,
        trainer__params__precision=precision,
        trainer__params__gradient_checkpointing=True,
    )
    wanted = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {t.dtype for t in adapter_of(newest(directory)).values()} == {wanted}
    losses = [line["loss"] for line in metrics_of(directory) if "loss" in line]
    assert losses[-1] < losses[0]


def test_frozen_blocks_below_the_first_adapter_are_cached(run: Runner) -> None:
    adapter = SMALL | {"target_modules": ["h.3.mlp.c_fc", "h.3.attn.attention.q_proj"]}
    plain, cached = (
        run(model_params__adapter=adapter, model_params__cache_frozen_prefix=where)
        for where in (None, "memory")
    )
    for name, tensor in adapter_of(newest(plain)).items():
        torch.testing.assert_close(adapter_of(newest(cached))[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SHORT_LIST)
def test_every_family_takes_an_adapter(name: str, tmp_path: Path, tokenizer: Any) -> None:
    """Held against plain transformers with merged weights W + s B A and their gradient G.

    By the chain rule A has the gradient s B^T G, and B has s G A^T. PEFT would do for most
    families; it has no adapters on some projections of Mamba and of mixtures of experts.
    """
    zoo.build(name, len(tokenizer), std=0.1).save_pretrained(tmp_path)
    model, _ = attached(tmp_path)
    loss, found = loss_and_gradients(model, tokenizer)
    adapters = {n: (m.lora_A.weight, m.lora_B.weight) for n, m in lora.projections(model).items()}
    assert found.keys() == lora.saved(model).keys()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    lora.merge(model)
    plain.load_state_dict(model.state_dict())
    expected_loss, expected = reference(plain, tokenizer)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-4)
    floor = max(float(p.norm()) for p in found.values()) / 100
    for module, (a, b) in adapters.items():
        grad = expected[f"{module}.weight"] * SMALL["alpha"] / SMALL["r"]
        grad = grad.T if isinstance(plain.get_submodule(module), Conv1D) else grad
        for part, wanted in (("lora_A", b.T @ grad), ("lora_B", grad @ a.T)):
            off = float((found[f"{module}.{part}.weight"] - wanted).detach().norm())
            assert off < 1e-3 * max(float(wanted.detach().norm()), floor), (module, part)
