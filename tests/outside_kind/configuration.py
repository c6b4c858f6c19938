"""What the `config.json` of a block draft says."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from hf_eagle.drafts.configuration_base import DraftConfig, fields_of_target
from hf_eagle.targets.architectures import check_tap_ids, default_tap_ids


class BlockConfig(DraftConfig):
    """Configuration of a block draft.

    Args:
        block_size (`int`, defaults to 4):
            Slots of a block: the newest token and `block_size - 1` that are proposed behind it.
        num_anchors (`int`, defaults to 8):
            Blocks that are trained of each example in an epoch, at most.
        block_taps (`list[int]`, *optional*):
            Entry ids of the taps. Other kinds have another name for them: `tap_ids` is what everybody asks.

    Raises:
        ValueError: for a block that proposes nothing, or a draft without taps or anchors.
    """

    block_size: int = 4
    num_anchors: int = 8
    block_taps: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.architectures = self.architectures or ["OutsideBlockDraft"]
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        super()._check()
        if self.block_size < 2:
            raise ValueError(f"`block_size` must be at least 2, got {self.block_size}.")
        if self.num_anchors < 1:
            raise ValueError(f"`num_anchors` must be at least 1, got {self.num_anchors}.")
        if self.block_taps is not None and not self.block_taps:
            raise ValueError("`block_taps` of a block draft must name at least one layer.")

    @property
    def tap_ids(self) -> list[int]:
        return self.block_taps

    def as_arguments(self) -> dict[str, Any]:
        """See [`DraftConfig.as_arguments`]."""
        return {"method": "block", **super().as_arguments(), "block_size": self.block_size}


def config_for(target_config: PreTrainedConfig, options: Mapping[str, Any], **fields: Any) -> BlockConfig:
    """The config of a new draft for a target."""
    taps = options["tap_ids"] or default_tap_ids(target_config)
    return BlockConfig(
        **{
            **fields_of_target(target_config),
            "draft_vocab_size": options["draft_vocab_size"],
            "block_taps": check_tap_ids(taps, target_config.get_text_config().num_hidden_layers),
            **fields,
        }
    )


def title_of(config: Mapping[str, Any]) -> str:
    """What people call the draft of a `config.json`."""
    return "Block"
