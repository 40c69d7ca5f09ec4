"""A zoo of tiny random causal language models: nearly every family that transformers can build.

The table follows transformers' own causal mapping. Missing are the models of pictures and sounds
around a text model that is here (gemma3, qwen3_5, musicgen ...), blt, which needs a second model to
cut its bytes, and prophetnet and cpmant, whose tokens see later ones. `build` makes a model of some
ten thousand parameters from a row.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CONTEXT = 128  # positions of every model
WINDOW = 8  # of sliding windows, chunks and blocks: shorter than our texts
VOCAB = "vocab_size"  # as a value in the table: the size that the caller of `build` names


def row(**arguments: Any) -> dict[str, Any]:
    return arguments


def llama(**more: Any) -> dict[str, Any]:
    """The names most families share since Llama."""
    names = row(hidden_size=32, intermediate_size=64, num_hidden_layers=3, head_dim=8)
    names |= row(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT)
    return names | more


def windowed(*kinds: str, **more: Any) -> dict[str, Any]:
    """Sliding windows in some layers; `kinds` are the layers' types."""
    layers = list(kinds or ("sliding_attention", "full_attention", "sliding_attention"))
    return llama(layer_types=layers, num_hidden_layers=len(layers), sliding_window=WINDOW) | more


def experts(count: str, **more: Any) -> dict[str, Any]:
    """Two of four experts a token; families differ in the name of their number."""
    return {count: 4} | row(num_experts_per_tok=2, moe_intermediate_size=16) | more


def latent(**more: Any) -> dict[str, Any]:
    """DeepSeek's multi-head latent attention."""
    ranks = row(q_lora_rank=16, kv_lora_rank=16, num_key_value_heads=4)
    return llama(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8) | ranks | more


def grouped(**more: Any) -> dict[str, Any]:
    """DeepSeek's experts: routed in groups, one shared; the first layer has none."""
    groups = row(n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1)
    return experts("n_routed_experts") | groups | more


