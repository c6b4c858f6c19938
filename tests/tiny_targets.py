"""Tiny targets of several families, built in code."""

import torch
from tiny import VOCAB
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)


_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts_per_tok": 2}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
FAMILIES = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama_tied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=16),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_SIZES, **_EXPERTS, head_dim=16, num_experts=8, moe_intermediate_size=24),
    "phi3": lambda: Phi3Config(**_SIZES),
    "gpt_oss": lambda: GptOssConfig(**_SIZES, **_EXPERTS, head_dim=16, num_local_experts=8, sliding_window=8),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**_SIZES, **_EXPERTS, **_LATENT, "num_key_value_heads": 4},
        n_routed_experts=8,
        moe_intermediate_size=24,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "lfm2": lambda: Lfm2Config(
        **_SIZES, layer_types=["conv", "full_attention", "conv", "conv", "conv", "full_attention", "conv"]
    ),
}
MIXTURES = ("qwen3_moe", "gpt_oss", "deepseek_v3")


def tiny_family(name: str, seed: int = 0) -> PreTrainedModel:
    """A random target of seven layers, hidden size 32 and, where it is a mixture, eight experts."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(FAMILIES[name]()).eval()
