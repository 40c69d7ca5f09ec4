"""The model layer: the answer loss against transformers' own, GPT-Neo's attention, the schedule."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import model as model_module
from config import ModelParams, UserError
from conftest import KINDS, item, tiny_config
from data import IGNORE, Samples, collate
from extras.same_run import architecture
from extras.speed import GELU, SILU, FastLinear, linear, speed_up
from model import (
    AnswerModel,
    learning_rate,
    load_model,
    make_optimizer,
    warmup_steps,
)


def reference_batch(samples: Samples) -> dict[str, torch.Tensor]:
    """The same samples as plain padded tensors with labels, for transformers' own loss."""
    width = int(samples.lengths.max())
    items = [item(samples, i) for i in range(len(samples))]
    seen = [{**one, "attention_mask": [1] * len(one["labels"])} for one in items]
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
    return {
        name: torch.tensor([one[name] + [value] * (width - len(one[name])) for one in seen])
        for name, value in fill.items()
    }


def in_full_precision(model: Any) -> Any:
    """Eager GPT-Neo rounds queries and keys to float32 in any dtype; this is its formula without
    that, with its own mask buffer."""

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None) -> Any:
        T, S = query.shape[-2], key.shape[-2]
        scores = query @ key.transpose(-1, -2)
        lowest = torch.finfo(scores.dtype).min
        scores = scores.where(module.bias[:, :, S - T : S, :S], lowest)
        if attention_mask is not None:
            scores = scores + attention_mask
        return scores.softmax(-1) @ value, None

    for module in model.modules():
        if type(module).__name__ == "GPTNeoSelfAttention":
            module._attn = functools.partial(attend, module)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [2**25, 3000])
def test_loss_and_gradients_equal_those_of_transformers(
    kind: str, chunk: int, model_dirs: dict[str, Path], samples: Samples, monkeypatch: Any
) -> None:
    monkeypatch.setattr(model_module, "LOGITS_PER_CHUNK", chunk)  # 3000: one or two rows a chunk
    ours, _ = load_model(str(model_dirs[kind]), dtype=torch.float64)
    # Eager attention rounds to float32 inside (softmax, GPT-Neo's scores); SDPA does not.
    theirs = in_full_precision(
        AutoModelForCausalLM.from_pretrained(model_dirs[kind], dtype=torch.float64)
    )
    answer_model = AnswerModel(ours)
    assert answer_model.split, "the head must run on target positions only"
    assert answer_model.can_pack
    batch = collate(samples, np.arange(len(samples)), packed=True)
    assert batch.input_ids.shape[0] == 1
    loss = answer_model(batch) / len(batch.target_ids)
    loss.backward()
    inputs = reference_batch(samples)
    output = theirs(**inputs)
    # transformers rounds logits to float32 before its loss, so the exact reference is its
    # logits under a plain float64 cross-entropy, and its own loss is met to float32.
    logits, labels = output.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    reference = torch.nn.functional.cross_entropy(logits, labels)
    reference.backward()
    assert torch.allclose(loss, reference, rtol=1e-10, atol=0)
    assert torch.allclose(loss.float(), output.loss, rtol=1e-6)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-8, atol=1e-12), name
    per_target = answer_model.target_losses(collate(samples, np.arange(len(samples))))
    assert torch.allclose(per_target.double().mean(), reference, rtol=1e-6)


def test_a_head_with_bias_and_a_soft_cap_gives_the_plain_loss(
    tokenizer: Any, samples: Samples
) -> None:
    from transformers import Gemma2Config, PhiConfig

    common = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 128}
    capped = Gemma2Config(
        **common, **heads, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0
    )
    biased = PhiConfig(**common, **heads)
    batch = collate(samples, np.arange(len(samples)))
    for config in (capped, biased):
        config.initializer_range = 0.3
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        if config is biased:
            torch.nn.init.normal_(plain.lm_head.bias)
        answer_model = AnswerModel(plain.eval())
        assert answer_model.split
        loss = answer_model(batch)
        loss.backward()
        ours = {n: p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None}
        plain.zero_grad()
        answer_model.split = False
        whole = answer_model(batch)
        whole.backward()
        assert torch.allclose(loss, whole.double(), rtol=1e-6)
        for name, parameter in plain.named_parameters():
            assert torch.allclose(ours[name], parameter.grad, rtol=1e-5, atol=1e-6), name


def test_an_unusual_head_falls_back_to_the_whole_model(
    model_dirs: dict[str, Path], samples: Samples
) -> None:
    model, _ = load_model(str(model_dirs["llama"]))
    original = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    answer_model = AnswerModel(model)
    assert not answer_model.split
    batch = collate(samples, np.arange(4))
    assert not torch.isclose(
        answer_model(batch), AnswerModel(load_model(str(model_dirs["llama"]))[0])(batch)
    )


