"""The config of an EAGLE-1/2 draft."""

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from ..configuration_base import DraftConfig, fields_of_head, fields_of_target, written_for_servers


# SGLang reads the first, vLLM the second
_ARCHITECTURES = ("LlamaForCausalLMEagle", "EagleLlamaForCausalLM")
# fields that mean nothing in EAGLE-1
_EAGLE3_FIELDS = (
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
    """Configuration of an EAGLE-1/2 draft: it has no taps, and uses the target's vocabulary and head.

    Args:
        logit_scale (`float`, *optional*): factor that the target applies to its logits, if any.
        final_logit_softcapping (`float`, *optional*): soft cap of the target's logits, if any.

    Raises:
        ValueError: if a field has a value that EAGLE-1 does not support.
    """

    logit_scale: float | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self, **kwargs):
        if self.architectures is None:
            self.architectures = list(_ARCHITECTURES)
        super().__post_init__(**kwargs)

    def _check(self):
        self._require(
            "an EAGLE-1",
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
            draft_sliding_window=None,
        )

    @property
    def tap_ids(self) -> list[int]:
        """Empty: this draft has no taps, it reads the target's last hidden state."""
        return []

    def as_arguments(self) -> dict[str, Any]:
        """See [`DraftConfig.as_arguments`]."""
        return {"method": "eagle1", **super().as_arguments()}

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **overrides: Any) -> "Eagle1Config":
        """Return the config of a draft of one Llama layer, with the target's widths, RoPE, context length and ids.

        Args:
            target_config: the target's (text) config.
            overrides: fields that replace those taken from the target, or are added to them.

        Raises:
            ValueError: if a field has a value that EAGLE-1 does not support.

        Example:
            >>> Eagle1Config.from_target(target.config).save_pretrained("draft")
        """
        fields = {
            **fields_of_target(
                target_config, overrides.get("rope_parameters"), intermediate_size=overrides.get("intermediate_size")
            ),
            **fields_of_head(target_config),
        }

        return cls(**{**fields, **overrides})

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the content of `config.json`: all fields that both servers read, without those of EAGLE-3."""
        written = written_for_servers(self, LlamaConfig.to_diff_dict(self))
        for name in _EAGLE3_FIELDS:
            written.pop(name, None)

        # transformers names only the class that it saves, and leaves out a number that is the default; the servers look
        # for one class each, and always for the number
        written.update(architectures=list(_ARCHITECTURES), draft_vocab_size=self.vocab_size)
        for name in ("logit_scale", "final_logit_softcapping"):
            if written.get(name) is None:  # vLLM would multiply by null
                written.pop(name, None)
        return written


def config_for(target_config: PreTrainedConfig, options: Mapping[str, Any], **fields: Any) -> Eagle1Config:
    """Return the config of a new draft for a target. `options` are for kinds that have some; EAGLE-1 has none."""
    return Eagle1Config.from_target(target_config, **fields)


def title_of(config: Mapping[str, Any]) -> str:
    """Return the name that people call this kind of draft, given its `config.json`."""
    return "EAGLE-1/2"
