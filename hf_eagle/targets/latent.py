"""Names of multi-head latent attention, for whoever reads or writes configs; without torch, so `--help` is instant."""

# as DeepSeek's own configs spell them
LATENT_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def has_latent_attention(config) -> bool:
    """Whether a (text) config is one of multi-head latent attention (DeepSeek, Kimi) with all sizes of it."""
    return all(hasattr(config, name) for name in LATENT_SIZES)


def sglang_counts_entries(config) -> bool:
    """Whether SGLang takes tap ids beside a target of this (text) config as ENTRY ids, and not as OUTPUT ids.

    Its DeepSeek, Kimi and GLM-4-lite classes do; LongCat has latent attention as well, and adds 1 as all others.
    """
    return has_latent_attention(config) and config.model_type != "longcat_flash"
