"""RoPE of a draft: the part of its target's RoPE that both servers run in a draft as transformers does."""

import logging
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any


logger = logging.getLogger(__name__)

ROPES = ("1d", "mrope")
# the fields that servers read for each type, besides the base. SGLang reads no `attention_factor` of `yarn`
_READ = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
}
# and of `yarn` in latent attention alone: in Llama's, servers always multiply by 0.1 ln(factor) + 1
MSCALES = ("mscale", "mscale_all_dim")

# and those that each type cannot be computed without
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": _READ["llama3"],
    "yarn": ("factor", "original_max_position_embeddings"),
}


def draft_rope(text_config, form: str = "1d", reads_mscale: bool = False) -> dict[str, Any]:
    """`rope_parameters` of a draft for a target: its base, and its scaling if servers run that in one known way.

    A draft learns its own attention, so it need not rotate as its target does. It must be served as it was trained.
    Therefore these are left out:

    * scalings that depend on the length of the sequence (`longrope`, `dynamic`): transformers chooses anew for every
      batch, vLLM once at its start, for the longest context it was started with;
    * scalings that servers do not run in a draft (Gemma 4's `proportional`);
    * `partial_rotary_factor` (Phi-3, GLM-4, Qwen3.5): transformers' Llama ignores it, vLLM obeys it. A draft rotates
      whole heads;
    * `mscale` and `mscale_all_dim` of YaRN, unless `reads_mscale`: transformers obeys them, servers do not;
    * `mrope_section`, unless `form` is `"mrope"`, and anything else that one server reads and another does not.

    With `"mrope"` a draft gives tokens three positions, as its target does. Both servers then read `mrope_section` and
    `mrope_interleaved`; the latter is false if absent.

    If each type of layer has its own RoPE (Gemma 3), a draft, whose attention does not slide, gets that of
    `full_attention`. If those layers rotate nothing, or no type has that name, it gets that of the first type that has
    one.

    Args:
        text_config: the target's.
        form: how the draft counts positions, `"1d"` or `"mrope"`.
        reads_mscale: whether servers read YaRN's `mscale` and `mscale_all_dim` in such a draft, see [`DraftConfig`].

    Raises:
        ValueError: for an unknown form, or `"mrope"` for a target without m-RoPE, or with a scaled or partial one.
    """
    if form not in ROPES:
        raise ValueError(f"`draft_rope` must be one of {', '.join(ROPES)}, got {form!r}.")

    rope = _of_layer(text_config)
    by_axes, scaling = form == "mrope", rope.get("rope_type") or "default"
    if by_axes and (seen := _why_not_by_axes(rope, scaling)) is not None:
        raise ValueError(f"`draft_rope` is mrope, but the target {seen}: set it to 1d.")

    if scaling not in _READ:
        by_length = scaling in ("longrope", "dynamic")
        logger.warning(
            "The target's RoPE scaling %r is not copied, because servers %s: the draft gets plain RoPE with the same "
            "base.",
            scaling,
            "choose among its factors differently from training" if by_length else "do not all run it in a draft",
        )
        scaling = "default"

    read = {name: rope[name] for name in _READ[scaling] if rope.get(name) is not None}
    if scaling == "yarn" and all(rope.get(name) for name in MSCALES):  # readers differ on one alone, and on a zero
        mscales = {name: rope[name] for name in MSCALES}
        if reads_mscale:
            read |= mscales
        else:
            logger.info(
                "The target's `mscale` %s and `mscale_all_dim` %s are not copied, because servers do not read them in "
                "this draft's attention: it is trained with YaRN's own factor, as it is served.",
                *mscales.values(),
            )

    if by_axes:
        read = {"mrope_section": list(rope["mrope_section"]), "mrope_interleaved": bool(rope.get("mrope_interleaved"))}

    return {"rope_type": scaling, "rope_theta": rope.get("rope_theta", 10000.0), **read}


def _why_not_by_axes(rope: Mapping[str, Any], scaling: str) -> str | None:
    """What of a target's RoPE keeps a draft from three positions a token, `None` if nothing does."""
    if not rope.get("mrope_section"):
        return "counts all tokens alike"
    if scaling != "default":
        return f"has RoPE of type {scaling}"
    # its section is of the rotated part
    partial = (rope.get("partial_rotary_factor") or 1) != 1
    return "rotates a part of each head, and a draft rotates whole ones" if partial else None


