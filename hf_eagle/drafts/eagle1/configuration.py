"""The config of an EAGLE-1/2 draft."""

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from ..configuration_base import DraftConfig, fields_of_target, written_for_servers


# SGLang reads the first, vLLM the second
_ARCHITECTURES = ("LlamaForCausalLMEagle", "EagleLlamaForCausalLM")
# fields without a meaning in EAGLE-1
_OF_OTHERS = (
    "target_hidden_size",
    "eagle_aux_hidden_state_layer_ids",
    "sglang_counts_entries",
    "fc_norm",
    "norm_output",
    "norm_before_residual",
    "norm_before_fc",
    "image_embeddings",
)


class Eagle1Config(DraftConfig):
    """Configuration of an EAGLE-1/2 draft: no taps, no vocabulary and no head of its own.

    Args:
        logit_scale (`float`, *optional*): factor on the logits of the target's head, if the target has one.
        final_logit_softcapping (`float`, *optional*): soft cap of the target's logits, if it has one.

    Raises:
        ValueError: for a field that belongs to EAGLE-3.
    """

    logit_scale: float | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self, **kwargs):
        if self.architectures is None:
            self.architectures = list(_ARCHITECTURES)
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
        """None: this draft reads the target's last hidden state."""
        return []

    def as_arguments(self) -> dict[str, Any]:
        """See [`DraftConfig.as_arguments`]."""
        return {"method": "eagle1", **super().as_arguments()}

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **overrides: Any) -> "Eagle1Config":
        """A draft for this target: its widths, heads, RoPE, context length and special ids; one untied Llama layer.

        Args:
            target_config: the target's (text) config.
            overrides: any other field.

        Raises:
            ValueError: for a field that belongs to EAGLE-3.

        Example:
            >>> Eagle1Config.from_target(target.config).save_pretrained("draft")
        """
        text = target_config.get_text_config()
        scale = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)

        fields = {
            **fields_of_target(target_config, overrides.get("rope_parameters")),
            # the names that the servers read; both run the target's head without the target's own forward
            "logit_scale": None if scale == 1.0 else scale,
            "final_logit_softcapping": getattr(text, "final_logit_softcapping", None),
        }

        return cls(**{**fields, **overrides})

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` holds: what both servers read, and nothing of EAGLE-3."""
        written = written_for_servers(self, LlamaConfig.to_diff_dict(self))
        for name in _OF_OTHERS:
            written.pop(name, None)

        # transformers writes only the class that it saves
        written.update(architectures=list(_ARCHITECTURES), draft_vocab_size=self.vocab_size)
        for name in ("logit_scale", "final_logit_softcapping"):
            if written.get(name) is None:  # vLLM multiplies by null
                written.pop(name, None)
        return written


def config_for(target_config: PreTrainedConfig, options: Mapping[str, Any], **fields: Any) -> Eagle1Config:
    """The config of a new draft for a target; it uses none of the `options`."""
    return Eagle1Config.from_target(target_config, **fields)


def title_of(config: Mapping[str, Any]) -> str:
    """The draft's name for people, from its `config.json`."""
    return "EAGLE-1/2"