def test_what_padding_holds_never_changes_loss_or_gradient(
    model_dirs: dict[str, Path], tokenizer: Any, samples: Samples
) -> None:
    for kind in KINDS:
        results = []
        for pad_id in (0, 17, len(tokenizer) - 1):
            model, _ = load_model(str(model_dirs[kind]))
            batch = collate(samples, np.arange(8))
            for row, length in zip(batch.input_ids, samples.lengths):
                row[length:] = pad_id
            loss = AnswerModel(model)(batch)
            loss.backward()
            results.append((loss, model.get_input_embeddings().weight.grad))
        for loss, grad in results[1:]:
            assert torch.equal(loss, results[0][0])
            assert torch.equal(grad, results[0][1])


def test_a_packed_row_keeps_its_samples_apart(
    model_dirs: dict[str, Path], samples: Samples
) -> None:
    """Changing one sample's text changes no other sample's losses by a bit."""
    model = AnswerModel(load_model(str(model_dirs["gpt_neo"]))[0])
    whole = collate(samples, np.array([2, 5, 1]), packed=True)
    assert whole.lengths == [int(samples.lengths[i]) for i in (2, 5, 1)]
    alone = [model(collate(samples, np.array([i]), packed=True)).item() for i in (2, 5, 1)]
    assert model(whole).item() == pytest.approx(sum(alone), rel=1e-6)
    padded = model(collate(samples, np.array([2, 5, 1]))).item()
    assert model(whole).item() == pytest.approx(padded, rel=1e-6)
    changed = collate(samples, np.array([2, 5, 1]), packed=True)
    changed.input_ids[0, : whole.lengths[0]] = 7
    with torch.no_grad():
        a, b = (model.hidden_states(c.input_ids, c.lengths) for c in (whole, changed))
    assert torch.equal(a[0, whole.lengths[0] :], b[0, whole.lengths[0] :])
    assert not torch.equal(a[0, : whole.lengths[0]], b[0, : whole.lengths[0]])


def test_padding_equal_to_eos_still_learns_eos(tokenizer: Any, samples: Samples) -> None:
    batch = collate(samples, np.arange(8))
    assert batch.input_ids[0, -1] == tokenizer.eos_token_id == 0  # what pads is the EOS here
    assert int((batch.target_ids == tokenizer.eos_token_id).sum()) == 8


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_gpt_neo_attention_equals_transformers_eager(
    tokenizer: Any, dtype: torch.dtype, close: float
) -> None:
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(
        tiny_config("gpt_neo", 300), dtype=dtype, attn_implementation="eager"
    )
    ours = AutoModelForCausalLM.from_config(
        tiny_config("gpt_neo", 300), dtype=dtype, attn_implementation="eager"
    )
    ours.load_state_dict(theirs.state_dict())
    speed_up(ours)
    if dtype == torch.float64:
        in_full_precision(theirs)
    ids = torch.randint(1, 300, (3, 40))  # five times the local window
    right, left = torch.ones_like(ids), torch.ones_like(ids)
    right[1, 30:], left[1, :10], left[2, :33] = 0, 0, 0
    for mask in (None, right, left):
        kwargs = {} if mask is None else {"attention_mask": mask}
        if mask is left:
            kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        a, b = ours(ids, **kwargs), theirs(ids, **kwargs)
        seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        assert torch.allclose(a.logits[seen], b.logits[seen], rtol=close, atol=close)
        for model, output in ((ours, a), (theirs, b)):
            model.zero_grad()
            output.logits[seen].square().mean().backward()
        for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters()):
            scale = q.grad.abs().max().clamp(min=1e-30)
            assert ((p.grad - q.grad).abs().max() / scale) < 10 * close, name
    prompt = ids[:2, :20]
    new = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(prompt, **new), theirs.generate(prompt, **new))


@pytest.mark.parametrize("kind", KINDS)
def test_the_faster_modules_give_the_same_in_float32(kind: str, tokenizer: Any) -> None:
    """SwiGLU, RMSNorm and products, with weights and biases that are not at their start values."""
    config = tiny_config(kind, 300)
    config.mlp_bias = config.attention_bias = True  # Llama's, off by default
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.3)
    ours = AutoModelForCausalLM.from_config(config)
    ours.load_state_dict(theirs.state_dict())
    before = {type(module) for module in ours.modules()}
    speed_up(ours)
    changed = before - {type(module) for module in ours.modules()}
    names = {c.__name__ for c in changed}
    assert names >= {"llama": {"Linear", "LlamaMLP", "LlamaRMSNorm"}}.get(kind, {"Linear"})
    ids = torch.randint(1, 300, (3, 20))
    a, b = ours(ids).logits, theirs(ids).logits
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, a, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    for logits in (a, b):
        logits.log_softmax(-1)[..., 7].mean().backward()
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters()):
        assert (p.grad - q.grad).abs().max() <= 1e-4 * q.grad.abs().max().clamp(min=1e-6), name


