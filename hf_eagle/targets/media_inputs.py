"""Images and videos in front of a target: which arguments carry them, and where their tokens stand.

A model with m-RoPE gives every token three positions (time, height, width). They come from the model's own
`get_rope_index`, on the ids as they are: shifted ids put every image one token off.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


# arguments of a target's forward that carry media
MEDIA = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "mm_token_type_ids",
    "second_per_grid_ts",
)
GRIDS = ("image_grid_thw", "video_grid_thw")


def media_arguments(model: PreTrainedModel) -> tuple[str, ...]:
    """Those of `MEDIA` that a model's forward takes by name; it drops what it takes as `**kwargs`."""
    parameters = inspect.signature(model.forward).parameters
    return tuple(name for name in MEDIA if name in parameters)


def check_media(model: PreTrainedModel, names) -> None:
    """Refuse media that the model ignores.

    Raises:
        ValueError: naming the first argument that its forward does not take.
    """
    asked = [name for name in names if name in MEDIA]
    taken = media_arguments(model) if asked else ()  # forwards of text need not pay for reading a signature

    for name in asked:
        if name not in taken:
            raise ValueError(
                f"The batch holds `{name}`, which the forward of {type(model).__name__} does not take "
                f"({'it takes ' + ', '.join(taken) if taken else 'it takes no media'}): the target would train a draft "
                "on media that it never saw. Use a target and a processor that belong together."
            )


def shows_media(inputs: dict) -> bool:
    """Return whether a forward's arguments hold an image or a video."""
    return any(inputs.get(name) is not None for name in GRIDS)


def has_mrope(config) -> bool:
    """Return whether a (text) config rotates by three positions a token."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return bool(rope.get("mrope_section"))


def deepstack_layers(config) -> int:
    """After how many of the first decoder layers image features are added again (Qwen3-VL)."""
    return len(getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ())


def rope_index(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **media
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Positions of a batch with media, computed by the model itself.

    Args:
        model: the target.
        input_ids: `(batch, length)`, not shifted.
        attention_mask: `(batch, length)`, 0 on padding.
        media: its forward's other arguments.

    Returns:
        Positions `(3, batch, length)`, and how far the text after the last medium is shifted against plain counting,
        `(batch,)`; `None` for a batch without media, or a model that counts all tokens alike.

    Raises:
        ValueError: if `mm_token_type_ids` is missing.
    """
    of_model = _with_rope_index(model)
    if of_model is None or not shows_media(media):
        return None

    if media.get("mm_token_type_ids") is None:
        raise ValueError(
            f"The batch holds media but no `mm_token_type_ids`, by which {type(model).__name__} finds their places: "
            "pass on all that its processor returns."
        )

    taken = inspect.signature(of_model.get_rope_index).parameters
    given = {name: x for name, x in media.items() if name in taken and x is not None}
    positions, moved = of_model.get_rope_index(input_ids, attention_mask=attention_mask, **given)
    return positions, moved.flatten().to(positions.device)


def _with_rope_index(model: PreTrainedModel) -> nn.Module | None:
    """The model, or the one inside it, that knows the positions of media; `None` if all tokens count alike."""
    return next((m for m in (model, getattr(model, "model", None)) if hasattr(m, "get_rope_index")), None)


class RopeIndex:
    """A target's `rope_index` for whoever makes batches: it holds the model's config, and none of its weights.

    It reads the sizes of every medium, so on a device it waits dozens of times.

    Args:
        model: the target.
    """

    def __init__(self, model: PreTrainedModel):
        of_model, self._alone = _with_rope_index(model), None
        if of_model is not None:
            self._alone = type(of_model).__new__(type(of_model))
            nn.Module.__init__(self._alone)
            self._alone.config = of_model.config

    def __call__(self, batch: Mapping[str, Any]) -> torch.Tensor | None:
        """Positions `(3, batch, length)` of a batch with media, else `None`; also for a model that needs its layers."""
        media = {name: batch[name] for name in MEDIA if name in batch}
        if self._alone is None or not shows_media(media):
            return None

        try:
            found = rope_index(self._alone, batch["input_ids"], batch.get("attention_mask"), **media)
        except AttributeError:
            return None
        return None if found is None else found[0]
