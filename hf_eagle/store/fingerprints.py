"""Identify a target whose features are stored, and reduce it to its head."""

import hashlib
import json

import torch
from torch import nn
from transformers import PreTrainedModel

from ..targets.ends import DroppedLayer
from ..targets.sharding import gathered
from ..targets.target import FrozenTarget


_SAMPLES = 64  # numbers hashed per weight
# config fields that do not change what the model computes
_NAMELESS = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache")


def target_fingerprints(target: FrozenTarget) -> dict[str, str]:
    """Return hashes of a target's `config` and `weights`, 16 hex digits each; it must still have its layers.

    The hash of `weights` depends on every weight's name, shape and 64 of its numbers. So a different fine-tune of the
    same model has a different hash.
    """
    config = {k: v for k, v in target.model.config.to_diff_dict().items() if k not in _NAMELESS}

    weights = hashlib.sha256()
    for name, weight in sorted(target.model.named_parameters()):
        weight = gathered(weight)
        generator = torch.Generator().manual_seed(weight.numel())
        places = torch.randint(weight.numel(), (_SAMPLES,), generator=generator)
        numbers = weight.detach().flatten()[places.to(weight.device)].cpu()
        weights.update(f"{name} {tuple(weight.shape)}".encode() + numbers.view(torch.uint8).numpy().tobytes())

    return {
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "weights": weights.hexdigest()[:16],
    }


def drop_layers(target: FrozenTarget) -> None:
    """Free the memory of the decoder's layers and of models beside it, as vision towers; keep its ends."""
    why = "were dropped since all features are stored: load it again."
    for place in range(target.num_layers):
        target.parts.layers[place] = DroppedLayer(why)

    for holder in (target.model, getattr(target.model, "model", None)):
        for name, part in list(holder.named_children()) if isinstance(holder, nn.Module) else ():
            if isinstance(part, PreTrainedModel) and all(module is not target.decoder for module in part.modules()):
                setattr(holder, name, DroppedLayer(why))
