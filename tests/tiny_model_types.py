"""Tiny random models of many types; a head's factor or soft cap is set to something that shows."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


MODEL_TYPES = """
    afmoe apertus arcee bitnet bloom cohere cohere2 cohere2_moe cwm diffllama doge ernie4_5 ernie4_5_moe exaone4
    flex_olmo gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_neox gpt_oss gptj granite granite_swa granitemoe
    granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jamba jetmoe laguna llama
    minimax minimax_m2 minicpm3 ministral3 mistral mixtral nanochat nemotron olmo olmo2 olmo3 opt persimmon phi phimoe
    qwen3_moe seed_oss smollm3 solar_open stablelm vaultgemma
""".split()
FACTORS = {"logits_scaling": 0.37, "logit_scale": 0.37, "final_logit_softcapping": 2.0}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# as GPT-2 and its kin call theirs
SIZES |= {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 48, "rotary_dim": 4, "ffn_dim": 48}
SIZES |= {"word_embed_proj_dim": 32}
SIZES |= {"moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4}
SIZES |= {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
# attention mixed with layers that carry a state from token to token
RECURRENT = """
    bamba falcon_h1 jamba kimi_linear lfm2 minimax nemotron_h qwen3_5_moe_text qwen3_5_text qwen3_next
""".split()
# attention that chooses its keys
SPARSE = ["deepseek_v32", "glm_moe_dsa"]

ALTERNATING = {"layer_types": ["linear_attention", "full_attention"] * 2}
GATED_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
GATED_DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_n_groups": 1}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
LATENT |= {"qk_nope_head_dim": 8, "v_head_dim": 8}
# with fewer heads keys tie at a score of zero, and which of them is chosen depends on how many there are
INDEXER = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 4}
# where a type wants others
OTHERS = {
    "minicpm3": {**LATENT, "head_dim": 16, "dim_model_base": 10},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "falcon_h1": MAMBA,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "kimi_linear": {**LATENT, **ALTERNATING, "linear_head_dim": 8, "linear_num_heads": 4, "num_shared_experts": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "minimax": {**ALTERNATING, "block_size": 8},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mamba", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 16,
    },
    "qwen3_5_moe_text": {**GATED_DELTA, **ALTERNATING},
    "qwen3_5_text": {**GATED_DELTA, **ALTERNATING},
    "qwen3_next": {**GATED_DELTA, **ALTERNATING},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 6,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 96,
    },
    "deepseek_v32": {**LATENT, **INDEXER, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "glm_moe_dsa": {**LATENT, **INDEXER, "mlp_layer_types": ["dense", *["sparse"] * 3], "n_shared_experts": 1},
}
OTHERS |= {name: LATENT for name in "axk1 axk2 deepseek_v2 deepseek_v3 glm4_moe_lite sarvam_mla youtu".split()}


def tiny_config(name: str, **changes) -> PreTrainedConfig:
    """Its config, with four layers and hidden size 32."""
    known = AutoConfig.for_model(name).to_dict()
    factors = {field: value for field, value in FACTORS.items() if field in known}
    return AutoConfig.for_model(name, **{**SIZES, **OTHERS.get(name, {}), **factors, **changes})


def tiny_model_type(name: str, **changes) -> PreTrainedModel:
    """A random model of that type, of four layers and hidden size 32."""
    config = tiny_config(name, **changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def exact_model_type(name: str, **changes) -> PreTrainedModel:
    """The same in float64, so that no model amplifies a rounding to something that shows."""
    model = tiny_model_type(name, **changes).double()
    model.set_experts_implementation("eager")  # the grouped product takes no float64
    return model
