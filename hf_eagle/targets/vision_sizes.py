"""What a vision tower computes from the sizes of images and videos alone, made before a batch is sent to its device.

transformers' towers read these sizes back from the device: dozens of times, and three times in each of their layers. As
arguments they take what they would compute (`transformers.vision_utils`).
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .media_inputs import GRIDS


# targets whose towers compute nothing else from the sizes, and a function that their modules have if towers take such
# arguments, which depends on the version of transformers
_KNOWN = {
    **dict.fromkeys(
        ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), "get_vision_interpolation_indices_and_weights"
    ),
    "qwen2_5_vl": "get_vision_window_index",
}
# where sequences end, by which the towers' attention splits them
_READ = ("cu_seqlens", "cu_window_seqlens")


@dataclass
class VisionSizes:
    """Arguments of a target's forward, by name.

    Attributes:
        computed: tensors that meet others on the device.
        read: tensors that the host reads, and which stay with it: the sizes themselves, and where sequences end.
    """

    computed: dict[str, torch.Tensor]
    read: dict[str, torch.Tensor]

    @property
    def arguments(self) -> dict[str, torch.Tensor]:
        return self.computed | self.read

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "VisionSizes":
        """The same, with each of its tensors for the device changed, for instance moved."""
        return VisionSizes({name: change(x) for name, x in self.computed.items()}, self.read)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "VisionSizes":
        """On another device."""
        return self.each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "VisionSizes":
        """In pinned memory, from which a device can fetch them by itself."""
        return self.each(torch.Tensor.pin_memory)


class SizesOfMedia:
    """Makes the [`VisionSizes`] of batches; it holds a few numbers of the target's tower, and none of its weights.

    Args:
        model: the target.
    """

    def __init__(self, model: PreTrainedModel):
        self._tower = None
        tower, called = getattr(getattr(model, "model", None), "visual", None), _KNOWN.get(model.config.model_type)
        if tower is None or called is None or not hasattr(sys.modules[type(tower).__module__], called):
            return
        if "flash" in tower.config._attn_implementation:  # its kernels read where sequences end on the device
            return

        asked = ("spatial_merge_size", "num_grid_per_side", "interpolation_mode", "interpolation_align_corners")
        asked += ("window_size", "patch_size")
        self._tower = {name: getattr(tower, name) for name in asked if hasattr(tower, name)}

    def __call__(self, batch: Mapping[str, Any]) -> VisionSizes | None:
        """Of a batch on the CPU; `None` without media, or for a tower that takes no such arguments."""
        if self._tower is None:
            return None

        found = VisionSizes({}, {})
        for name in GRIDS:
            if batch.get(name) is None:
                continue
            medium = name.partition("_")[0]
            for part, x in _computed(batch[name], self._tower).items():
                (found.read if part in _READ else found.computed)[f"{medium}_{part}"] = x
            found.read[name] = batch[name]
        return found if found.read else None


def _computed(grid: torch.Tensor, tower: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What a tower computes from sizes `(media, 3)`, by the functions of transformers that it calls."""
    from transformers import vision_utils

    merged = tower["spatial_merge_size"]
    found = {
        "position_ids": vision_utils.get_vision_position_ids(grid, merged),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grid),
    }
    if "num_grid_per_side" in tower:
        found["interp_indices"], found["interp_weights"] = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower["num_grid_per_side"],
            mode=tower["interpolation_mode"],
            align_corners=tower["interpolation_align_corners"],
            spatial_merge_size=merged,
        )
    if "window_size" in tower:
        found["window_index"], found["cu_window_seqlens"] = vision_utils.get_vision_window_index(
            grid, merged, tower["window_size"], tower["patch_size"]
        )
    return found
