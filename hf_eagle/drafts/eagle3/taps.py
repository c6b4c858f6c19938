"""Taps of an EAGLE-3 draft: how the servers count them for a target, and which server takes them."""

from ...targets.architectures import family_of
from ...targets.latent import has_latent_attention


# SGLang's class has latent attention, but does not derive from its DeepSeek class
_LATENT_BUT_COUNTS_OUTPUTS = ("longcat_flash", "glm5_next")


def sglang_counts_entries(config) -> bool:
    """Whether SGLang takes this target's tap ids as ENTRY ids, see [`Family`].

    An unknown model with latent attention is taken for a descendant of DeepSeek's, as most are.
    """
    family, text = family_of(config), config.get_text_config()
    if family is not None:
        return family.sglang_counts_entries

    return has_latent_attention(text) and not text.model_type.startswith(_LATENT_BUT_COUNTS_OUTPUTS)


def describe_taps(config, tap_ids: list[int]) -> str:
    """Which layers of which family are tapped, and which server does not take them, for the log."""
    text, family = config.get_text_config(), family_of(config)
    found = "layers found by discovery" if family is None else family.name
    said = f"Taps: entry ids {', '.join(map(str, tap_ids))} of {text.num_hidden_layers} layers ({found})."

    if family is None:
        return f"{said} This family is not tested: check that your server takes taps from a {text.model_type} model."
    if "vllm" not in family.servers and family.recurrent:
        said += " vLLM 0.32 takes none from this family."
    elif "vllm" not in family.servers:
        said += " vLLM 0.32 takes them from this family only with `--model-impl transformers`."
    if "sglang" not in family.servers:
        said += " SGLang 0.5.23 takes none from this family."
    return said