def check_rope_scaling(given: Any) -> dict[str, Any]:
    """Check a RoPE scaling given by the user, `{"rope_type": "yarn", "factor": 4.0, ...}`, as transformers 5 spells it.

    Args:
        given: the fields; `type` may stand for `rope_type`, and `rope_theta` may be left out.

    Raises:
        ValueError: for a type that transformers and both servers do not run alike, and for fields that one of them does
            not read, that are missing, or that have wrong values.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"`draft_rope_scaling` must be a JSON object, got {given!r}.")

    types = {given[name] for name in ("rope_type", "type") if isinstance(given.get(name), str)}
    scaling = types.pop() if len(types) == 1 else None

    if scaling not in _READ:
        seen = given.get("rope_type", given.get("type"))
        raise ValueError(
            f"`rope_type` of `draft_rope_scaling` must be one of {', '.join(_READ)}, which transformers and both "
            f"servers run alike, got {'two of them' if types else repr(seen)}."
        )

    fields = {name: value for name, value in given.items() if name not in ("rope_type", "type") and value is not None}
    known = (*_READ[scaling], *(MSCALES if scaling == "yarn" else ()), "rope_theta")
    for name, value in fields.items():
        if name not in known:
            raise ValueError(
                f"`draft_rope_scaling` holds `{name}`, which is not read of type {scaling} by both servers: leave it "
                f"out; it takes {', '.join(known)}."
            )
        if (wanted := _refused(name, value)) is not None:
            raise ValueError(f"`{name}` of `draft_rope_scaling` must be {wanted}, got {value!r}.")

    missing = [name for name in _NEEDED[scaling] if name not in fields]
    if missing:
        raise ValueError(f"`draft_rope_scaling` of type {scaling} lacks `{missing[0]}`: add it.")

    low, high = fields.get("low_freq_factor", 0), fields.get("high_freq_factor", 1)
    if low >= high:
        raise ValueError(
            f"`low_freq_factor` of `draft_rope_scaling` must be below `high_freq_factor` {high}, got {low}."
        )

    slow, fast = fields.get("beta_slow", 1), fields.get("beta_fast", 32)
    if slow >= fast:
        raise ValueError(f"`beta_slow` of `draft_rope_scaling` must be below `beta_fast` {fast}, got {slow}.")

    if ("mscale" in fields) != ("mscale_all_dim" in fields):
        raise ValueError("`draft_rope_scaling` must hold both `mscale` and `mscale_all_dim`, or neither.")

    return {"rope_type": scaling, **fields}


def _refused(name: str, value: Any) -> str | None:
    """What a field of a scaling must be, as the rest of a sentence; `None` if it is that."""
    if name == "truncate":
        return None if isinstance(value, bool) else "true or false"
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return "a number"

    if name == "original_max_position_embeddings":
        return None if isinstance(value, int) and value >= 1 else "a whole number of at least 1"

    if name == "factor" and value > 10_000:
        return "at most 10,000"
    least = 1 if name == "factor" else 0
    return None if value > 0 and value >= least else "at least 1" if least else "above 0"


def scaled_rope(text_config, scaling: Mapping[str, Any], positions: int) -> dict[str, Any]:
    """`rope_parameters` of a draft with its own scaling, and the target's base if that names none.

    Args:
        text_config: the target's.
        scaling: as [`check_rope_scaling`] returns it.
        positions: the target's own `max_position_embeddings`.

    Raises:
        ValueError: for a scaling that begins beyond the target's last position.
    """
    original = scaling.get("original_max_position_embeddings", 0)
    if original > positions:
        raise ValueError(
            f"`original_max_position_embeddings` of `draft_rope_scaling` must be at most the target's {positions} "
            f"positions, got {original}: it is the length that the scaling stretches."
        )

    reached = int(scaling.get("factor", 1) * original)
    if scaling["rope_type"] == "yarn" and reached < positions:
        logger.warning(
            "`draft_rope_scaling` reaches %d of the target's %d positions (`factor` times "
            "`original_max_position_embeddings`): vLLM lets such a draft propose nothing beyond them.",
            reached,
            positions,
        )
    return {"rope_theta": _of_layer(text_config).get("rope_theta", 10000.0), **scaling}


def check_mscales(rope: Mapping[str, Any]) -> None:
    """`ValueError` for YaRN's `mscale` and `mscale_all_dim` in a draft whose servers do not read them."""
    seen = next((name for name in MSCALES if rope.get(name) is not None), None)
    if seen is not None:
        raise ValueError(
            f"`rope_parameters` (`draft_rope_scaling`) holds `{seen}` = {rope[seen]}, which servers read in latent "
            "attention only: leave `mscale` and `mscale_all_dim` out; they use 0.1 ln(`factor`) + 1."
        )


def _of_layer(text_config) -> dict[str, Any]:
    """RoPE of a target; of the layers that resemble a draft, if layers differ."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    by_type = [x for x in (rope.get("full_attention"), *rope.values()) if isinstance(x, dict)]
    return by_type[0] if by_type else rope


def positions_for(rope: Mapping[str, Any], text_config, positions: int) -> int:
    """`max_position_embeddings` that give a draft with this RoPE its target's context in both servers.

    For some scalings, SGLang multiplies the config's context by `factor`. With YaRN, vLLM takes `factor` times the
    original length, whatever the config's context is; so does this, where that is more.

    Args:
        rope: the draft's.
        text_config: the target's.
        positions: the target's own `max_position_embeddings`.
    """
    reached = 0
    if rope.get("rope_type") == "yarn":
        reached = round(rope["factor"] * rope["original_max_position_embeddings"])
    own = math.ceil(int(positions * _stretched(_of_layer(text_config))) / _stretched(rope))
    return max(positions, own, reached)


def _stretched(rope: Mapping[str, Any]) -> float:
    known = "original_max_position_embeddings" in rope or rope.get("rope_type") == "llama3"
    return 1 if known else rope.get("factor") or 1
