"""A tiny random target of every family, built from its config."""

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GlmConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)


SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
ROUTED = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 1.0,
}
DEEPSEEK = {**SMALL, **EXPERTS, **LATENT, **ROUTED}
GLOBAL, LOCAL = 1e6, 1e4
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": GLOBAL},
    "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL},
}
LONGROPE = {"rope_type": "longrope", "rope_theta": LOCAL, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
GEMMA = {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama4": lambda: Llama4TextConfig(
        **SMALL, head_dim=8, intermediate_size_mlp=56, num_local_experts=4, attention_chunk_size=6
    ),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=4),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4),
    "qwen2": lambda: Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=3),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=16, num_experts=4),
    "phi3": lambda: Phi3Config(**SMALL, original_max_position_embeddings=48, rope_parameters=dict(LONGROPE)),
    "gpt-oss": lambda: GptOssConfig(**SMALL, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    "gemma2": lambda: Gemma2Config(**SMALL, **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": lambda: Gemma3TextConfig(**SMALL, **GEMMA, rope_parameters=GEMMA3_ROPE),
    "glm": lambda: GlmConfig(**SMALL, head_dim=16),
    "glm4": lambda: Glm4Config(**SMALL, head_dim=16),
    "glm4-moe": lambda: Glm4MoeConfig(**SMALL, **EXPERTS, **ROUTED, head_dim=16),
    "glm4-moe-lite": lambda: Glm4MoeLiteConfig(**DEEPSEEK),
    "deepseek-v2": lambda: DeepseekV2Config(**DEEPSEEK),
    "deepseek-v3": lambda: DeepseekV3Config(**DEEPSEEK),  # and Kimi
}


def tiny_family(name: str, **kwargs):
    """The model, random."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), **kwargs).eval()
