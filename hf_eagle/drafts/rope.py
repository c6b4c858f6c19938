"""RoPE of a draft: what of its target's RoPE both servers run in a draft as transformers does."""

import logging
from typing import Any


logger = logging.getLogger(__name__)

ROPES = ("1d", "mrope")
# what the servers read of each type, besides the base. Of `yarn` SGLang does not read an `attention_factor`.
_READ = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
        *("mscale", "mscale_all_dim"),
    ),
}


def draft_rope(text_config, kind: str = "1d") -> dict[str, Any]:
    """`rope_parameters` of a draft for a target: its base, and its scaling where servers run that in one known way.

    A draft learns its own attention, so it need not rotate as its target does; it must be served as it was trained.
    Left out are therefore

    * scalings which depend on how long the sequence is (`longrope`, `dynamic`): transformers chooses anew for every
      batch, vLLM once at its start, for the longest context it was started with;
    * `partial_rotary_factor` (Phi-3, GLM-4): transformers' Llama ignores it, vLLM obeys it. A draft's heads are rotated
      whole;
    * `mrope_section`, unless `kind` is `"mrope"`, and anything else that one server reads and another does not.

    With `"mrope"` a draft gives tokens three positions, as its target does. Both servers then read `mrope_section` and
    `mrope_interleaved`, the latter false where it is not written.

    Of a RoPE for each type of layer (Gemma 3) a draft, whose attention does not slide, gets that of `full_attention`;
    where those layers rotate nothing, or no type has that name, that of the first type which has one.

    Args:
        text_config: the target's.
        kind: `"1d"` or `"mrope"`.

    Raises:
        ValueError: for an unknown kind, or `"mrope"` beside a target that has none, or one that is scaled.
    """
    if kind not in ROPES:
        raise ValueError(f"`draft_rope` must be one of {', '.join(ROPES)}, got {kind!r}.")
    rope = getattr(text_config, "rope_parameters", None) or {}
    by_type = [x for x in (rope.get("full_attention"), *rope.values()) if isinstance(x, dict)]
    if by_type:
        rope = by_type[0]
    by_axes, kind = kind == "mrope", rope.get("rope_type") or "default"
    if by_axes and not (rope.get("mrope_section") and kind == "default"):
        seen = f"has RoPE of type {kind}" if rope.get("mrope_section") else "counts all tokens alike"
        raise ValueError(f"`draft_rope` is mrope, but the target {seen}: set it to 1d.")
    if kind not in _READ:
        logger.warning(
            "The target's RoPE scaling %r is not copied, because servers choose among its factors otherwise than "
            "training does: the draft gets plain RoPE with the same base.",
            kind,
        )
        kind = "default"
    read = {name: rope[name] for name in _READ[kind] if rope.get(name) is not None}
    if not (read.get("mscale") and read.get("mscale_all_dim")):  # one alone, or a zero, is read in several ways
        read = {name: x for name, x in read.items() if not name.startswith("mscale")}
    if by_axes:
        read = {"mrope_section": list(rope["mrope_section"]), "mrope_interleaved": bool(rope.get("mrope_interleaved"))}
    return {"rope_type": kind, "rope_theta": rope.get("rope_theta", 10000.0), **read}
