"""Recognise experts that are stored transposed, also where a rank reads only its share of them.

Those of Qwen3-VL-MoE are published as `(experts, in, out)`. Today's `save_pretrained` writes them as the model has
them, `(experts, out, in)`. transformers tells the two apart by the shape of the whole weight. A rank's share never has
that shape, so transformers 5.24 transposes it in either case.
"""

from collections.abc import Iterator
from typing import Any

from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose

from .weights import stored_shapes


def recognise_turned_shares(config: PreTrainedConfig) -> None:
    """Make `from_pretrained` compare a rank's share with the share that it needs, for models of this config.

    Loading whole models does not change. Needs a transformers that can spread a model.
    """
    for model_type, converters, turning in _mappings(config):
        for converter in turning:
            converter.operations = [_of_share(op) if _compares_shapes(op) else op for op in converter.operations]
        register_checkpoint_conversion_mapping(model_type, converters, overwrite=True)


def refuse_turned_experts(config: PreTrainedConfig, name_or_path: str, revision: str = "main") -> None:
    """Refuse transposed experts where ranks share each of them: they would be cut along the wrong axis.

    Raises:
        ValueError: if the files are on this machine and hold such experts.
    """
    if not any(_mappings(config)):
        return

    hidden, shapes = config.get_text_config().hidden_size, stored_shapes("target", name_or_path, revision)
    if any(shape[1] != hidden for name, shape in shapes.items() if name.endswith("mlp.experts.down_proj")):
        raise ValueError(
            f"`target_sharding` is tensor, but `target` {name_or_path} holds its experts transposed, as they were "
            "published, and transformers cannot then read a part of each: use expert or fsdp2, or load the target once "
            "with `from_pretrained`, write it with `save_pretrained`, and name that folder."
        )


def _mappings(config: PreTrainedConfig) -> Iterator[tuple[str, list, list]]:
    """For a model and those inside it: type, converters of its files, and those of them that compare shapes."""
    for model_type in _model_types(config):
        converters = get_checkpoint_conversion_mapping(model_type) or []
        turning = [one for one in converters if any(map(_compares_shapes, getattr(one, "operations", ())))]

        if turning:
            yield model_type, converters, turning


def _model_types(config: PreTrainedConfig) -> Iterator[str]:
    """The types of a model and those inside it."""
    yield config.model_type
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from _model_types(getattr(config, name))


def _compares_shapes(operation: Any) -> bool:
    return getattr(operation, "check_dims", False)


def _of_share(operation: Any) -> "TransposeShare":
    return TransposeShare(operation.dim0, operation.dim1, check_dims=True)


class TransposeShare(Transpose):
    """transformers' operation, also for a rank's share of a weight."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        """Called by transformers; leave a share as it is if it has the needed shape."""
        weight = kwargs["model"].get_parameter(kwargs["full_layer_name"])
        (read,) = input_dict.values()
        read = read[0] if isinstance(read, list) else read

        if isinstance(weight, DTensor) and read.shape == weight.to_local().shape:
            return {self.get_target_pattern(input_dict, source_patterns, target_patterns): read}
        return super().convert(input_dict, source_patterns, target_patterns, **kwargs)
