"""What is known of target families: where they keep what the taps need, what they do to logits, how they attend."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel


_LAYERS = ("layers", "h", "blocks")
_FINAL_NORM = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


@dataclass
class DecoderParts:
    """The modules of a target which features are taken from."""

    layers: nn.ModuleList
    final_norm: nn.Module
    head: nn.Module


def find_decoder_parts(model: PreTrainedModel) -> DecoderParts:
    """Decoder layers, final norm and head of a causal language model, found through `get_decoder()`.

    Raises:
        ValueError: if the model does not expose them under a known name; the message lists what was seen.
    """
    decoder = model.get_decoder()
    layers = next((getattr(decoder, name) for name in _LAYERS if hasattr(decoder, name)), None)
    norm = next((getattr(decoder, name) for name in _FINAL_NORM if hasattr(decoder, name)), None)
    head = model.get_output_embeddings()
    if layers is None or norm is None or head is None:
        seen = ", ".join(name for name, _ in decoder.named_children())
        raise ValueError(
            f"The target {type(model).__name__} cannot be tapped: its decoder {type(decoder).__name__} holds {seen}, "
            f"but the layers ({'/'.join(_LAYERS)}), the final norm ({'/'.join(_FINAL_NORM)}) and an output head are "
            "needed."
        )
    return DecoderParts(layers=layers, final_norm=norm, head=head)


def logit_transform(config) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a target's `forward` does to its head's output (scaling, soft cap), read from its text config."""
    divide = getattr(config, "logits_scaling", None)
    multiply = getattr(config, "logit_scale", None)
    cap = getattr(config, "final_logit_softcapping", None)

    def transform(logits: torch.Tensor) -> torch.Tensor:
        if divide is not None:
            logits = logits / divide
        if multiply is not None:
            logits = logits * multiply
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return transform


def default_tap_ids(num_layers: int) -> list[int]:
    """Entry ids both servers use when a config names none: `(2, N // 2, N - 3)` for a target of `N` layers.

    Raises:
        ValueError: if the target is too shallow for three different taps; the message lists ids that would do.
    """
    ids = [2, num_layers // 2, num_layers - 3]
    if ids != sorted(set(ids)):
        usable = sorted({0, num_layers // 2, num_layers})
        raise ValueError(
            f"The default taps (2, N // 2, N - 3) need a target of at least 7 layers, this one has {num_layers}: "
            f"pass `tap_ids`, for example {','.join(map(str, usable))}."
        )
    return ids


def check_tap_ids(tap_ids: list[int], num_layers: int) -> list[int]:
    """Ascending, unique entry ids in `0..num_layers`, or a `ValueError` that says which one is wrong."""
    tap_ids = [int(i) for i in tap_ids]
    outside = [i for i in tap_ids if not 0 <= i <= num_layers]
    if outside or not tap_ids:
        raise ValueError(
            f"`tap_ids` must be entry ids between 0 and {num_layers} (the target has {num_layers} layers; id k is the "
            f"input of layer k, id {num_layers} the input of the final norm), got {tap_ids}."
        )
    if tap_ids != sorted(set(tap_ids)):
        raise ValueError(
            f"`tap_ids` must be ascending and unique because vLLM sorts and de-duplicates them, got {tap_ids}: "
            f"use {sorted(set(tap_ids))}."
        )
    return tap_ids
