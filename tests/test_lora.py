"""Adapters: the mathematics and the files of PEFT, and all that holds for other runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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
from config import Adapter, ModelParams, UserError
from conftest import KINDS, Runner, cli, conversations, metrics_of, newest, set_up, weights_of
from data import Encoder, collate, prepare_train
from extras.console import Recorder
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


@pytest.mark.parametrize("kind", ["llama", "gpt_neo"])
def test_dropout_acts_in_every_adapter_while_it_trains(
    kind: str, model_dirs: dict[str, Path], tokenizer: Any
) -> None:
    """The fused paths must leave it to the modules; 0.5 zeroes or doubles each input of A."""
    model, _ = attached(model_dirs[kind], dropout=0.5)
    first, gradients = loss_and_gradients(model, tokenizer)
    assert all(grad.any() for grad in gradients.values())
    assert gradients.keys() == lora.saved(model).keys()
    assert first != loss_and_gradients(model, tokenizer)[0]
    ids = torch.arange(20, 40)[None]
    plain, _ = attached(model_dirs[kind])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)
    for name in lora.targets(model.requires_grad_(False), lora.ALL_LINEAR):
        model.get_submodule(name).train()
        with torch.no_grad():
            assert not torch.equal(model(ids).logits, plain(ids).logits), name
        model.get_submodule(name).eval()


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
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "generation_config.json",
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
    sft.loop(made, State(), Recorder(), SimpleNamespace(requested=bool, signal=None))
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


def test_training_goes_on_with_an_adapter_that_peft_wrote(
    run: Runner, model_dirs: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    """Its values are the beginning, its settings and its base stay; it lies without a tokenizer."""
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    theirs = peft.get_peft_model(base, settings)
    fill(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    directory = run(model=tmp_path / "theirs", **(STEP | {"model_params__learning_rate": 1e-6}))
    before, after = adapter_of(tmp_path / "theirs"), adapter_of(directory / "best")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-5)
    about = json.loads((directory / "best" / "sft.json").read_text())
    assert about["base"] == str(model_dirs["llama"])
    assert "training goes on with the adapter in" in capsys.readouterr().out
    run.resume(directory, "trainer.params.max_steps=4")
    other = {"r": 5, "alpha": 6, "target_modules": ["q_proj"]}
    run(model=tmp_path / "theirs", model_params__adapter=other, code=2)
    assert "model_name is an adapter with r=3 alpha=6" in capsys.readouterr().err
    run(model=tmp_path / "theirs", model_params__adapter=other | {"r": 3}, **STEP)
    run(model=tmp_path / "theirs", model_params__layers_not_to_freeze=[1], code=2)
    assert "what it holds is trained, and nothing else" in capsys.readouterr().err


def test_every_command_opens_adapters(
    run: Runner, model_dirs: dict[str, Path], capsys: Any
) -> None:
    directory = run(model="gpt2", **STEP, model_params__adapter=SMALL)
    log = run.test(model="gpt2", test_params__test_model_path=[None, str(directory)])
    logs = [log.with_name(f"log.{i}.jsonl") for i in (1, 2)]
    assert cli("test", "--compare", *logs) == 0
    assert cli("ask", directory, "Two plus two?") == 0
    assert cli("check", run.file(model=directory)) == 0
    printed = capsys.readouterr().out
    assert "r 4, alpha 8, 12 projections (c_attn, c_proj, c_fc)" in printed
    answers = [[json.loads(line)["generated"] for line in one.open()] for one in logs]
    assert answers[0] != answers[1]


def test_a_base_that_has_changed_is_refused_on_resume_and_named_elsewhere(
    run: Runner, model_dirs: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    base = shutil.copytree(model_dirs["gpt_neo"], tmp_path / "base")
    directory = run(model=base, **STEP, model_params__adapter=SMALL)
    moved = base.rename(tmp_path / "moved")
    run.test(model=directory, code=2)
    assert f"its base, {base}, is not there" in capsys.readouterr().err
    run.resume(directory, "trainer.params.max_steps=4", f"model_name={moved}")
    run.test("--quiet", model=directory)
    assert "weights have changed" not in capsys.readouterr().err
    other = weights_of(model_dirs["gpt_neo"])
    other["transformer.wte.weight"] += 1e-3
    save_file(other, moved / "model.safetensors", metadata={"format": "pt"})
    run.resume(directory, "trainer.params.max_steps=5", f"model_name={moved}", code=2)
    assert "base: the checkpoint has" in capsys.readouterr().err
    run.test("--quiet", model=directory, name="again")
    assert f"{moved}: its weights have changed since the adapter in" in capsys.readouterr().err
    run.test(model=directory, code=2)  # the log of before is of another model
    assert "holds answers of another test" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"use_dora": True}, "use_dora: True"),
        ({"bias": "all"}, "bias: 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type: 'IA3'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"of_a_later_peft": 3}, "of_a_later_peft: 3"),
        ({"r": None}, "r: None"),
    ],
)
def test_adapters_of_other_kinds_are_refused_by_name(
    changes: dict[str, Any], part: str, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    model, config = attached(model_dirs["llama"])
    lora.save(model, dict(lora.saved(model)), config | changes, tmp_path)
    with pytest.raises(UserError, match=re.escape(part)):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: {n: v for n, v in t.items() if "1.mlp.up_proj.lora_B" not in n}, "missing"),
        (lambda t: {n: v[:1] if "lora_A" in n else v for n, v in t.items()}, "found [1, 32], not"),
        (lambda t: t | {"base_model.model.x.lora_embedding_A": torch.ones(2)}, "nothing of this"),
        (lambda t: {n: v / 0 for n, v in t.items()}, "not finite"),
        (lambda t: t | {"base_model.model.lm_head.weight": torch.ones(1536, 32)}, "tied"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    change: Any, part: str, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    model, config = attached(model_dirs["qwen2"])
    lora.save(model, dict(lora.saved(model)), config, tmp_path)
    save_file(change(adapter_of(tmp_path)), tmp_path / lora.WEIGHTS)
    with pytest.raises(UserError, match=re.escape(part)):
        open_model(tmp_path)


def test_names_that_match_nothing_are_refused_with_those_that_exist(
    run: Runner, capsys: Any
) -> None:
    for names in (["q_prj"], ["lm_head"], ["mlp"]):
        run(model="llama", model_params__adapter={"target_modules": names}, code=2)
        message = capsys.readouterr().err
        assert f"target_modules: found '{names[0]}'" in message
        assert (
            "known here: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in message
        )
    run(
        model="llama",
        model_params__adapter={},
        model_params__layers_not_to_freeze=[0, 1, 2],
        code=2,
    )
    assert "nothing of it is outside of the blocks that train whole" in capsys.readouterr().err


def test_contradictions_are_named_together(run: Runner, capsys: Any) -> None:
    run(
        model_params__adapter={"r": 0, "target_modules": "q_proj", "rank": 3},
        model_params__from_scratch=True,
        model_params__do_freeze=True,
        model_params__freeze_emb=True,
        code=2,
    )
    message = capsys.readouterr().err
    for part in (
        "adapter.r: found 0",
        "adapter.target_modules: found 'q_proj'",
        "adapter.rank: unknown",
    ):
        assert part in message
    run(
        model_params__adapter={},
        model_params__from_scratch=True,
        model_params__do_freeze=True,
        model_params__freeze_emb=True,
        code=2,
    )
    message = capsys.readouterr().err
    assert "2 problems" in message and "from_scratch: true; an adapter needs" in message
    assert "do_freeze: true and freeze_ln, freeze_attn, freeze_ff, freeze_other: false" in message


@pytest.mark.parametrize("adapter", [SMALL, None])
def test_export(adapter: Any, run: Runner, tmp_path: Path, capsys: Any) -> None:
    directory = run(model="llama", **STEP, model_params__adapter=adapter)
    capsys.readouterr()
    assert cli("export", directory, tmp_path / "whole") == 0
    printed = capsys.readouterr().out
    assert re.search(r"logits differ by at most [0-9.]+e-0[5-9]", printed) or "0.0e+00" in printed
    assert "100% of the greedy answers are equal (6)" in printed
    assert json.loads((tmp_path / "whole" / "sft.json").read_text())["global_step"] == 3
    ids = torch.arange(20, 40)[None]
    ours, theirs = (
        open_model(directory / "best").model.eval(),
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole"),
    )
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.logits(ids), rtol=1e-4, atol=1e-4)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names >= {"tokenizer.json", "generation_config.json", "config.json", "model.safetensors"}
    assert cli("export", directory, tmp_path / "half", "bfloat16") == 0
    assert {t.dtype for t in weights_of(tmp_path / "half").values()} == {torch.bfloat16}
    assert cli("export", directory, tmp_path / "half") == 2
    assert "already there" in capsys.readouterr().err


def test_a_file_that_does_not_hold_the_adapter_is_not_saved(
    run: Runner, model_dirs: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """As if a rank's slice, or nothing, had been written."""
    model, config = attached(model_dirs["llama"])
    whole = dict(lora.saved(model))
    with pytest.raises(UserError, match="does not hold the adapter"):
        lora.save(model, whole | {n: t[:1] for n, t in list(whole.items())[:1]}, config, tmp_path)
    monkeypatch.setattr(lora, "save_file", lambda tensors, path, **_: save_file({}, path))
    directory = run(**STEP, model_params__adapter=SMALL, code=2)
    assert not list(directory.glob("step-*")) and not (directory / "best").exists()


def test_check_knows_what_is_usual_for_an_adapter(run: Runner, capsys: Any) -> None:
    file = run.file(model_params__adapter=SMALL, model_params__learning_rate=1e-4)
    assert cli("check", file) == 0
    printed = capsys.readouterr()
    assert "is low for a model of" in printed.err and "is usual for an adapter" in printed.err
    assert re.search(r"^adapter +9,216 +9,216 +0$", printed.out, re.M)
    size = 4 * 9216 / 1e6
    assert (
        f"disk      {3 * size:.1f} MB a checkpoint, 2 of them kept, best {size:.1f} MB"
        in printed.out
    )
