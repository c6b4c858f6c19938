"""What the config.json of a target says without saying it."""


# fields of a config that the output of the embedding table is multiplied by
_EMBEDDING_FACTORS = ("embedding_multiplier", "scale_emb", "embed_scale", "emb_scale")


def scales_embeddings(config) -> bool:
    """Whether a target multiplies the rows of its embedding table before its first layer, as Gemma and Granite do."""
    text = config.get_text_config()
    factors = (getattr(text, name, None) for name in _EMBEDDING_FACTORS)
    return text.model_type.startswith("gemma") or any(factor not in (None, 1) for factor in factors)
