"""Freezing: kinds of parameters on several architectures, and what training then leaves alone."""

from __future__ import annotations

import functools
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import freeze
import zoo
from config import ModelParams, UserError
from conftest import KINDS, Runner, newest, weights_of
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


# For each family of the zoo: kind -> patterns of parameter names that must all have it.
FAMILIES = {
    "opt": {
        "emb": "*.embed_tokens.* *.embed_positions.*",
        "ln": "*.self_attn_layer_norm.* *.final_layer_norm.*",
        "attn": "*.self_attn.*",
        "ff": "*.fc1.* *.fc2.*",
    },
    "bart": {"attn": "*.self_attn.* *.encoder_attn.*", "ff": "*.fc1.* *.fc2.*"},
    "openai-gpt": {"emb": "*_embed.weight", "ln": "*.ln_?.*", "attn": "*.attn.*", "ff": "*.mlp.*"},
    "gptj": {"ln": "*.ln_1.*", "attn": "*.attn.*", "ff": "*.mlp.*", "other": "lm_head.*"},
    "ctrl": {"emb": "transformer.w.*", "attn": "*.multi_head_attention.*", "ff": "*.ffn.?.*"},
    "bloom": {
        "ln": "*.word_embeddings_layernorm.* *.post_attention_layernorm.*",
        "attn": "*.self_attention.*",
        "ff": "*.mlp.*",
    },
    "mpt": {"ln": "*.norm_1.*", "attn": "*.attn.*", "ff": "*.ffn.*"},
    "bert": {
        "ln": "*.LayerNorm.*",
        "attn": "*.attention.self.* *.attention.output.dense.*",
        "ff": "*.intermediate.dense.* *.layer.?.output.dense.*",
        "other": "cls.predictions.transform.dense.*",
    },
    "roberta-prelayernorm": {  # "norm" is in the name of every class
        "ln": "*LayerNorm.* *.layer_norm.*",
        "attn": "*.attention.self.* *.attention.output.dense.*",
        "ff": "*.intermediate.dense.* *.layer.?.output.dense.*",
        "other": "lm_head.dense.* lm_head.bias",
    },
    "xlm": {  # stacks of attentions and of feed-forward maps, but no blocks
        "ln": "*.layer_norm?.*",
        "attn": "transformer.attentions.*",
        "ff": "transformer.ffns.*",
    },
    "xlnet": {"attn": "*.rel_attn.[qkvor] *.rel_attn.r_w_bias *.seg_embed", "ff": "*.ff.layer_?.*"},
    "reformer": {
        "emb": "*.position_embeddings.*",
        "ln": "*.layer_norm.*",
        "attn": "*.attention.self_attention.* *.attention.output.*",
        "ff": "*.feed_forward.dense.* *.feed_forward.output.*",
    },
    "cpmant": {
        "emb": "*.relative_attention_bias",
        "ln": "*.layernorm_before_*",
        "attn": "*.self_attention.*",
        "ff": "*.ffn.ffn.*",
    },
    "gemma3n_text": {
        "emb": "*.embed_tokens_per_layer.*",
        "ln": "*.altup.router_norm.* *.q_norm.*",
        "attn": "*.self_attn.?_proj.*",
        "ff": "*.mlp.*",
        "other": "*.altup.modality_router.* *.laurel.linear_* *.layers.?.per_layer_*",
    },
    "gemma4_text:moe": {"ff": "*.mlp.* *.router.* *.experts.*"},
    "apertus": {"ff": "*.mlp.act_fn.alpha_p"},
    "hrm_text": {  # two stacks
        "attn": "model.?_module.layers.?.self_attn.*",
        "ff": "model.?_module.layers.?.mlp.*",
    },
    "dbrx": {
        "ln": "*.norm_attn_norm.norm_?.*",
        "attn": "*.norm_attn_norm.attn.*",
        "ff": "*.ffn.router.* *.ffn.experts.*",
    },
    "jetmoe": {"attn": "*.self_attention.experts.*", "ff": "*.mlp.*"},  # experts of attention
    "gpt_oss": {"attn": "*.sinks", "ff": "*.mlp.router.* *.mlp.experts.*"},
    "qwen2_moe": {"attn": "*.self_attn.*", "ff": "*.mlp.gate.* *.shared_expert_gate.* *.experts.*"},
    "deepseek_v3": {
        "ln": "*.q_a_layernorm.* *.kv_a_layernorm.*",
        "attn": "*.q_a_proj.* *.kv_a_proj_with_mqa.* *.kv_b_proj.*",
        "ff": "*.mlp.gate.* *.shared_experts.* *.mlp.experts.*",
    },
    "deepseek_v32": {"ln": "*.indexer.k_norm.*", "attn": "*.indexer.w*"},
    "deepseek_v4": {
        "attn": "*.sinks *.compressor.position_bias *.indexer.q_b_proj.*",
        "ff": "*.mlp.*",
        "other": "*.attn_hc.* *.ffn_hc.*",
    },
    "longcat_flash": {  # lists inside a block
        "ln": "*.input_layernorm.?.*",
        "attn": "*.self_attn.?.q_b_proj.*",
        "ff": "*.mlps.?.* *.mlp.experts.* *.mlp.router.*",
    },
    "axk2": {"ln": "*_layernorm.norm.*", "ff": "*_layernorm.mlp.* *.mlp.experts.*"},
    "mamba": {"ln": "*.norm.*", "attn": "*.mixer.*"},
    "mamba2": {"ln": "*.mixer.norm.*", "attn": "*.A_log *.D *.dt_bias *.conv1d.* *.??_proj.*"},
    "rwkv": {
        "ln": "*.ln1.* *.pre_ln.*",
        "attn": "*.attention.*",
        "ff": "*.feed_forward.*",
        "other": "head.*",
    },
    "xlstm": {
        "ln": "*.multihead_norm.*",
        "attn": "*.mlstm_layer.[qkv].* *gate*act.*",
        "ff": "*.ffn.*",
    },
    "recurrent_gemma": {"attn": "*.temporal_block.*", "ff": "*.mlp_block.*"},
    "jamba": {
        "ln": "*.dt_layernorm.*",
        "attn": "*.mamba.A_log *.mamba.conv1d.* *.self_attn.*",
        "ff": "*.feed_forward.*",
    },
    "bamba": {"ln": "*.mamba.norm.*", "attn": "*.mamba.D *.self_attn.*", "ff": "*.feed_forward.*"},
    "zamba": {
        "attn": "*.mamba.* *.shared_transf.self_attn.*",
        "ff": "*.shared_transf.feed_forward.*",
        "other": "*.layers.?.linear.*",
    },
    "zamba2": {
        "ln": "*.mamba.norm.* *.shared_transformer.pre_ff_layernorm.*",
        "attn": "*.mamba_decoder.mamba.A_log *.shared_transformer.self_attn.*",
        "ff": "*.shared_transformer.feed_forward.*",
    },
    "falcon_h1": {"attn": "*.mamba.A_log *.self_attn.*", "ff": "*.feed_forward.*"},
    "granitemoehybrid": {  # "Moe" is in the name of every class
        "ln": "*.mamba.norm.*",
        "attn": "*.mamba.A_log *.mamba.D *.mamba.conv1d.* *.self_attn.*",
        "ff": "*.block_sparse_moe.* *.shared_mlp.*",
    },
    "nemotron_h": {  # one mixer a block: Mamba, experts, attention, feed-forward
        "ln": "*.mixer.norm.*",
        "attn": "*.layers.0.mixer.?_* *.layers.0.mixer.conv1d.* *.layers.2.mixer.*",
        "ff": "*.layers.1.mixer.* *.layers.3.mixer.*",
    },
    "lfm2": {
        "ln": "*.operator_norm.*",
        "attn": "*.conv.* *.self_attn.??*proj.*",
        "ff": "*.feed_f*",
    },
    "minimax": {
        "ln": "*.self_attn.norm.*",
        "attn": "*.output_gate.* *.qkv_proj.*",
        "ff": "*.mlp.*",
    },
    "qwen3_next": {
        "ln": "*.linear_attn.norm.* *.q_norm.*",
        "attn": "*.linear_attn.A_log *.dt_bias *.linear_attn.conv1d.* *.self_attn.?_proj.*",
        "ff": "*.mlp.gate.* *.mlp.shared_expert_gate.*",
    },
    "kimi_linear": {
        "ln": "*.o_norm.*",
        "attn": "*.forget_gate.* *.self_attn.conv1d.* *.kv_b_proj.*",
        "ff": "*.mlp.*",
    },
    "qwen4_exp_text": {
        "emb": "*.ple_embedding.*",
        "ln": "*.hc_norm.* *.ple.norm_*",
        "other": "*_hyper_connection.*_weight*.weight *.ple.conv1d.*",
    },
    "inkling_text": {
        "attn": "*.attn_sconv.* *.rel_logits_proj.*",
        "ff": "*.mlp_sconv.* *.mlp.gate.*",
    },
}

