"""Names of multi-head latent attention, for reading and writing configs. Loads no torch, so `--help` is instant."""

from .config_fields import has_field


# as DeepSeek's own configs spell them
LATENT_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def has_latent_attention(config) -> bool:
    """Return whether a (text) config has multi-head latent attention (DeepSeek, Kimi), with all of its sizes."""
    return all(has_field(config, name) for name in LATENT_SIZES)
