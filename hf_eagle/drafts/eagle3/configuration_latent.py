"""`EagleMLAConfig`: an EAGLE-3 draft with multi-head latent attention, for any target (contract section 4)."""

from typing import Any

from transformers import PreTrainedConfig

from ...targets.config_fields import read_field
from ...targets.latent import LATENT_SIZES, has_latent_attention
from ..rope import MSCALES, draft_rope
from .configuration import EagleConfig


# besides the base, servers read these of RoPE for this attention, and ignore anything else
_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", *MSCALES)
_OF_LLAMA = ("head_dim", "norm_before_residual", "norm_before_fc")


class EagleMLAConfig(EagleConfig):
    """Configuration of an EAGLE-3 draft with multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    For a target with latent attention (DeepSeek, Kimi), such a draft has the target's kind of key-value cache.

    Args:
        q_lora_rank (`int`, *optional*, defaults to 1536):
            Rank of the queries' bottleneck; `None` projects them directly, which neither vLLM 0.32 nor SGLang 0.5.23
            serves in a draft.
        kv_lora_rank (`int`, defaults to 512): width of the latent from which keys and values are made.
        qk_nope_head_dim (`int`, defaults to 128): part of a head's key without position.
        qk_rope_head_dim (`int`, defaults to 64): rotated part of a key, shared by all heads.
        v_head_dim (`int`, defaults to 128): width of a head's value.
        kwargs: as for [`EagleConfig`]. `rope_parameters` are `default` or `yarn`: servers run any other scaling of
            this attention as YaRN.

    Raises:
        ValueError: as [`EagleConfig`], for sizes below 1, and for RoPE that servers would run differently.
    """

    # both servers know it; vLLM turns "deepseek_v3" into another kind of draft
    model_type = "kimi_k2"
    reads_mscale = True
    reads_window = False

    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    def __post_init__(self, **kwargs):
        if self.architectures is None:
            self.architectures = ["Eagle3DeepseekV2ForCausalLM"]
        self.num_key_value_heads = self.num_attention_heads
        self.head_dim = self.qk_rope_head_dim  # the rotated part
        kwargs.pop("rope_interleave", None)  # fixed; written only for other readers

        super().__post_init__(**kwargs)

    def _check(self):
        super()._check()
        for name in LATENT_SIZES:
            size = getattr(self, name)
            if not (size is None and name == "q_lora_rank") and size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")

        if self.draft_sliding_window is not None:
            raise ValueError(
                f"`draft_sliding_window` of a draft with latent attention must be unset, got "
                f"{self.draft_sliding_window}: no server runs it with a window."
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"`qk_rope_head_dim` must be even, to be rotated in pairs, got {self.qk_rope_head_dim}.")
        if self.mrope_section is not None:
            seen = f"`mrope_section` is {list(self.mrope_section)}"
            raise ValueError(f"{seen}, but a draft with latent attention is rotated in 1d only: leave it out.")
        _check_rope(self.rope_parameters)

    @classmethod
    def from_target(
        cls,
        target_config: PreTrainedConfig,
        draft_vocab_size: int | None = None,
        tap_ids: list[int] | None = None,
        **overrides: Any,
    ) -> "EagleMLAConfig":
        """A draft for this target, as [`EagleConfig.from_target`].

        The latent sizes are the target's if it has latent attention, else DeepSeek-V3's. A draft has the queries'
        bottleneck even if its target has none (DeepSeek-V2-Lite). RoPE has the target's base and its YaRN, if any; any
        other scaling is left out.

        Args:
            target_config, draft_vocab_size, tap_ids: as for [`EagleConfig.from_target`].
            overrides: any other field, for example `kv_lora_rank=256`.

        Example:
            >>> EagleMLAConfig.from_target(kimi.config, draft_vocab_size=32000)
            >>> EagleMLAConfig.from_target(qwen.config, q_lora_rank=1024, kv_lora_rank=256)
        """
        text = target_config.get_text_config()
        latent = has_latent_attention(text)
        sizes = {name: x for name in LATENT_SIZES if latent and (x := read_field(text, name, default=None)) is not None}

        if overrides.get("rope_parameters") is None:
            overrides["rope_parameters"] = _rope_like(text)
        return super().from_target(target_config, draft_vocab_size, tap_ids, **{**sizes, **overrides})

    def as_arguments(self) -> dict[str, Any]:
        """See [`DraftConfig.as_arguments`]."""
        sizes = {name: getattr(self, name) for name in LATENT_SIZES}
        return {**super().as_arguments(), "draft_attention": "mla", **sizes}

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of `config.json`: what [`EagleConfig`] writes, and the latent sizes."""
        written = super().to_diff_dict()
        for name in _OF_LLAMA:
            written.pop(name, None)

        written.update({name: getattr(self, name) for name in LATENT_SIZES}, rope_interleave=True)
        return written


def _rope_like(text_config) -> dict[str, Any]:
    """The target's base, and its YaRN if it has one."""
    rope = draft_rope(text_config, reads_mscale=True)
    yarn = rope["rope_type"] == "yarn"
    kept = {name: rope[name] for name in _YARN if yarn and name in rope}
    return {"rope_type": "yarn" if yarn else "default", "rope_theta": rope["rope_theta"], **kept}


def _check_rope(rope: dict[str, Any]) -> None:
    """`ValueError` for RoPE that the servers run differently from how this draft is trained."""
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise ValueError(
            "`rope_parameters` of a draft with latent attention (`draft_rope_scaling`) must be of type default or "
            f"yarn, got {kind!r}, which both servers run as YaRN: leave the scaling out."
        )

    if kind == "default":
        return

    unknown = sorted(set(rope) - {*_YARN, "rope_type", "type", "rope_theta"})
    if unknown:
        raise ValueError(
            f"`rope_parameters` (`draft_rope_scaling`) holds `{unknown[0]}` = {rope[unknown[0]]}, which the servers do "
            "not read for latent attention: leave it out."
        )

    missing = [name for name in _YARN[:2] if rope.get(name) is None]
    if missing or (rope.get("mscale") is None) != (rope.get("mscale_all_dim") is None):
        wanted = f"`{missing[0]}`" if missing else "both `mscale` and `mscale_all_dim` or neither"
        raise ValueError(f"`rope_parameters` of type yarn must hold {wanted}, got {rope}.")
