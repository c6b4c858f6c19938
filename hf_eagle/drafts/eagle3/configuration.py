"""Configs of drafts with Llama layers, which write the `config.json` that vLLM and SGLang read (contract section 5)."""

import logging
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from ...targets.architectures import check_tap_ids, default_tap_ids, mlp_width, sglang_counts_entries
from ..rope import draft_rope
from ..vocabulary import check_draft_vocab_size


logger = logging.getLogger(__name__)

# rope_scaling of the older readers carries everything but the base
_ROPE_BASE = "rope_theta"
# SGLang takes the first, vLLM the second
_EAGLE1_ARCHITECTURES = ("LlamaForCausalLMEagle", "EagleLlamaForCausalLM")
# what a draft embeds where a medium is
IMAGE_EMBEDDINGS = ("token", "vision")
# fields without a meaning in EAGLE-1
_OF_EAGLE3 = (
    "target_hidden_size",
    "eagle_aux_hidden_state_layer_ids",
    "sglang_counts_entries",
    "fc_norm",
    "norm_output",
    "norm_before_residual",
    "norm_before_fc",
    "image_embeddings",
)


class EagleConfig(LlamaConfig):
    """Configuration of an EAGLE-3 draft with Llama attention.

    Everything that the servers read is a field here or is derived when the config is written; there is no export step.

    Args:
        draft_vocab_size (`int`, *optional*, defaults to `vocab_size`):
            Rows of the draft's head. `vocab_size` is the target's.
        target_hidden_size (`int`, *optional*, defaults to `hidden_size`):
            Width of one tap.
        eagle_aux_hidden_state_layer_ids (`list[int]`, *optional*):
            Tap ids as layer ENTRY ids, ascending and unique (vLLM's convention). The nested
            `eagle_config["eagle_aux_hidden_state_layer_ids"]`, SGLang's, is derived.
        sglang_counts_entries (`bool`, defaults to `False`):
            SGLang takes its ids as OUTPUT ids, `id - 1`; beside some targets (DeepSeek, Kimi) as ENTRY ids, unless the
            first of them is 1.
        fc_norm (`bool`, defaults to `False`): EAGLE-3.1: one RMSNorm per tap in front of `fc`.
        norm_output (`bool`, defaults to `False`): EAGLE-3.1: the normed output is fed back, not the residual stream.
        image_embeddings (`str`, defaults to `"token"`):
            What the draft embeds at a medium: its `"token"`, as vLLM, or what the target's `"vision"` tower made of it,
            as SGLang. Neither server reads it; decoding and checks do.
        tokenizer_fingerprint (`str`, *optional*): identity of the tokenizer that the vocabulary mapping was made with.

    Raises:
        ValueError: for several layers, tied embeddings, biases, or a draft vocabulary that does not fit.

    Example:
        >>> EagleConfig.from_target(target.config, draft_vocab_size=8192).save_pretrained("draft")
    """

    # an unknown model_type fails in vLLM; Llama-style drafts are "llama" for both servers
    model_type = "llama"
    ignore_keys_at_rope_validation = {"mrope_section", "mrope_interleaved"}

    num_hidden_layers: int = 1
    rms_norm_eps: float = 1e-5
    draft_vocab_size: int | None = None
    target_hidden_size: int | None = None
    eagle_aux_hidden_state_layer_ids: list[int] | tuple[int, ...] | None = None
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    sglang_counts_entries: bool = False
    image_embeddings: str = "token"
    tokenizer_fingerprint: str | None = None

    def __post_init__(self, **kwargs):
        kwargs.pop("num_aux_hidden_states", None)  # made anew from the taps when written, as is
        nested = (kwargs.pop("eagle_config", None) or {}).get("eagle_aux_hidden_state_layer_ids")
        if nested is not None and nested == self.eagle_aux_hidden_state_layer_ids:
            self.sglang_counts_entries = True
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.vocab_size
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.eagle_aux_hidden_state_layer_ids is not None:
            self.eagle_aux_hidden_state_layer_ids = [int(i) for i in self.eagle_aux_hidden_state_layer_ids]
        if self.architectures is None:
            self.architectures = ["LlamaForCausalLMEagle3"]
        super().__post_init__(**kwargs)
        self._check()

    def _check(self):
        check_draft_vocab_size(self.draft_vocab_size, self.vocab_size)
        if self.image_embeddings not in IMAGE_EMBEDDINGS:
            raise ValueError(
                f"`image_embeddings` must be one of {', '.join(IMAGE_EMBEDDINGS)}, got {self.image_embeddings!r}."
            )
        if self.num_hidden_layers != 1:
            raise ValueError(
                f"`num_hidden_layers` of an EAGLE-3 draft must be 1, got {self.num_hidden_layers}: for a second layer "
                "vLLM and SGLang want different tensor names, and SGLang drops the residual of the first, so that no "
                "folder is the same draft in both."
            )
        if self.tie_word_embeddings:
            raise ValueError(
                "`tie_word_embeddings` of an EAGLE-3 draft must be False, got True: `lm_head.weight` is trained and "
                "its own, also beside a target that ties its; code that took it for tied may have dropped that tensor."
            )
        if self.mrope_section is not None and sum(self.mrope_section) != self.head_dim // 2:
            raise ValueError(
                f"`mrope_section` {list(self.mrope_section)} of a draft must add up to half of its `head_dim` "
                f"{self.head_dim}, got {sum(self.mrope_section)}."
            )
        self._refuse(
            "EAGLE-3",
            attention_bias=False,
            mlp_bias=False,
            norm_before_residual=False,
            norm_before_fc=False,
        )

    def _refuse(self, kind: str, **wanted: Any) -> None:
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise ValueError(f"`{name}` of an {kind} draft must be {value}, got {getattr(self, name)}.")

    @property
    def tap_ids(self) -> list[int] | None:
        """Entry ids of the taps, ascending."""
        return self.eagle_aux_hidden_state_layer_ids

    @property
    def mrope_section(self) -> list[int] | None:
        """Pairs of a head that are rotated by each of a token's three positions, `None` where it has one (1-D RoPE)."""
        return (self.rope_parameters or {}).get("mrope_section")

    @property
    def num_taps(self) -> int:
        return 3 if self.tap_ids is None else len(self.tap_ids)

    @classmethod
    def from_target(
        cls,
        target_config: PreTrainedConfig,
        draft_vocab_size: int | None = None,
        tap_ids: list[int] | None = None,
        rope: str = "1d",
        **overrides: Any,
    ) -> "EagleConfig":
        """A draft for this target: its widths, heads, RoPE, context length and special ids; one untied layer.

        Args:
            target_config: the target's (text) config.
            draft_vocab_size: rows of the draft's head, the target's vocabulary when `None`.
            tap_ids: entry ids, those of `default_tap_ids` when `None`.
            rope: `"1d"`, or `"mrope"` for three positions a token, see `draft_rope`.
            overrides: any other field, for example `fc_norm=True`.

        Raises:
            ValueError: for a wrong tap id, `"mrope"` beside a target that has none, or a draft vocabulary larger than
                the target's.
        """
        layers = target_config.get_text_config().num_hidden_layers
        tap_ids = default_tap_ids(target_config) if tap_ids is None else tap_ids
        fields = {
            **_fields_of_target(target_config),
            "target_hidden_size": target_config.get_text_config().hidden_size,
            "rope_parameters": draft_rope(target_config.get_text_config(), rope),
            "draft_vocab_size": draft_vocab_size,
            "eagle_aux_hidden_state_layer_ids": check_tap_ids(tap_ids, layers),
        }
        if sglang_counts_entries(target_config):
            fields["sglang_counts_entries"] = tap_ids[0] != 2  # where it is 2, `id - 1` says the same
            if tap_ids[0] == 1:
                logger.warning("`tap_ids` %s begin with 1, which SGLang cannot be told beside this target.", tap_ids)
        return cls(**{**fields, **overrides})

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` holds: every field both servers read, RoPE and dtype in the old and the new spelling."""
        written = _written_for_servers(self, super().to_diff_dict())
        written.pop("sglang_counts_entries", None)  # said by the ids
        if self.image_embeddings == "token":
            written.pop("image_embeddings", None)
        for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
            written[name] = getattr(self, name)
        written["eagle_config"] = {"use_aux_hidden_state": True}
        written["num_aux_hidden_states"] = self.num_taps
        if self.tap_ids is not None:
            written["eagle_aux_hidden_state_layer_ids"] = list(self.tap_ids)
            less = 0 if self.sglang_counts_entries else 1
            written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [i - less for i in self.tap_ids]
        return written


class Eagle1Config(EagleConfig):
    """Configuration of an EAGLE-1/2 draft: no taps, no vocabulary and no head of its own.

    Args:
        logit_scale (`float`, *optional*): factor on the logits of the target's head, where the target has one.
        final_logit_softcapping (`float`, *optional*): soft cap of the target's logits, where it has one.

    Raises:
        ValueError: for a field that belongs to EAGLE-3.

    Example:
        >>> Eagle1Config.from_target(target.config).save_pretrained("draft")
    """

    logit_scale: float | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self, **kwargs):
        if self.architectures is None:
            self.architectures = list(_EAGLE1_ARCHITECTURES)
        super().__post_init__(**kwargs)

    def _check(self):
        self._refuse(
            "EAGLE-1",
            num_hidden_layers=1,
            tie_word_embeddings=False,
            attention_bias=False,
            mlp_bias=False,
            eagle_aux_hidden_state_layer_ids=None,
            draft_vocab_size=self.vocab_size,
            target_hidden_size=self.hidden_size,
            fc_norm=False,
            norm_output=False,
            image_embeddings="token",
        )

    @property
    def tap_ids(self) -> list[int]:
        """None of them: this draft looks at the target's last hidden state."""
        return []

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **overrides: Any) -> "Eagle1Config":
        """A draft for this target: its widths, heads, RoPE, context length and special ids; one untied Llama layer.

        Args:
            target_config: the target's (text) config.
            overrides: any other field.

        Raises:
            ValueError: for a field that belongs to EAGLE-3.
        """
        text = target_config.get_text_config()
        scale = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
        fields = {
            **_fields_of_target(target_config),
            # the names that the servers read; both run the target's head without the target's own forward
            "logit_scale": None if scale == 1.0 else scale,
            "final_logit_softcapping": getattr(text, "final_logit_softcapping", None),
        }
        return cls(**{**fields, **overrides})

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` holds: what both servers read, and nothing of EAGLE-3."""
        written = _written_for_servers(self, LlamaConfig.to_diff_dict(self))
        for name in _OF_EAGLE3:
            written.pop(name, None)
        # transformers names the class that it saves, and no other
        written.update(architectures=list(_EAGLE1_ARCHITECTURES), draft_vocab_size=self.vocab_size)
        for name in ("logit_scale", "final_logit_softcapping"):
            if written.get(name) is None:  # vLLM would multiply by null
                written.pop(name, None)
        return written


def _fields_of_target(target_config: PreTrainedConfig) -> dict[str, Any]:
    """What every draft takes over from its target."""
    text = target_config.get_text_config()
    heads = text.num_attention_heads
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": mlp_width(target_config),
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "rms_norm_eps": getattr(text, "rms_norm_eps", 1e-5),
        "max_position_embeddings": text.max_position_embeddings,
        "rope_parameters": draft_rope(text),
        "initializer_range": getattr(text, "initializer_range", 0.02),
        **{name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def _written_for_servers(config: EagleConfig, written: dict[str, Any]) -> dict[str, Any]:
    """`written`, with every field both servers read of any draft, RoPE and dtype in the old and the new spelling."""
    for name in ("use_cache", "pretraining_tp", "attention_dropout", "_name_or_path"):
        written.pop(name, None)  # the trainer switches `use_cache` off; a server must not inherit that

    rope = dict(config.rope_parameters)
    scaling = {k: v for k, v in rope.items() if k != _ROPE_BASE}
    written["rope_parameters"] = rope
    written["rope_theta"] = rope[_ROPE_BASE]
    written["rope_scaling"] = None if scaling in ({}, {"rope_type": "default"}) else scaling

    dtype = written.get("dtype") or "float32"
    written.update(dtype=dtype, torch_dtype=dtype, tie_word_embeddings=False, num_hidden_layers=1)
    for name in ("attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "pad_token_id"):
        written[name] = getattr(config, name)
    if written.get("tokenizer_fingerprint") is None:
        written.pop("tokenizer_fingerprint", None)
    return written