def test_the_gradients_of_the_faster_functions_are_right() -> None:
    """Against finite differences, in float64."""
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, up, weight, bias = random(2, 3, 5), random(2, 3, 5), random(4, 5), random(4)
    for kind, second in ((None, None), (GELU, None), (SILU, up)):
        inputs = (x, weight, bias, kind, second)
        assert torch.autograd.gradcheck(linear, inputs)


def test_a_directory_without_weights_needs_from_scratch(tmp_path: Path, tokenizer: Any) -> None:
    tiny_config("gpt2", len(tokenizer)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="from_scratch: true"):
        load_model(str(tmp_path))
    model, remarks = load_model(str(tmp_path), from_scratch=True, seed=3)
    again, _ = load_model(str(tmp_path), from_scratch=True, seed=3)
    assert "random" in remarks[0]
    for p, q in zip(model.parameters(), again.parameters()):
        assert torch.equal(p, q)


def test_half_precision_weights_become_float32_masters(tmp_path: Path, tokenizer: Any) -> None:
    AutoModelForCausalLM.from_config(
        tiny_config("llama", 100), dtype=torch.bfloat16
    ).save_pretrained(tmp_path)
    model, remarks = load_model(str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert remarks == ["stored in bfloat16, loaded as float32"]


def test_biases_and_norms_are_not_decayed(model_dirs: dict[str, Path]) -> None:
    model, _ = load_model(str(model_dirs["gpt2"]))
    groups = make_optimizer(model, ModelParams(weight_decay=0.3)).param_groups
    names = {p: n for n, p in model.named_parameters()}
    by_decay = {g["weight_decay"]: {names[p] for p in g["params"]} for g in groups}
    assert set(by_decay) == {0.3, 0.0}
    assert all("ln_" in n or n.endswith("bias") for n in by_decay[0.0])
    assert not any("ln_" in n or n.endswith("bias") for n in by_decay[0.3])
    assert len(by_decay[0.0] | by_decay[0.3]) == len(list(model.parameters()))


def test_the_schedule_rises_then_falls_and_is_never_zero() -> None:
    rates = [learning_rate(s, 1.0, warmup=4, total=10) for s in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert learning_rate(10, 1.0, 4, 10) == 0
    assert learning_rate(0, 1.0, 0, 10) == 1.0


def test_warm_up_is_a_share_below_one_and_a_percentage_from_one() -> None:
    assert warmup_steps(0.1, 200) == 20
    assert warmup_steps(10, 200) == 20
    assert warmup_steps(1, 200) == 2
    assert warmup_steps(0, 200) == 0
    assert warmup_steps(100, 200) == 200


def test_the_architecture_tells_models_apart_and_not_places(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    prints = {kind: architecture(str(model_dirs[kind])) for kind in KINDS}
    assert len(set(prints.values())) == len(KINDS)
    shutil.copytree(model_dirs["llama"], tmp_path / "moved")
    assert architecture(str(tmp_path / "moved")) == prints["llama"]
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
    assert architecture(str(tmp_path / "moved")) != prints["llama"]


def test_weights_that_are_there_are_never_thrown_away(model_dirs: dict[str, Path]) -> None:
    plain, _ = load_model(str(model_dirs["gpt2"]))
    model, remarks = load_model(str(model_dirs["gpt2"]), from_scratch=True)
    assert remarks == []
    for p, q in zip(plain.parameters(), model.parameters()):
        assert torch.equal(p, q)
    with pytest.raises(UserError, match="set it to false"):
        load_model("some/hub-model", from_scratch=True)


def test_code_that_comes_with_a_model_is_never_run(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "custom"
    shutil.copytree(model_dirs["gpt2"], path)
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": "custom",
        "auto_map": {
            "AutoConfig": "custom.CustomConfig",
            "AutoModelForCausalLM": "custom.CustomModel",
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(path))
    assert not (tmp_path / "ran").exists()


def test_validation_takes_no_gradient_of_the_head(
    model_dirs: dict[str, Path], samples: Samples
) -> None:
    """Which would be two more products of its size; FLOPs are counted of float64 only."""
    model = AnswerModel(load_model(str(model_dirs["gpt2"]), dtype=torch.float64)[0])
    batch = collate(samples, np.arange(4))
    work = []
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient), FlopCounterMode(display=False) as counter:
            model(batch)
        work.append(counter.get_total_flops())
    head = 2 * len(batch.target_ids) * model.model.lm_head.weight.numel()
    assert work[1] - work[0] == 2 * head


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7)])
def test_a_frozen_linear_map_keeps_no_input_and_takes_any_shape(shape: tuple[int, ...]) -> None:
    kept: list[torch.Size] = []
    linear_map = torch.nn.Linear(7, 5)
    x = torch.randn(shape, requires_grad=True)
    expected = torch.autograd.grad(linear_map(x).square().sum(), x)[0]
    linear_map.requires_grad_(False).__class__ = FastLinear
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        output = linear_map(x)
    assert kept == [linear_map.weight.shape]
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), x)[0], expected)
