"""What config.json says without saying it: fields in several places, defaults of config classes, signs of a kind.

Import, check and training read a draft's config and its target's by the same rules. They follow transformers'
config classes (5.24, `models/{qwen3,llama,muse_glimmer_assistant}/`), and know nothing of the drafts that we write.
"""

from collections.abc import Iterable, Mapping
from typing import Any


# `model_type` of z-lab's form, and that of transformers' own
MAIN_TYPE, SECOND_TYPE = "qwen3", "muse_glimmer_assistant"
FULL, SLIDING = "full_attention", "sliding_attention"

# of the config class of `SECOND_TYPE`
SECOND_DEFAULTS = {
    "hidden_size": 6656,
    "intermediate_size": 19968,
    "num_hidden_layers": 5,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "layer_types": [SLIDING],  # of each layer
    "sliding_window": 2048,
    "block_size": 16,
    "mask_token_id": 201818,
    "target_layer_ids": [1, 13, 25, 37, 49],
}
SECOND_THETA = 500000.0

# model type -> sizes that do not follow from others; every other class derives them
_HEAD_WIDTH = {MAIN_TYPE: 128, SECOND_TYPE: SECOND_DEFAULTS["head_dim"]}
_KV_HEADS = {MAIN_TYPE: 32, SECOND_TYPE: SECOND_DEFAULTS["num_key_value_heads"]}
# of Qwen3's config class
_WINDOW, _FIRST_SLIDING_LAYER = 4096, 28


# ---- a DFlash draft ----


def nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in `dflash_config`."""
    found = config.get("dflash_config")
    return found if isinstance(found, dict) else {}


def named(config: Mapping[str, Any], name: str) -> Any:
    """A field that may be in `dflash_config` or at top level; the former wins."""
    return nested(config).get(name, config.get(name))


def head_width(config: Mapping[str, Any]) -> int:
    """The width of a head, with the default of the config class that `model_type` names."""
    default = _HEAD_WIDTH.get(str(config.get("model_type")))
    return config.get("head_dim", default) or config["hidden_size"] // config["num_attention_heads"]


def kv_heads(config: Mapping[str, Any], read_as: str | None = None) -> int:
    """The number of key heads, as [`head_width`].

    Args:
        config: the content of config.json.
        read_as: model type whose class a reader takes, if not that of `model_type`.
    """
    default = _KV_HEADS.get(read_as or str(config.get("model_type")))
    return config.get("num_key_value_heads", default) or config["num_attention_heads"]


def slides_by_default(config: Mapping[str, Any], num_layers: int) -> bool:
    """Whether Qwen3's config class gives layers a window, where `layer_types` says nothing of it."""
    window, first = config.get("sliding_window", _WINDOW), config.get("max_window_layers", _FIRST_SLIDING_LAYER)
    asked = config.get("layer_types") is None and config.get("use_sliding_window") and window is not None
    return bool(asked) and not (isinstance(first, int) and first >= num_layers)


def shown_dspark(config: Mapping[str, Any], tensors: Iterable[str]) -> str | None:
    """Say what shows that a draft is one of DSpark, and what that means; `None` if nothing shows it.

    Args:
        config: the content of config.json.
        tensors: names of the tensors.

    Returns:
        A sentence without its full stop.
    """
    named_so = [name for name in config.get("architectures") or [] if "DSpark" in str(name)]
    signs = [f"`architectures` {named_so}"] if named_so else []
    signs += ["`markov_rank`"] if "markov_rank" in config else []
    signs += [f"`{name}`" for name in tensors if "markov_head." in name]
    if not signs:
        return None
    return (
        f"{signs[0]} shows a DSpark draft, which DeepSpec also calls dflash where its rank is 0: slot k predicts the "
        "token after its own, so that as a DFlash draft it would be off by one"
    )


# ---- any draft ----


def window_keys(window: int) -> dict[str, Any]:
    """What config.json must hold, so that vLLM shows a draft of one layer so many keys: one of these alone does not."""
    return {"layer_types": [SLIDING], "sliding_window": window}


# ---- a target ----

# fields of a config that the output of the embedding table is multiplied by
_EMBEDDING_FACTORS = ("embedding_multiplier", "scale_emb", "embed_scale", "emb_scale")


def scales_embeddings(config) -> bool:
    """Whether a target multiplies the rows of its embedding table before its first layer, as Gemma and Granite do."""
    text = config.get_text_config()
    factors = (getattr(text, name, None) for name in _EMBEDDING_FACTORS)
    return text.model_type.startswith("gemma") or any(factor not in (None, 1) for factor in factors)
