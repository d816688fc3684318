"""Small configurations of the architectures that the matrix of `benchmarks/architectures.py` goes through.

Two blocks, 64 wide, a vocabulary of 128: what mlx-lm's class of each architecture needs to be built, and no more. The
widths differ where the architecture has different ones, so that a matrix that is taken for another one does not fit.
"""

from typing import Any

VOCAB_SIZE = 128

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "rope_theta": 10_000.0,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 0,
}

_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

_LATENT: dict[str, Any] = {  # DeepSeek's latent attention, the first block dense
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
}

_GRANITE: dict[str, Any] = {
    "logits_scaling": 4.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.5,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
}

#: What each dense architecture needs beside the common shape.
DENSE: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"tie_word_embeddings": False, "original_max_position_embeddings": 64},
    "starcoder2": {"tie_word_embeddings": True},
    "olmo2": {"tie_word_embeddings": False},
    "granite": _GRANITE,
    "cohere": {},
    "cohere2": {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    "gpt_neox": {"layer_norm_eps": 1e-5, "rotary_emb_base": 10_000, "rotary_pct": 0.5, "num_key_value_heads": 4},
    "gpt2": {
        "n_ctx": 64, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64, "layer_norm_epsilon": 1e-5,
        "num_key_value_heads": 4,
    },
    "internlm2": {"bias": False, "tie_word_embeddings": False},
    "minicpm": {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 12.0, "tie_word_embeddings": False},
}  # fmt: skip

#: What each mixture of experts needs beside the common shape.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64, "tie_word_embeddings": False},
    "qwen3_moe": {
        **_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [], "head_dim": 16, "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"], "intermediate_size": 64,
    },
    "deepseek_v2": {**_LATENT, "rope_scaling": {"type": "yarn", "factor": 2, "mscale_all_dim": 1}},
    "deepseek_v3": _LATENT,
    "olmoe": {**_EXPERTS, "tie_word_embeddings": False},
    "granitemoe": {**_GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
        "mamba_d_conv": 4, "mamba_d_state": 8, "mamba_expand": 2, "num_experts": 4, "num_experts_per_tok": 2,
    },
    "qwen3_next": {
        **_EXPERTS, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 64, "mlp_only_layers": [], "partial_rotary_factor": 0.5, "head_dim": 16,
        "full_attention_interval": 2,
    },
}  # fmt: skip


def config_of(architecture: str) -> dict[str, Any]:
    """Return the `config.json` of a small model of an architecture, in Hugging Face's keys."""
    return {"model_type": architecture, **_COMMON, **{**DENSE, **MIXTURES}[architecture]}