# Parameters of blocks that are `other`, and all of them: what belongs to neither half of a block.
BETWEEN = "|".join(
    [
        r"\.(input|post_attention)_residual$",  # doge: scales of the residual stream
        r"\.lambda_[12]$",  # dory: the same
        r"_residual_scale\.",  # zaya: the same
        r"_hc\.|_hyper_connection\.",  # hyper-connections: several residual streams, mixed
        r"\.(attention|mlp)_input\.",  # inkling2: attention over the outputs of earlier blocks
        r"_message_gate\.",  # inkling2_loop: what one round passes to the next
        r"\.(altup|laurel)\.|\.altup_(unembed_)?projections\.",  # gemma3n: residual streams
        r"\.per_layer_(input_gate|projection)\.|\.ple\.",  # embeddings that each block adds
        r"layers\.\d+\.linear\.",  # zamba: the way back from its shared transformer
        r"\.visual_projection\.",  # git: no block, but a Sequential
    ]
)


@functools.cache
def of_zoo(family: str) -> PreTrainedModel:
    return zoo.build(family, 50)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in zoo.available()])
def test_every_family_of_architectures_has_the_expected_kinds(family: str) -> None:
    kinds = {name: kind for name, kind, _ in freeze.classify(of_zoo(family))}
    for kind, patterns in FAMILIES[family].items():
        for pattern in patterns.split():
            found = {name: k for name, k in kinds.items() if fnmatch(name, pattern)}
            if kind != "ln":  # a pattern for a whole module spans the norms in it
                found = {name: k for name, k in found.items() if k != "ln"}
            assert found and set(found.values()) == {kind}, (pattern, found)


