"""Tiny random models of many types; a head's factor or soft cap is set to something that shows."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


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
# where a type wants others
OTHERS = {
    "minicpm3": {
        "head_dim": 16,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "dim_model_base": 10,
    }
}


def tiny_model_type(name: str, **changes) -> PreTrainedModel:
    """A random model of that type, of four layers and hidden size 32."""
    known = AutoConfig.for_model(name).to_dict()
    factors = {field: value for field, value in FACTORS.items() if field in known}
    config = AutoConfig.for_model(name, **{**SIZES, **OTHERS.get(name, {}), **factors, **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()
