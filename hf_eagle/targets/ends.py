"""The ends of a target alone: its embedding, its final norm and its head, without the layers between them.

That is all a draft's training needs of a target whose features come from elsewhere.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..door.reading import reading
from .adapters import to_the_base
from .decoder_parts import find_decoder, find_decoder_parts
from .loading import auto_class, check_kind, load_config, takes_media
from .weights import check_sizes, load_whole, stored_shapes


class DroppedLayer(nn.Module):
    """Stands where a layer was, and takes no memory.

    Args:
        why: there is none, as the rest of a sentence that begins with "This target's layers".
    """

    attention_type = "full_attention"

    def __init__(self, why: str):
        super().__init__()
        self.why = why

    def forward(self, *args, **kwargs):
        raise RuntimeError(f"This target's layers {self.why}")


def load_ends(
    name_or_path: str,
    dtype: str | torch.dtype = "auto",
    revision: str = "main",
    trust_remote_code: bool = False,
    argument: str = "target",
) -> PreTrainedModel:
    """Load a model's embedding, final norm and head; no other weight is read from its files.

    The weights of a quantised model's ends are read as they are: formats quantise the layers, and leave these out.

    Args:
        name_or_path, revision, trust_remote_code, argument: as in [`load_causal_lm`].
        dtype: `"auto"` keeps the checkpoint's.

    Returns:
        The model, with a [`DroppedLayer`] in place of each layer, and its parts in the attribute `ends`.

    Raises:
        ValueError: for an adapter, a target that takes images, and a quantised head.
        OSError: if there is no such model.
    """
    adapters, _, _ = to_the_base(name_or_path, revision, argument)
    if adapters:
        raise ValueError(
            f"`{argument}` {name_or_path} is an adapter, which changes the layers that run in the server: merge it "
            "into a folder, serve that, and name it here."
        )

    config = load_config(name_or_path, revision, trust_remote_code, argument)
    check_kind(argument, name_or_path, config)
    if takes_media(name_or_path, revision, trust_remote_code=trust_remote_code):
        raise ValueError(
            f"`{argument}` {name_or_path} takes images, and `target_url` sends a server token ids alone: train beside "
            "the whole target, without `target_url`."
        )

    # what the quantiser would do is for the layers, and may need a device that is not here
    alone, quantized = copy.deepcopy(config), getattr(config, "quantization_config", None)
    if quantized is not None:
        del alone.quantization_config

    options = {"revision": revision, "dtype": dtype, "config": alone}
    with reading(argument, name_or_path):
        check_sizes(argument, name_or_path, config, stored_shapes(argument, name_or_path, revision))
        kind = _without_layers(_class_of(config, trust_remote_code))
        try:
            model = load_whole(kind, name_or_path, argument, **options)
        except ValueError as problem:
            if quantized is None:
                raise
            raise ValueError(
                f"`{argument}` {name_or_path} is quantised, also at its ends ({str(problem).rstrip('.')}): serve "
                "one whose embedding and head are stored as plain numbers."
            ) from problem

    if quantized is not None:
        model.config.quantization_config = quantized
    return model


def _class_of(config: Any, trust_remote_code: bool) -> type[PreTrainedModel]:
    """The class of a config's model, which the Auto classes choose while they build it, here without memory."""
    with torch.device("meta"):
        return type(auto_class(config).from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code))


def _without_layers(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The same class, whose models are built with their ends alone: then nothing else is looked for in the files."""

    class Ends(kind):
        _keys_to_ignore_on_load_unexpected = [r"."]  # noqa: RUF012 - so is the library's

        def __init__(self, config, *arguments, **options):
            super().__init__(config, *arguments, **options)
            self.ends = find_decoder_parts(self)
            _drop_all_but_ends(self)

    # transformers looks up how weights are renamed by the names of classes
    Ends.__name__, Ends.__qualname__, Ends.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Ends


def _drop_all_but_ends(model: PreTrainedModel) -> None:
    why = "run in the server that `target_url` names: ask it for features instead."
    for place in range(len(model.ends.layers)):
        model.ends.layers[place] = DroppedLayer(why)

    kept = {model.get_input_embeddings(), model.ends.final_norm, model.ends.head}
    decoder = find_decoder(model)
    for name, child in list(decoder.named_children()):
        if not kept.intersection(child.modules()) and any(True for _ in child.parameters()):
            setattr(decoder, name, DroppedLayer(why))