@pytest.mark.parametrize("family", zoo.available())
def test_no_architecture_has_a_parameter_without_its_kind(family: str) -> None:
    model = of_zoo(family)
    classified = list(freeze.classify(model))
    kinds = {name: kind for name, kind, _ in classified}
    assert sorted(id(p) for *_, p in classified) == sorted(id(p) for p in model.parameters())
    # The head that is tied to them may be registered first.
    assert [k for _, k, p in classified if p is model.get_input_embeddings().weight] == ["emb"]
    for name, kind in kinds.items():
        if re.search(r"\.\d+\.", name) and kind == "other":
            assert re.search(BETWEEN, name), name
    without = set()
    if family in ("mamba", "mamba2", "falcon_mamba"):  # their blocks are a mixer and no more
        without = {"ff"}
    assert {"emb", "attn", "ff"} - set(kinds.values()) == without


@pytest.mark.parametrize("family", zoo.available())
def test_what_computes_a_norm_is_one_of_the_norms(family: str) -> None:
    model = of_zoo(family)
    kinds = {name: kind for name, kind, _ in freeze.classify(model)}
    for name, module in model.named_modules():
        own = {n: p for n, p in module.named_parameters() if f"{name}.{n}" in kinds}
        if own and all(p.ndim == 1 for p in own.values()) and ignores_scale(module):
            assert {kinds[f"{name}.{n}"] for n in own} == {"ln"}, name


