"""Convert the config of a foreign draft into ours: keep its sizes and RoPE, and refuse flags that would be lost."""

from typing import Any

from transformers import PreTrainedConfig

from ..drafts.configuration_base import DraftConfig
from .forms import Form
from .kinds import ForeignKind, check_attention


# flag -> values that change nothing, and why no other value can be kept
_FLAGS = {
    "norm_before_residual": ((None, False), "vLLM applies it and SGLang does not"),
    "norm_before_fc": ((None, False), "it is one norm over all taps, which the servers do not share"),
    "parallel_drafting": ((None, False), "such a draft proposes all tokens in one forward pass"),
    "parallel_draft_step": ((None, 0, 1), "such a draft proposes several tokens in one forward pass"),
    "use_aux_hidden_state": ((None, True), "such a draft has no taps, but is no EAGLE-1 draft either"),
    "use_mtp_layernorm": ((None, False), "the servers have no such norm"),
    "use_last_layernorm": ((None, True), "the servers always norm the head's input"),
    "hidden_act": ((None, "silu", "swish"), "the draft's MLP is SwiGLU"),
    "hidden_activation": ((None, "silu", "swish"), "the draft's MLP is SwiGLU"),
    "rope_interleave": ((None, True), "the servers rotate neighbouring pairs in latent attention"),
    "partial_rotary_factor": ((None, 1, 1.0), "the draft rotates the whole head"),
    "logit_scale": ((None, 1, 1.0), "SGLang does not scale a draft's logits"),
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# defaults of the projects and of LlamaConfig
_DEFAULT_THETA = 10000.0
_DEFAULT_EPS = 1e-6


def flat_config(form: Form, kind: ForeignKind, config: dict[str, Any]) -> dict[str, Any]:
    """Return all fields in one mapping, with the defaults of the form's config class."""
    flat = _with_layer(form, kind, config) if form.name == "speculators" else form.filled(config)
    known = any(place.get("rope_theta") is not None for place in (flat, _rope_fields(flat)))
    return flat if known or form.default_theta is None else flat | {"rope_theta": form.default_theta}


def _with_layer(form: Form, kind: ForeignKind, config: dict[str, Any]) -> dict[str, Any]:
    """All fields of a config of speculators, which keeps those of the layer in a nested mapping."""
    # it uses our names of kinds
    said = config.get("speculators_model_type")
    if said not in form.kinds:
        raise ValueError(
            f"`speculators_model_type` is {said!r}, but only {' and '.join(form.kinds)} drafts can be imported."
        )

    layer = config.get("transformer_layer_config") or {}
    model_type = layer.get("model_type", kind.layer_types[0])
    if model_type not in kind.layer_types:
        raise ValueError(
            f"`model_type` of this draft's layer is {model_type!r}, but SGLang's draft of this kind has layers of "
            f"{' or '.join(kind.layer_types)}: no other one can be imported."
        )
    check_attention(layer, kind.attention_types)

    # the model type at top level is that of the whole config, not of the layer
    return {**kind.assumed, **layer, **{k: v for k, v in config.items() if v is not None}, "model_type": model_type}


def check_flags(form: Form, kind: ForeignKind, config: dict[str, Any]) -> None:
    """Raise a `ValueError` for the first flag that our draft or one of the servers could not honour."""
    places = (config, config.get("eagle_config") or {}, config.get("dflash_config") or {}, _rope_fields(config))
    for place in places:
        for flag, (harmless, reason) in {**_FLAGS, **kind.flags}.items():
            if place.get(flag) not in harmless:
                raise ValueError(f"`{flag}` of this draft is {place[flag]!r}, which cannot be imported: {reason}.")

    for flag, how in kind.trained_otherwise.get(form.name, {}).items():
        if _rope_fields(config).get(flag):
            raise ValueError(f"`{flag}` of this draft is set, but {how}.")


def draft_config(
    kind: ForeignKind,
    config: dict[str, Any],
    target_config: PreTrainedConfig,
    draft_vocab_size: int,
    tap_ids: list[int] | None,
    rope_theta: float | None = None,
) -> DraftConfig:
    """Return our config of a foreign draft for its target.

    Args:
        kind: kind of the draft.
        config: fields of its config, flat.
        target_config: config of its target, which gives vocabulary, context length and special ids.
        draft_vocab_size: number of rows in its head.
        tap_ids: entry ids, for a kind with taps; `None` for the default.
        rope_theta: value that replaces the one in its config.

    Raises:
        ValueError: if the servers would run its RoPE differently, or its sizes do not fit the target.
    """
    rope = rope_parameters(config)
    if rope_theta is not None:
        rope["rope_theta"] = rope_theta

    heads = _field(config, "num_attention_heads")
    fields = {
        "hidden_size": _field(config, "hidden_size"),
        "intermediate_size": _field(config, "intermediate_size"),
        "num_attention_heads": heads,
        "rms_norm_eps": config.get("rms_norm_eps") or _DEFAULT_EPS,
        "rope_parameters": rope,
    }
    fields |= kind.attention_fields(config, fields) | kind.own_fields(config, draft_vocab_size, tap_ids)
    return kind.config(target_config, fields)


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return RoPE of a config in the form of transformers 5; the config may use the old form, the new form, or both."""
    given = {k: v for k, v in _rope_fields(config).items() if v is not None}
    if any(isinstance(value, dict) for value in given.values()):
        raise ValueError(
            "`rope_parameters` of this draft differ by type of layer, but our drafts have one RoPE for all layers."
        )

    # old configs say `type`, newer ones `rope_type`
    old = given.pop("type", "default")
    rope_type = given.pop("rope_type", old)
    if rope_type not in _ROPE_TYPES or "mrope_section" in given:
        seen = "mrope" if "mrope_section" in given else rope_type
        raise ValueError(
            f"`rope_scaling` of this draft is of type {seen!r}, which the servers run differently: only "
            f"{', '.join(_ROPE_TYPES)} can be imported."
        )

    given.pop("partial_rotary_factor", None)  # it is 1, by `check_flags`
    bases = {float(x) for x in (given.pop("rope_theta", None), config.get("rope_theta")) if x is not None}
    if len(bases) > 1:
        raise ValueError(
            f"`rope_theta` of this draft is {' and '.join(map(str, sorted(bases)))} in one config, and the servers "
            "read different ones: correct its config.json."
        )

    theta = bases.pop() if bases else _DEFAULT_THETA
    return {"rope_type": rope_type, "rope_theta": theta} | (given if rope_type != "default" else {})


def _rope_fields(config: dict[str, Any]) -> dict[str, Any]:
    return {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def _field(config: dict[str, Any], name: str) -> int:
    if config.get(name) is None:
        raise ValueError(f"`{name}` is missing in the config.json of this draft.")
    return int(config[name])
