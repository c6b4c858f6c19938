"""Names of multi-head latent attention, for whoever reads or writes configs; without torch, so `--help` is instant."""

from .config_fields import has_field


# as DeepSeek's own configs spell them
LATENT_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def has_latent_attention(config) -> bool:
    """Whether a (text) config is one of multi-head latent attention (DeepSeek, Kimi) with all sizes of it."""
    return all(has_field(config, name) for name in LATENT_SIZES)