def ignores_scale(module: nn.Module) -> bool:
    """Whether the module gives the same for an input and for a multiple of it: it is a norm."""
    x = torch.randn(
        2, 3, next(module.parameters()).numel(), generator=torch.Generator().manual_seed(0)
    )
    try:
        with torch.no_grad():
            once, tenfold = module(10 * x), module(100 * x)
        return torch.allclose(once, tenfold, atol=1e-4)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False  # takes something else


@pytest.mark.parametrize("kind", KINDS)
def test_faster_modules_keep_the_kinds(kind: str, model_dirs: dict[str, Path]) -> None:
    from extras.speed import speed_up

    model, _ = load_model(str(model_dirs[kind]))
    before = [(name, kind) for name, kind, _ in freeze.classify(model)]
    speed_up(model)
    assert [(name, kind) for name, kind, _ in freeze.classify(model)] == before


def test_blocks_of_several_stacks_count_one_after_the_other() -> None:
    model = of_zoo("hrm_text")
    low, high = model.model.L_module.layers, model.model.H_module.layers
    assert freeze.blocks(model) == [*low, *high]
    xlm = of_zoo("xlm").transformer
    assert freeze.blocks(of_zoo("xlm")) == [*xlm.attentions, *xlm.ffns]
    # The blocks of an encoder of images are none of the language model's.
    assert freeze.blocks(of_zoo("git")) == list(of_zoo("git").git.encoder.layer)


def test_names_of_classes_and_of_attributes_decide_by_their_last_telling_word() -> None:
    def made(name: str, **parts: nn.Module | nn.Parameter) -> nn.Module:
        module = type(name, (nn.Module,), {})()
        for attribute, part in parts.items():
            setattr(module, attribute, part)
        return module

    def weight() -> nn.Parameter:
        return nn.Parameter(torch.ones(2))

    block = made(
        "ToyMoeBlock",
        scale=weight(),
        linear=nn.Linear(2, 2, bias=False),
        inner=made(
            "ToyMoeAttentionDecoderLayer",
            a=made("ToyMoeSelfAttention", experts=made("ToyExperts", w=weight()), sinks=weight()),
            b=made("ToyHMLP", w=weight(), gain=made("ToyRMSNormGated", w=weight())),
        ),
        post_attention_norm=made("ToyGain", w=weight()),
        post_attention_residual=made("ToyScale", w=weight()),
        mixer=made("ToyOperator", w=weight()),
    )
    positions = made("AxialPositionEmbeddings", tables=nn.ParameterList([weight()]))
    model = made("ToyForCausalLM", positions=positions, layers=nn.ModuleList([block]))
    assert {name: kind for name, kind, _ in freeze.classify(model)} == {
        "positions.tables.0": "emb",
        "layers.0.scale": "other",
        "layers.0.linear.weight": "other",
        "layers.0.inner.a.experts.w": "attn",
        "layers.0.inner.a.sinks": "attn",
        "layers.0.inner.b.w": "ff",
        "layers.0.inner.b.gain.w": "ln",
        "layers.0.post_attention_norm.w": "ln",
        "layers.0.post_attention_residual.w": "other",
        "layers.0.mixer.w": "attn",
    }


def test_a_model_without_blocks_has_none_to_leave_open_but_has_kinds() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    assert [kind for _, kind, _ in freeze.classify(model)] == ["emb", "ln", "ln", "other", "other"]
    with pytest.raises(UserError, match="no stack of blocks found"):
        freeze.blocks(model)


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
    kind: str, run: Runner, model_dirs: dict[str, Path]
) -> None:
    directory = run(
        model=kind,
        model_params__do_freeze=True,
        model_params__freeze_emb=True,
        model_params__freeze_attn=True,
    )
    last = newest(directory)
    model, _ = load_model(str(model_dirs[kind]))
    kinds = {name: k for name, k, _ in freeze.classify(model)}
    before, after = weights_of(model_dirs[kind]), weights_of(last)
    for name, parameter_kind in kinds.items():
        same = torch.equal(before[name], after[name])
        assert same == (parameter_kind in ("emb", "attn")), name
    state = torch.load(last / "trainer_state.pt", weights_only=True)
    trained = sum(k not in ("emb", "attn") for k in kinds.values())
    assert len(state["optimizer"]["state"]) == trained
