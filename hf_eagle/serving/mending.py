"""The steps that mend a draft in memory. `kinds/` says which steps a kind takes, and with what."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..door.config_readings import window_keys
from . import rules_sglang
from .draft_folder import TargetFacts
from .rules_folder import rope_of
from .windows import trained_window


@dataclass
class Draft:
    """A draft in memory, being mended.

    Attributes:
        config: content of `config.json`, changed by the steps.
        tensors: by their names in the file, changed by the steps.
        num_layers: number of layers that have tensors.
        target: the target's properties; `None` if no target was named.
        done: one line per repair.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    num_layers: int
    target: TargetFacts | None
    done: list[str] = field(default_factory=list)

    def write(self, name: str, value: Any) -> None:
        """Set a field of the config and record it, unless it has this value already."""
        if name not in self.config or self.config[name] != value:
            self.done.append(
                f"`{name}` is {json.dumps(value)} now, it was {json.dumps(self.config.get(name, 'missing'))}"
            )
            self.config[name] = value


def rename(draft: Draft, new_name: Callable[[str], str], why: str) -> None:
    """Rename tensors, unless two of them would get the same name."""
    renamed = {new_name(name): tensor for name, tensor in draft.tensors.items()}
    if renamed.keys() != draft.tensors.keys() and len(renamed) == len(draft.tensors):
        draft.done.append(why)
        draft.tensors = renamed


def names(draft: Draft) -> None:
    """Remove the prefix of a whole language model."""
    rename(draft, lambda name: name.removeprefix("model."), "`model.` was removed from the names of tensors")


def drop_surplus(draft: Draft, wanted: Collection[str]) -> None:
    """Remove tensors that no server has a parameter for; `wanted` are the parameters, with layer 0 as `layers.0.`."""
    for name in [name for name in draft.tensors if name.replace("midlayer.", "layers.0.") not in wanted]:
        biased = name.endswith(".bias") and draft.tensors[name].any()
        inside = name.startswith(("layers.", "midlayer.")) and not name.endswith(".bias")
        if biased or inside or "norm" in name:
            continue  # training may have used it, and without it the draft computes something else

        del draft.tensors[name]
        draft.done.append(f"`{name}` was removed: no server has a parameter for it")


def classes(draft: Draft, architectures: Sequence[str], model_types: Sequence[str]) -> None:
    """Name the classes that run such a draft, and the first model type that is read as one."""
    if not set(architectures) <= set(draft.config.get("architectures") or []):
        draft.write("architectures", list(architectures))
    if draft.config.get("model_type") not in model_types:
        draft.write("model_type", model_types[0])


def layers_and_context(draft: Draft) -> None:
    """Set the number of layers that have tensors, and give the draft the target's context."""
    draft.write("num_hidden_layers", draft.num_layers)
    if draft.target is not None:
        needed = max(draft.target.max_positions, rules_sglang.needed_positions(draft.config, draft.target))
        positions = draft.config.get("max_position_embeddings")
        if not isinstance(positions, int) or positions < needed:
            draft.write("max_position_embeddings", needed)


def window(draft: Draft) -> None:
    """Write the window of training, or one as long as the context if vLLM would else give the draft the target's."""
    target, trained = draft.target, trained_window(draft.config)
    if trained is not None:
        keys = window_keys(trained)
    elif target is not None and target.window is not None and "layer_types" not in draft.config:
        keys = window_keys(max(target.max_positions, draft.config["max_position_embeddings"]))
    else:
        return
    for name, value in keys.items():
        draft.write(name, value)


def rope(draft: Draft) -> None:
    """Write RoPE in both spellings, if it is known what was trained."""
    config = draft.config
    new, old = rope_of(config, "new"), rope_of(config, "old")
    theta, scaling = new if config.get("rope_parameters") else old
    theta = old[0] if theta is None else theta
    if theta is None or (None not in (new[0], old[0]) and new != old):
        return  # the base is lost, or the spellings disagree

    draft.write("rope_parameters", {"rope_type": "default", **scaling, "rope_theta": theta})
    draft.write("rope_theta", theta)
    draft.write("rope_scaling", scaling or None)


def dtypes(draft: Draft) -> None:
    """Convert all tensors to the dtype that most of the numbers have."""
    held: dict[torch.dtype, int] = {}
    for tensor in draft.tensors.values():
        if tensor.is_floating_point():
            held[tensor.dtype] = held.get(tensor.dtype, 0) + tensor.numel()
    most = max(held, key=lambda dtype: held[dtype])

    for name, tensor in draft.tensors.items():
        if tensor.is_floating_point() and tensor.dtype != most:
            draft.tensors[name] = tensor.to(most)
            draft.done.append(f"`{name}` was converted to the others' dtype")
    for name in ("dtype", "torch_dtype"):
        draft.write(name, str(most).removeprefix("torch."))


def fields(draft: Draft) -> None:
    """Remove fields from the config that no draft has."""
    config = draft.config
    draft.write("tie_word_embeddings", False)
    for name in ("attention_bias", "mlp_bias", "bias", "qkv_bias"):
        if config.get(name):  # tensors of biases are gone by now
            draft.write(name, False)
    for name in ("use_cache", "logit_scale"):
        if name in config and config[name] in (False, None):
            del config[name]
            draft.done.append(f"`{name}` was removed")
