"""Tiny random targets of families with recurrent layers, sizes per layer or sparse attention, eight layers each."""

import torch
from tiny_families import DEEPSEEK, EXPERTS, SMALL
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig


LAYERS = SMALL["num_hidden_layers"]
GATED_DELTA = {
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SHARED_EXPERT = {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
# other widths than those of full attention, as in the published ones
GEMMA4 = {"head_dim": 8, "global_head_dim": 16, "sliding_window": 4, "attention_k_eq_v": True}
GEMMA4 |= {"num_global_key_value_heads": 1, "final_logit_softcapping": 3.0}
SPARSE = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 4}

FIELDS = {
    "qwen3_5_text": GATED_DELTA,
    "qwen3_5_moe_text": {**GATED_DELTA, **SHARED_EXPERT, "intermediate_size": None},
    "qwen3_next": {**GATED_DELTA, **SHARED_EXPERT},
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 4, "head_dim": 8},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 3, "intermediate_size": 16, "head_dim": 8},
    # every fourth layer attends, as in the published one, which has no compressed queries
    "kimi_linear": {
        **{**DEEPSEEK, "q_lora_rank": None, "head_dim": 8},
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "jamba": {"num_experts": 4, "attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "bamba": {**MAMBA, "attn_layer_indices": [2, 6]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "head_dim": 8},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "mamba", "attention", "moe", "mamba", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "head_dim": 8,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 16,
        **EXPERTS,
    },
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2, "block_multiple_of": 8},
    "lfm2_moe": {
        "layer_types": ["conv", "conv", "full_attention", "conv"] * 2,
        "num_experts": 4,
        "num_dense_layers": 2,
        **EXPERTS,
    },
    "gemma4_text": {
        **GEMMA4,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
    },
    "deepseek_v32": {**DEEPSEEK, **SPARSE},
    "glm_moe_dsa": {**DEEPSEEK, **SPARSE},
}


def new_family_config(model_type: str, **changes) -> PreTrainedConfig:
    """Its config, for a model of about 100,000 parameters."""
    fields = {**SMALL, **FIELDS[model_type], **changes}
    return AutoConfig.for_model(model_type, **{name: x for name, x in fields.items() if x is not None})


def tiny_new_family(model_type: str, **changes):
    """The model, random."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(new_family_config(model_type, **changes)).eval()