def gpt2(**more: Any) -> dict[str, Any]:
    dropouts = row(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return row(n_embd=32, n_layer=3, n_head=4, n_positions=CONTEXT) | dropouts | more


def bert(**more: Any) -> dict[str, Any]:
    """An encoder of the BERT kind with a causal mask."""
    names = row(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    dropouts = row(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return names | dropouts | row(max_position_embeddings=CONTEXT, is_decoder=True) | more


def roberta(**more: Any) -> dict[str, Any]:
    """Positions count from `pad_token_id` + 1, and a token of that id has no position."""
    return bert(pad_token_id=1, max_position_embeddings=CONTEXT + 2) | more


def decoder(**more: Any) -> dict[str, Any]:
    """The decoder of an encoder-decoder pair, alone.

    Its cache has as many layers as the encoder that is not there.
    """
    names = row(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64)
    names |= row(encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64)
    dropouts = row(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    tokens = row(pad_token_id=0, decoder_start_token_id=0, forced_eos_token_id=None)
    return names | dropouts | tokens | row(max_position_embeddings=CONTEXT, is_decoder=True) | more


def mamba(**more: Any) -> dict[str, Any]:
    """Mamba-2 layers inside a hybrid model."""
    names = row(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8)
    return llama(mamba_d_conv=4, mamba_expand=2, mamba_chunk_size=WINDOW) | names | more


def delta(*kinds: str, **more: Any) -> dict[str, Any]:
    """Gated delta rule layers inside a hybrid model."""
    layers = list(kinds or ("linear_attention", "full_attention", "linear_attention"))
    names = row(linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=4)
    heads = row(linear_num_key_heads=2, linear_num_value_heads=4)
    return llama(layer_types=layers, num_hidden_layers=len(layers)) | names | heads | more


def inkling(**more: Any) -> dict[str, Any]:
    """Convolutions beside the attention, and distances that the content chooses."""
    names = windowed("hybrid_sliding", "hybrid", sliding_window_size=WINDOW)
    names |= experts("n_routed_experts")
    own = row(swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8)
    return names | own | row(d_rel=4, rel_extent=16, unpadded_vocab_size=VOCAB) | more


def reformer(*kinds: str, **more: Any) -> dict[str, Any]:
    chunks = row(local_attn_chunk_length=WINDOW, lsh_attn_chunk_length=WINDOW, num_buckets=4)
    names = bert(attn_layers=list(kinds), attention_head_size=8, feed_forward_size=64, hash_seed=0)
    return names | chunks | row(local_attention_probs_dropout_prob=0.0) | more


def xlnet(**more: Any) -> dict[str, Any]:
    return row(d_model=32, n_layer=3, n_head=4, d_inner=64, dropout=0.0, pad_token_id=0) | more


# An index score is zero when no head likes a token: many heads, so that no two tokens tie there.
INDEX = row(index_topk=4, index_head_dim=16, index_n_heads=32)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
SPARSE = ["dense", "sparse", "sparse"]

ZOO: dict[str, dict[str, Any]] = {
    # Learned positions
    "gpt_neo": row(
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        max_position_embeddings=CONTEXT,
        window_size=WINDOW,
        attention_types=[[["global", "local"], 2]],
    ),
    "gpt2": gpt2(),
    "gpt2:untied": gpt2(tie_word_embeddings=False),
    "gpt-sw3": gpt2(),
    "gpt_bigcode": gpt2(multi_query=True),
    "gpt_bigcode:heads": gpt2(multi_query=False),
    "openai-gpt": gpt2(n_layer=2),
    "opt": llama(
        ffn_dim=64, word_embed_proj_dim=16, dropout=0.0, pad_token_id=1, do_layer_norm_before=True
    ),
    "biogpt": bert(scale_embedding=True, pad_token_id=1, activation_dropout=0.0),
    "xglm": row(
        d_model=32,
        ffn_dim=64,
        num_layers=3,
        attention_heads=4,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=1,
    ),
    "ctrl": gpt2(dff=64),
    # Rotary positions, older names
    "gptj": gpt2(rotary_dim=4),
    "codegen": gpt2(rotary_dim=4),
    "gpt_neox": llama(),
    "gpt_neox:sequential": llama(use_parallel_residual=False),
    "gpt_neox_japanese": llama(
        intermediate_multiple_size=2, hidden_dropout=0.0, attention_dropout=0.0
    ),
    "falcon": row(hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
    "falcon:alibi": row(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, alibi=True, multi_query=False
    ),
    "falcon:new": row(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
    ),
    # ALiBi
    "bloom": row(hidden_size=32, n_layer=3, n_head=4),
    "mpt": row(d_model=32, n_layers=3, n_heads=4, max_seq_len=CONTEXT, expansion_ratio=2),
    # Llama and its kin
    "llama": llama(),
    "llama:tied": llama(tie_word_embeddings=True),
    "mistral": llama(sliding_window=WINDOW),
    "ministral": windowed(),
    "ministral3": llama(pad_token_id=0),
    "gemma": llama(pad_token_id=0),
    "gemma2": windowed(query_pre_attn_scalar=8, attn_logit_softcapping=5.0),
    "gemma3_text": windowed(query_pre_attn_scalar=8),
    "gemma3n_text": windowed(
        *["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        num_kv_shared_layers=1,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        intermediate_size=[64] * 4,
    ),
    "gemma4_text": windowed(
        *["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
    ),
    "gemma4_text:moe": windowed(
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
        attention_k_eq_v=True,
    ),
    "gemma4_unified_text": windowed(use_bidirectional_attention=None),
    "vaultgemma": windowed(query_pre_attn_scalar=8),
    "phi": llama(),
    "phi3": llama(sliding_window=WINDOW, pad_token_id=0),
    "qwen2": llama(),
    "qwen2:window": windowed(use_sliding_window=True),
    "qwen3": llama(),
    "cohere": llama(use_qk_norm=True),
    "cohere2": windowed(),
    "cohere_compass_text": windowed(
        rope_parameters={"full_attention": MROPE, "sliding_attention": MROPE}
    ),
    "granite": llama(
        embedding_multiplier=2.0,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
    ),
    "granite_swa": windowed("full_attention", "sliding_attention", "sliding_attention"),
    "olmo": llama(pad_token_id=1),
    "olmo2": llama(pad_token_id=1),
    "olmo3": windowed(pad_token_id=1),
    "stablelm": llama(),
    "stablelm:parallel": llama(use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=True),
    "starcoder2": llama(sliding_window=WINDOW, residual_dropout=0.0, embedding_dropout=0.0),
    "smollm3": windowed(use_sliding_window=True, no_rope_layers=[1, 0, 1], pad_token_id=0),
    "exaone": llama(pad_token_id=0),
    "exaone4": windowed(),
    "glm": llama(pad_token_id=0),
    "glm4": llama(pad_token_id=0),
    "nemotron": llama(),
    "arcee": llama(),
    "apertus": llama(),
    "apertus1p5_text": llama(),
    "helium": llama(pad_token_id=0),
    "persimmon": llama(num_key_value_heads=4),
    "nanochat": llama(pad_token_id=1, num_key_value_heads=4),
    "bitnet": llama(),
    "seed_oss": llama(residual_dropout=0.0, attention_dropout=0.0),
    "hunyuan_v1_dense": llama(),
    "hyperclovax": llama(attention_multiplier=0.3, logits_scaling=2.0),
    "ernie4_5": llama(),
    "diffllama": llama(),
    "doge": llama(keep_window_size=WINDOW),
    "cwm": windowed(),
    "jais2": llama(),
    "internlm3": llama(pad_token_id=2),
    "iquestcoder": llama(),
    "hrm_text": llama(num_hidden_layers=1, H_cycles=2, L_cycles=2, prefix_lm=False),
    "dory": windowed(n_input_layers=1, n_output_layers=1),
    "modernbert-decoder": windowed(local_attention=2 * WINDOW, pad_token_id=0),
    "lfm3": windowed("conv", "full_attention", "sliding_attention", pad_token_id=0),
    # Latent attention without experts
    "minicpm3": latent(scale_emb=2),
    "youtu": latent(),
    # Experts
    "mixtral": llama(num_local_experts=4),
    "phimoe": llama(num_local_experts=4, router_jitter_noise=0.0),
    "llama4_text": llama(
        intermediate_size_mlp=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=4,
        interleave_moe_layer_step=2,
        no_rope_layers=[1, 1, 1, 0],
        attention_chunk_size=WINDOW,
        floor_scale=8,
    ),
    "qwen2_moe": llama(shared_expert_intermediate_size=16) | experts("num_experts"),
    "qwen3_moe": llama() | experts("num_experts"),
    "granitemoe": llama(num_local_experts=4, logits_scaling=2.0),
    "granitemoe_swa": windowed(num_local_experts=4, shared_intermediate_size=16),
    "granitemoeshared": llama(num_local_experts=4, shared_intermediate_size=16),
    "gpt_oss": windowed(num_local_experts=4, num_experts_per_tok=2),
    "olmoe": llama(pad_token_id=1) | experts("num_experts"),
    "flex_olmo": llama(pad_token_id=1) | experts("num_experts"),
    "dbrx": row(
        d_model=32,
        n_heads=4,
        n_layers=3,
        max_seq_len=CONTEXT,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "glm4_moe": llama() | grouped(),
    "dots1": windowed() | grouped(),
    "ernie4_5_moe": llama(
        moe_intermediate_size=16, moe_k=2, moe_num_experts=4, moe_num_shared_experts=1
    ),
    "hunyuan_v1_moe": llama(num_experts=4, moe_topk=2),
    "minimax_m2": llama(intermediate_size=16) | experts("num_local_experts"),
    "mimo_v2_flash": windowed(v_head_dim=8, mlp_layer_types=SPARSE) | grouped(),
    "afmoe": windowed(num_dense_layers=1, num_shared_experts=1) | experts("num_experts"),
    "aria_text": llama(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    "cohere2_moe": windowed(num_shared_experts=1) | experts("num_experts"),
    "exaone_moe": windowed(mlp_layer_types=SPARSE) | grouped() | experts("num_experts"),
    "jetmoe": llama(kv_channels=8, num_local_experts=4),
    "solar_open": llama() | grouped(),
    "laguna": windowed(
        num_attention_heads_per_layer=[4, 4, 4],
        mlp_layer_types=SPARSE,
        shared_expert_intermediate_size=16,
    )
    | experts("num_experts"),
    "mellum": windowed() | experts("num_local_experts"),
    "hy_v3": llama(mlp_layer_types=SPARSE) | experts("num_experts"),
    "zaya": windowed(
        *["hybrid", "hybrid_sliding"] * 2,
        router_hidden_size=16,
        num_experts=4,
        moe_intermediate_size=16,
    ),
    "sarvam_moe": llama() | grouped(),
    "flint": windowed(shared_expert_intermediate_size=16) | experts("num_experts"),
    "kolibri1": windowed(shared_expert_intermediate_size=16) | experts("num_local_experts"),
    "beam": windowed(mlp_layer_types=SPARSE) | grouped() | experts("num_experts"),
    # Experts and latent attention
    "deepseek_v2": latent() | grouped(topk_method="group_limited_greedy"),
    "deepseek_v3": latent() | grouped(),
    "deepseek_v32": latent(mlp_layer_types=SPARSE) | grouped() | INDEX,
    "deepseek_v4": llama(
        num_hidden_layers=4,
        num_key_value_heads=1,
        head_dim=16,
        q_lora_rank=16,
        o_lora_rank=16,
        o_groups=2,
        n_shared_experts=1,
        hc_mult=2,
        sliding_window=WINDOW,
        layer_types=[
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "sliding_attention",
        ],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
        partial_rotary_factor=0.5,
    )
    | experts("n_routed_experts")
    | INDEX,
    "glm4_moe_lite": latent(mlp_layer_types=SPARSE) | grouped(),
    "glm_moe_dsa": latent(mlp_layer_types=SPARSE) | grouped() | INDEX,
    "axk1": latent() | grouped(),
    "axk2": latent(mlp_layer_types=SPARSE, gated_norm_rank=8) | grouped() | INDEX,
    "hy_v4": latent(mlp_layer_types=SPARSE, hc_mult=2, pad_token_id=0) | grouped() | INDEX,
    "sarvam_mla": latent() | grouped(),
    "longcat_flash": latent(
        num_layers=2,
        num_hidden_layers=2,
        ffn_hidden_size=64,
        expert_ffn_hidden_size=16,
        moe_topk=2,
        n_routed_experts=4,
        zero_expert_num=2,
    ),
    "dots3_note_text": latent(
        layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
        sliding_window=WINDOW,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_q_lora_rank=16,
        swa_kv_lora_rank=16,
        swa_head_dim=16,
        swa_qk_nope_head_dim=8,
        swa_v_head_dim=8,
        head_dim=16,
        shared_experts_intermediate_size=16,
        pad_token_id=0,
    )
    | grouped()
    | INDEX,
    # Recurrent
    "mamba": row(hidden_size=32, state_size=8, num_hidden_layers=3, time_step_rank=4),
    "falcon_mamba": row(hidden_size=32, state_size=8, num_hidden_layers=3, time_step_rank=4),
    "mamba2": row(
        hidden_size=32,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=1,
        num_hidden_layers=3,
        chunk_size=WINDOW,
        pad_token_id=0,
    ),
    "rwkv": row(
        hidden_size=32, attention_hidden_size=32, num_hidden_layers=3, context_length=CONTEXT
    ),
    # Deep enough to divide its own weights, as all published ones are.
    "rwkv:deep": row(
        hidden_size=32, attention_hidden_size=32, num_hidden_layers=8, context_length=CONTEXT
    ),
    "xlstm": row(
        hidden_size=64, qk_dim_factor=1.0, num_hidden_layers=3, num_heads=4, chunk_size=WINDOW
    ),
    # Recurrent and attention layers
    "recurrent_gemma": llama(lru_width=32, attention_window_size=WINDOW),
    "jamba": mamba(
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_dt_rank=4,
        num_experts=4,
        use_mamba_kernels=False,
    ),
    "bamba": mamba(attn_layer_indices=[1]),
    "zamba": mamba(
        attention_hidden_size=64,
        attention_head_dim=16,
        num_key_value_heads=4,
        n_mamba_heads=2,
        mamba_dt_rank=4,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        num_hidden_layers=4,
        use_mamba_kernels=False,
    ),
    "zamba2": row(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        hybrid_layer_ids=[1, 3],
        mamba_d_state=8,
        n_mamba_heads=4,
        mamba_headdim=16,
        chunk_size=WINDOW,
        adapter_rank=8,
        time_step_min=1e-6,  # its steps with a cache forget this bound; so that it does not matter
        use_mamba_kernels=False,
    ),
    "falcon_h1": mamba(mamba_d_ssm=64, lm_head_multiplier=0.5, embedding_multiplier=2.0),
    "granitemoehybrid": mamba(
        num_local_experts=4,
        shared_intermediate_size=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "nemotron_h": llama(
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        chunk_size=WINDOW,
        moe_shared_expert_intermediate_size=16,
        use_mamba_kernels=False,
    )
    | experts("n_routed_experts"),
    "lfm2": llama(
        layer_types=["conv", "full_attention", "conv"], block_multiple_of=8, pad_token_id=0
    ),
    "lfm2_moe": llama(layer_types=["conv", "full_attention", "conv"], num_dense_layers=1)
    | experts("num_experts"),
    "minimax": llama(
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        block_size=WINDOW,
        num_local_experts=4,
    ),
    "qwen3_next": delta(shared_expert_intermediate_size=16) | experts("num_experts"),
    "qwen3_5_text": delta(),
    "qwen3_5_moe_text": delta(shared_expert_intermediate_size=16) | experts("num_experts"),
    "qwen4_exp_text": delta(
        shared_expert_intermediate_size=16,
        hc_count=2,
        hc_lowrank=8,
        ple_layer_ids=[1],
        ple_embed_dim=16,
        ngram_vocab_size_base=100,
        heads_per_ngram=2,
        split_ngram_parts=2,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=2,
    )
    | experts("num_experts"),
    "olmo_hybrid": delta(linear_num_key_heads=4, pad_token_id=0),
    "lara_mini": delta(
        "linear_attention",
        "sliding_attention",
        "full_attention",
        sliding_window=WINDOW,
        shared_expert_intermediate_size=16,
    )
    | experts("num_experts"),
    "kimi_linear": latent(
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mlp_layer_types=SPARSE,
        linear_head_dim=8,
        linear_num_heads=4,
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=16,
        pad_token_id=0,
    ),
    "bailing_hybrid": latent(
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mlp_layer_types=SPARSE,
        num_experts=4,
        num_experts_per_token=2,
        num_expert_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        pad_token_id=0,
    ),
    "inkling_text": inkling(mlp_layer_types=["dense", "sparse"]),
    "inkling2_text": inkling(n_layers_per_attn_res_block=1),
    "inkling2_loop_text": inkling(
        num_hidden_layers=4,
        layer_types=["hybrid", "hybrid_sliding"] * 2,
        n_layers_per_attn_res_block=1,
        loop_layer_index_start=1,
        loop_layer_index_end=3,
        loop_num_passes=2,
        loop_gate_rank=8,
    ),
    "minimax_m3_vl_text": llama(
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        mlp_layer_types=SPARSE,
        dense_intermediate_size=64,
        shared_intermediate_size=16,
        rotary_dim=4,
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=4,
        index_topk_blocks=2,
    )
    | experts("num_local_experts", intermediate_size=16),
    # Encoders as decoders
    "bert": bert(),
    "bert:bidirectional": bert(is_decoder=False),
    "bert-generation": bert(),
    "big_bird": bert(attention_type="original_full"),
    "camembert": roberta(),
    "data2vec-text": roberta(),
    "electra": bert(embedding_size=16),
    "ernie": bert(use_task_id=True),
    "megatron-bert": bert(),
    "rembert": bert(input_embedding_size=16, output_embedding_size=24),
    "roberta": roberta(),
    "roberta-prelayernorm": roberta(),
    "roc_bert": bert(pronunciation_embed_dim=8, shape_embed_dim=8),
    "roformer": bert(embedding_size=16, rotary_value=True),
    "xlm-roberta": roberta(),
    "xlm-roberta-xl": roberta(),
    "xmod": roberta(default_language="en_XX"),
    "reformer": reformer("local", "local", axial_pos_embds=False),
    "reformer:lsh": reformer("local", "lsh", axial_pos_embds=False),
    # Decoders of pairs
    "bart": decoder(),
    "bigbird_pegasus": decoder(attention_type="original_full"),
    "blenderbot": decoder(),
    "blenderbot-small": decoder(),
    "marian": decoder(decoder_vocab_size=VOCAB),
    "mbart": decoder(),
    "mvp": decoder(),
    "pegasus": decoder(),
    "plbart": decoder(),
    "trocr": decoder(),
    "whisper": decoder(max_target_positions=CONTEXT),
    # Of their own kind
    "xlnet": xlnet(attn_type="uni"),
    "xlnet:bidirectional": xlnet(),
    "xlm": row(
        emb_dim=32,
        n_layers=2,
        n_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
        causal=True,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
    ),
    "git": bert(
        vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    ),
    # Its cache forgets what leaves the window, its mask does not.
    "moshi": llama(ffn_dim=64, sliding_window=CONTEXT),
}


def available() -> list[str]:
    """The zoo's names that the installed transformers knows."""
    return [name for name in ZOO if name.split(":")[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def build(name: str, vocab_size: int, seed: int = 7, std: float = 0.4) -> PreTrainedModel:
    """A model of the zoo with random weights, the same ones for the same seed."""
    arguments = {"bos_token_id": 0, "eos_token_id": 0, VOCAB: VOCAB} | ZOO[name]
    arguments = {k: vocab_size if v == VOCAB else deepcopy(v) for k, v in arguments.items()}
    config = AutoConfig.for_model(name.split(":")[0], **arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomise(model, std)
    return model


@torch.no_grad()
def randomise(model: PreTrainedModel, std: float) -> None:
    """Random matrices that are large enough for each to be felt."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        constant = parameter.ndim < 2 or bool((parameter == parameter.flatten()[0]).all())
        last = name.rpartition(".")[2]
        if constant or any(word in last for word in ("bias", "A_log", "time_mix")):
            # Norms, biases, gates and decays: a little off their own beginning, whichever it is.
            parameter.add_(0.1 * noise)
        elif id(parameter) in tables:
            parameter.copy_(0.25 * std * noise)
        else:
            # What an activation has in common for every token grows from layer to layer until the
            # tokens drown in it; a centred matrix does not hand it on.
            for dim in (-1, -2):
                if parameter.shape[dim] > 8:
                    noise -= noise.mean(dim, keepdim=True)
            parameter.copy_(std * noise)
    for name, buffer in model.named_buffers():
        if name.endswith(("_bias", "_biases")):  # of routers
            buffer.add_(0.1 * torch.randn_like(buffer))
