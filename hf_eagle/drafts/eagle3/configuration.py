"""The config of an EAGLE-3 or 3.1 draft, with Llama's attention or (`configuration_latent.py`) DeepSeek's."""

import logging
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ...door.config_readings import window_keys
from ...targets.architectures import check_tap_ids, default_tap_ids, window_of_all_layers
from ...targets.config_fields import read_field
from ...targets.latent import has_latent_attention
from ...targets.media_inputs import has_mrope
from ..configuration_base import DraftConfig, fields_of_target, written_for_servers
from ..rope import draft_rope
from .taps import describe_taps, sglang_counts_entries


logger = logging.getLogger(__name__)

# arguments of the command line that are fields of the config
_FIELDS = ("draft_vocab_size", "tap_ids", "fc_norm", "norm_output", "draft_sliding_window")

# what a draft embeds at a medium
IMAGE_EMBEDDINGS = ("token", "vision")


class EagleConfig(DraftConfig):
    """Configuration of an EAGLE-3 draft with Llama attention.

    Everything that the servers read is a field, or is derived when the config is written; there is no export step.

    Args:
        kwargs: as for [`DraftConfig`]. `eagle_config` holds SGLang's form of `eagle_aux_hidden_state_layer_ids`.
        sglang_counts_entries (`bool`, defaults to `False`):
            SGLang reads its ids as OUTPUT ids, `id - 1`; for some targets (DeepSeek, Kimi) as ENTRY ids, unless the
            first of them is 1.
        fc_norm (`bool`, defaults to `False`): EAGLE-3.1: one RMSNorm per tap before `fc`.
        norm_output (`bool`, defaults to `False`): EAGLE-3.1: feed back the normed output, not the residual stream.
        draft_sliding_window (`int`, *optional*):
            A sliding window of so many keys. `layer_types` and `sliding_window` follow from it: vLLM needs both.

    Raises:
        ValueError: for several layers, tied embeddings, biases, or a draft vocabulary that does not fit.
    """

    reads_window = True

    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    sglang_counts_entries: bool = False

    def __post_init__(self, **kwargs):
        kwargs.pop("num_aux_hidden_states", None)  # derived from the taps when written, and so is
        nested = (kwargs.pop("eagle_config", None) or {}).get("eagle_aux_hidden_state_layer_ids")
        if nested is not None and nested == self.eagle_aux_hidden_state_layer_ids:
            self.sglang_counts_entries = True

        if self.architectures is None:
            self.architectures = ["LlamaForCausalLMEagle3"]
        if self.draft_sliding_window is not None:
            kwargs |= window_keys(self.draft_sliding_window)
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        super()._check()
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
                "its own, even for a target that ties its own; code that took it for tied may have dropped that tensor."
            )

        window = self.draft_sliding_window
        if window is not None and (type(window) is not int or window < 2):
            raise ValueError(f"`draft_sliding_window` of an EAGLE-3 draft must be a whole number from 2, got {window}.")

        if self.mrope_section is not None and sum(self.mrope_section) != self.head_dim // 2:
            raise ValueError(
                f"`mrope_section` {list(self.mrope_section)} of a draft must add up to half of its `head_dim` "
                f"{self.head_dim}, got {sum(self.mrope_section)}."
            )

        self._require(
            "an EAGLE-3",
            attention_bias=False,
            mlp_bias=False,
            norm_before_residual=False,
            norm_before_fc=False,
        )

    def as_arguments(self) -> dict[str, Any]:
        """See [`DraftConfig.as_arguments`]."""
        said = {"method": "eagle3", "draft_attention": "llama", **super().as_arguments()}
        names = ("fc_norm", "norm_output", "draft_sliding_window")
        return said | {name: getattr(self, name) for name in names}

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
            draft_vocab_size: rows of the draft's head, the target's vocabulary if `None`.
            tap_ids: entry ids, those of `default_tap_ids` if `None`.
            rope: `"1d"`, or `"mrope"` for three positions a token, see `draft_rope`.
            overrides: any other field, for example `fc_norm=True`.

        Raises:
            ValueError: for a wrong tap id, `"mrope"` for a target without it, or a draft vocabulary larger than
                the target's.

        Example:
            >>> EagleConfig.from_target(target.config, draft_vocab_size=8192).save_pretrained("draft")
        """
        text = target_config.get_text_config()
        layers = read_field(text, "num_hidden_layers")
        tap_ids = default_tap_ids(target_config) if tap_ids is None else tap_ids

        rope = overrides.get("rope_parameters") or draft_rope(text, rope, cls.reads_mscale)
        fields = {
            **fields_of_target(target_config, rope, cls.reads_mscale, overrides.get("intermediate_size")),
            "target_hidden_size": text.hidden_size,
            "draft_vocab_size": draft_vocab_size,
            "eagle_aux_hidden_state_layer_ids": check_tap_ids(tap_ids, layers),
        }

        if cls.reads_window and window_of_all_layers(target_config) is not None:
            # the draft sees all tokens: this window is as long as the context, and keeps vLLM from taking the target's
            fields |= window_keys(fields["max_position_embeddings"])

        if sglang_counts_entries(target_config):
            fields["sglang_counts_entries"] = tap_ids[0] != 2  # if it is 2, both spellings agree
            if tap_ids[0] == 1:
                logger.warning("`tap_ids` %s begin with 1, which SGLang cannot read for this target.", tap_ids)

        return cls(**{**fields, **overrides})

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of `config.json`: every field that both servers read, RoPE and dtype in both spellings."""
        written = written_for_servers(self, super().to_diff_dict())
        written.pop("sglang_counts_entries", None)  # follows from the ids
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


