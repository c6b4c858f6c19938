"""Images and videos in front of a target: which arguments carry them, and where their tokens stand.

A model with m-RoPE gives every token three positions (time, height, width). They come from the model's own
`get_rope_index`, on the ids as they are: shifted ids put every image one token off. All others count tokens.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class MediaForm:
    """What the forward of a type of target takes of images and videos, by the names that its processor gives them.

    Attributes:
        arguments: what holds the media and their sizes.
        types: the argument that says which tokens stand for media. `None` if the model needs only their ids.
        lacking: fields that its forward reads of its text model's output, which has none in some versions of
            transformers.
    """

    arguments: tuple[str, ...]
    types: str | None = None
    lacking: tuple[str, ...] = ()


_GRIDS_OF_QWEN = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
_QWEN = MediaForm(_GRIDS_OF_QWEN, "mm_token_type_ids")

# by the config's `model_type`; media are shown to no other target, since an argument that a forward takes may be one
# that it ignores (`image_sizes` in InternVL's)
FORMS = {
    "qwen2_5_vl": MediaForm((*_GRIDS_OF_QWEN, "second_per_grid_ts"), "mm_token_type_ids"),
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    # its tokens of one image see each other both ways
    "gemma3": MediaForm(("pixel_values",), "token_type_ids"),
    # so they do in its layers with a window, if `use_bidirectional_attention` is "vision"
    "gemma4": MediaForm(
        ("pixel_values", "image_position_ids", "pixel_values_videos", "video_position_ids", "num_frames_per_video"),
        "mm_token_type_ids",
    ),
    "llama4": MediaForm(("pixel_values",), lacking=("image_outputs",)),  # 5.24
    "mistral3": MediaForm(("pixel_values", "image_sizes")),
    "internvl": MediaForm(("pixel_values",)),  # the frames of its videos too
}

TYPES = tuple(dict.fromkeys(form.types for form in FORMS.values() if form.types))
# arguments of a target's forward that carry media
MEDIA = (*dict.fromkeys(name for form in FORMS.values() for name in form.arguments), *TYPES)
GRIDS = ("image_grid_thw", "video_grid_thw")
_PIXELS = ("pixel_values", "pixel_values_videos")


def media_arguments(model: PreTrainedModel) -> tuple[str, ...]:
    """The arguments by which a model is shown media, none if it is of no type in `FORMS`.

    What its forward does not take by name is left out: older versions of transformers drop that as `**kwargs`.
    """
    form = FORMS.get(model.config.model_type)
    if form is None:
        return ()
    parameters = inspect.signature(model.forward).parameters
    return tuple(name for name in (*form.arguments, form.types) if name in parameters)


def why_not_shown(config) -> str | None:
    """Why media cannot be shown to a target, `None` if they can."""
    if config.model_type in FORMS:
        has_part = getattr(config, "vision_config", None) is not None
        return None if has_part else f"its config is that of a {config.model_type} without `vision_config`"
    return f"images and videos are shown to targets of the types {', '.join(FORMS)}, and it is a {config.model_type}"


def complete_text_output(model: PreTrainedModel) -> None:
    """Give the output of a model's text part the fields that the model reads of it, without which no forward ends."""
    lacking = FORMS[model.config.model_type].lacking if model.config.model_type in FORMS else ()
    text = getattr(model, "language_model", None)
    if not lacking or text is None:
        return

    def complete(module, args, output):
        for name in lacking:
            if not isinstance(output, tuple) and not hasattr(output, name):
                setattr(output, name, None)

    text.register_forward_hook(complete)


def check_media(model: PreTrainedModel, names) -> None:
    """Refuse media that the model ignores, and those without the argument that says where they stand.

    Raises:
        ValueError: naming the model, and the first argument that its forward does not take, or that is missing.
    """
    asked = [name for name in names if name in MEDIA]
    if not asked:
        return

    why = why_not_shown(model.config)
    if why is not None:
        raise ValueError(
            f"The batch holds `{asked[0]}`, which {type(model).__name__} cannot be shown ({why}): use another target, "
            "or leave such records out."
        )

    taken = media_arguments(model)
    for name in asked:
        if name not in taken:
            raise ValueError(
                f"The batch holds `{name}`, which the forward of {type(model).__name__} does not take (it takes "
                f"{', '.join(taken)}): the target would train a draft on media that it never saw. Use a target and a "
                "processor that belong together."
            )

    types = FORMS[model.config.model_type].types
    if types is not None and types not in asked and any(name in asked for name in _PIXELS):
        raise _without_types(model, types)


def _without_types(model: nn.Module, types: str) -> ValueError:
    return ValueError(
        f"The batch holds media but no `{types}`, by which {type(model).__name__} finds their places: pass on all that "
        "its processor returns."
    )


def shows_media(inputs: Mapping[str, Any]) -> bool:
    """Return whether a forward's arguments hold an image or a video."""
    return any(inputs.get(name) is not None for name in (*GRIDS, *_PIXELS))


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
        raise _without_types(model, "mm_token_type_ids")

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
