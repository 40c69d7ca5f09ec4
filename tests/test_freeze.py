"""Freezing: kinds of parameters on several architectures, and what training then leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import freeze
from config import ModelParams, UserError
from conftest import KINDS, newest, train, train_config, weights_of
from model import load_model

# For each architecture: a parameter name and the kind it must have.
EXPECTED = {
    "gpt_neo": {
        "transformer.wte.weight": "emb",
        "transformer.wpe.weight": "emb",
        "transformer.h.0.ln_1.weight": "ln",
        "transformer.ln_f.bias": "ln",
        "transformer.h.1.attn.attention.q_proj.weight": "attn",
        "transformer.h.1.attn.attention.out_proj.bias": "attn",
        "transformer.h.2.mlp.c_fc.weight": "ff",
    },
    "gpt2": {
        "transformer.wte.weight": "emb",
        "transformer.h.0.attn.c_attn.weight": "attn",
        "transformer.h.0.mlp.c_proj.bias": "ff",
        "transformer.ln_f.weight": "ln",
    },
    "llama": {
        "model.embed_tokens.weight": "emb",
        "model.layers.0.self_attn.o_proj.weight": "attn",
        "model.layers.0.mlp.gate_proj.weight": "ff",
        "model.layers.0.input_layernorm.weight": "ln",
        "model.norm.weight": "ln",
        "lm_head.weight": "other",
    },
    "qwen2": {
        "model.embed_tokens.weight": "emb",
        "model.layers.1.self_attn.q_proj.bias": "attn",
        "model.layers.1.post_attention_layernorm.weight": "ln",
        "model.layers.1.mlp.down_proj.weight": "ff",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_the_expected_kind(kind: str, model_dirs: dict[str, Path]) -> None:
    model, _ = load_model(str(model_dirs[kind]))
    kinds = {name: k for name, k, _ in freeze.classify(model)}
    assert EXPECTED[kind].items() <= kinds.items()
    # Each parameter once: a tied head (qwen2, gpt2, gpt_neo) is its embedding.
    assert len(kinds) == len(list(model.parameters()))
    assert ("lm_head.weight" in kinds) == (kind == "llama")


def test_feed_forward_maps_that_lie_in_the_block_itself(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, OPTConfig

    config = OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2
    )
    kinds = {n: k for n, k, _ in freeze.classify(AutoModelForCausalLM.from_config(config))}
    assert kinds["model.decoder.layers.0.fc1.weight"] == "ff"
    assert kinds["model.decoder.layers.0.self_attn_layer_norm.weight"] == "ln"
    assert kinds["model.decoder.embed_positions.weight"] == "emb"


@pytest.mark.parametrize("flag", ["emb", "ln", "attn", "ff", "other"])
def test_each_flag_freezes_its_kind_and_nothing_else(
    flag: str, model_dirs: dict[str, Path]
) -> None:
    model, _ = load_model(str(model_dirs["llama"]))
    freeze.apply(model, ModelParams(do_freeze=True, **{f"freeze_{flag}": True}))
    for name, kind, parameter in freeze.classify(model):
        assert parameter.requires_grad == (kind != flag), name


def test_without_do_freeze_the_flags_do_nothing(model_dirs: dict[str, Path]) -> None:
    model, _ = load_model(str(model_dirs["gpt_neo"]))
    freeze.apply(model, ModelParams(do_freeze=False, freeze_ff=True))
    assert all(p.requires_grad for p in model.parameters())


def test_layers_not_to_freeze_stay_open_and_negative_indices_count_from_the_top(
    model_dirs: dict[str, Path],
) -> None:
    model, _ = load_model(str(model_dirs["gpt_neo"]))
    flags = dict.fromkeys(["freeze_emb", "freeze_ln", "freeze_attn", "freeze_ff"], True)
    freeze.apply(model, ModelParams(do_freeze=True, layers_not_to_freeze=[1, -1], **flags))
    trained = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"1", "3"}
    with pytest.raises(UserError, match="layers_not_to_freeze: found 4; allowed: -4 to 3"):
        freeze.apply(model, ModelParams(do_freeze=True, layers_not_to_freeze=[4], **flags))


def test_freezing_everything_is_an_error(model_dirs: dict[str, Path]) -> None:
    model, _ = load_model(str(model_dirs["gpt2"]))
    flags = {f"freeze_{kind}": True for kind in freeze.KINDS}
    with pytest.raises(UserError, match="nothing to train"):
        freeze.apply(model, ModelParams(do_freeze=True, **flags))


@pytest.mark.parametrize("kind", ["gpt_neo", "qwen2"])
def test_frozen_weights_stay_bitwise_and_have_no_optimizer_state(
    kind: str, model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    config = train_config(
        model_dirs[kind],
        data_file,
        tmp_path / "run",
        model_params__do_freeze=True,
        model_params__freeze_emb=True,
        model_params__freeze_attn=True,
    )
    assert train(config) == 0
    model, _ = load_model(str(model_dirs[kind]))
    kinds = {name: k for name, k, _ in freeze.classify(model)}
    before, after = weights_of(model_dirs[kind]), weights_of(newest(tmp_path / "run"))
    for name, parameter_kind in kinds.items():
        same = torch.equal(before[name], after[name])
        assert same == (parameter_kind in ("emb", "attn")), name
    state = torch.load(newest(tmp_path / "run") / "trainer_state.pt", weights_only=True)
    trained = sum(k not in ("emb", "attn") for k in kinds.values())
    assert len(state["optimizer"]["state"]) == trained