def config_for(target_config: PreTrainedConfig, options: Mapping[str, Any], **fields: Any) -> EagleConfig:
    """The config of a new draft for a target.

    Args:
        target_config: the target's (text) config.
        options: arguments of the command line by name; only those of EAGLE-3 are read.
        fields: any other field of the config.
    """
    config = draft_config(
        target_config,
        options["draft_attention"],
        options["latent_sizes"],
        options["draft_rope"],
        options["image_embeddings"],
        **{name: options[name] for name in _FIELDS},
        **fields,
    )
    logger.info("%s", describe_taps(target_config, config.tap_ids))
    return config


def draft_config(
    target_config: PreTrainedConfig,
    attention: str = "auto",
    latent_sizes: dict | None = None,
    rope: str = "1d",
    image_embeddings: str = "token",
    **fields: Any,
) -> EagleConfig:
    """The config of a new draft for a target.

    Args:
        target_config: the target's (text) config.
        attention: `"llama"` or `"mla"`; `"auto"` is the target's own kind.
        latent_sizes: of `"mla"`, those that differ from the target's.
        rope: of `"llama"`, `"1d"` or `"mrope"`, see `draft_rope`.
        image_embeddings: of `"llama"`, `"token"` or `"vision"`, see [`EagleConfig`].
        fields: as for [`EagleConfig.from_target`].

    Raises:
        ValueError: for an unknown kind, latent sizes without `"mla"`, or what does not fit the target.
    """
    from .configuration_latent import EagleMLAConfig  # it imports this module

    if attention not in ("auto", "llama", "mla"):
        raise ValueError(f"`draft_attention` must be one of auto, llama, mla, got {attention!r}.")

    by_token = image_embeddings == "token"
    if not by_token and not has_mrope(target_config):
        raise ValueError(f"`image_embeddings` is {image_embeddings}, but the target takes no images: leave it out.")

    if attention == "mla" or (attention == "auto" and has_latent_attention(target_config.get_text_config())):
        if rope != "1d":
            raise ValueError(
                f"`draft_rope` is {rope}, but the draft has latent attention, which is rotated in 1d only."
            )
        if not by_token:
            raise ValueError(
                f"`image_embeddings` is {image_embeddings}, but a draft with latent attention embeds tokens "
                "only: leave it out, or set `draft_attention` to llama."
            )
        if fields.get("draft_sliding_window") is not None:
            raise ValueError(
                f"`draft_sliding_window` is {fields['draft_sliding_window']}, but the draft has latent attention, "
                "which servers run without a window: leave it out, or set `draft_attention` to llama."
            )
        config = EagleMLAConfig.from_target(target_config, **(latent_sizes or {}), **fields)
        if config.q_lora_rank is None:
            logger.warning("`q_lora_rank` is none: neither vLLM 0.32 nor SGLang 0.5.23 loads such a draft.")
        return config

    if latent_sizes:
        name, size = next(iter(latent_sizes.items()))
        raise ValueError(
            f"`{name}` is {size}, but the draft's attention is Llama's, which has none: leave it out, or set "
            "`draft_attention` to mla."
        )

    if not by_token:
        logger.warning("`image_embeddings` is vision, as SGLang serves: vLLM 0.32 gives a draft the image's token.")
    return EagleConfig.from_target(target_config, rope=rope, image_embeddings=image_embeddings, **fields)


def title_of(config: Mapping[str, Any]) -> str:
    """The draft's name for people, from its `config.json`."""
    return "EAGLE-3.1" if config.get("norm_output") else "EAGLE-3"
