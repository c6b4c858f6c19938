"""Find the parts of any causal language model that features are taken from, by what they do rather than by name."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


# parts of the names of norms that have the right width, but belong to something else
_OF_SOMETHING_ELSE = ("embed", "proj", "per_layer")


@dataclass
class DecoderParts:
    """The modules of a target that features are taken from."""

    layers: nn.ModuleList
    final_norm: nn.Module
    head: nn.Module


def find_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return the module that holds the decoder layers.

    Some models name themselves (Llama 4's text model) or their head (ModernBERT's decoder) as their decoder, and
    Llama 4's model of images names its text model with head and all.
    """
    decoder = model.get_decoder()
    if decoder is not model and hasattr(decoder, "lm_head"):
        return find_decoder(decoder)
    if decoder is model or not any(decoder.children()):
        return model.base_model if model.base_model is not model else getattr(model, "model", decoder)
    return decoder


def find_decoder_parts(model: PreTrainedModel) -> DecoderParts:
    """Return decoder layers, final norm and head of a causal language model, found through its decoder.

    The layers are its list of modules: if there are several, the only one with as many as the config counts and with
    parameters. The final norm is its own norm over the hidden size that is not named after another thing. The first
    forward shows whether what it returns is what the head is given, see `check_teacher`.

    Raises:
        ValueError: if they are not found, or if the head or the embedding has other tokens than the vocabulary; the
            message names the model and what was seen.
    """
    decoder = find_decoder(model)
    text, head = model.config.get_text_config(), model.get_output_embeddings()
    layers, norms = _layers(decoder, text), _norms(decoder, text)

    missing = [] if layers is not None else ["no single list of decoder layers"]
    missing += [] if len(norms) == 1 else [f"{len(norms) or 'no'} norm{'s' * bool(norms)} that may be the final one"]
    missing += [] if head is not None else ["no output head"]
    if missing:
        seen = ", ".join(name for name, _ in decoder.named_children())
        raise ValueError(
            f"The target {type(model).__name__} ({model.config.model_type}) cannot be tapped: its decoder "
            f"{type(decoder).__name__} has {' and '.join(missing)} (it holds {seen}), and a draft reads between its "
            "layers and behind its final norm, so use another target."
        )

    _check_vocabulary(model, head)
    return DecoderParts(layers=layers, final_norm=norms[0], head=head)


def _check_vocabulary(model: PreTrainedModel, head: nn.Module) -> None:
    """Refuse a target whose embedding or head has other tokens than its vocabulary: a draft has one table for each."""
    tokens = model.config.get_text_config().vocab_size
    rows = {
        "embedding table": getattr(model.get_input_embeddings(), "num_embeddings", None),
        "output head": getattr(head, "out_features", None),
    }

    other = next((part for part, n in rows.items() if n not in (None, tokens)), None)
    if other is not None:
        raise ValueError(
            f"The target {type(model).__name__} ({model.config.model_type}) has {rows[other]} tokens in its {other} "
            f"and {tokens} in its `vocab_size`, but a draft has as many in all of them, so use another target."
        )


def _layers(decoder: nn.Module, config) -> nn.ModuleList | None:
    lists = [x for x in decoder.children() if isinstance(x, nn.ModuleList) and any(True for _ in x.parameters())]
    counted = [x for x in lists if len(x) == getattr(config, "num_hidden_layers", None)]
    found = lists if len(lists) == 1 else counted
    return found[0] if len(found) == 1 else None


def _norms(decoder: nn.Module, config) -> list[nn.Module]:
    """Return norms over the hidden size that the decoder itself holds; some have no weight (OLMo)."""
    width = [getattr(config, "hidden_size", None)]
    found = {
        name: module
        for name, module in decoder.named_children()
        if "norm" in type(module).__name__.lower()
        and not any(module.children())
        and all(list(x.shape) == width for x in module.parameters())
    }

    others = [name for name in found if any(word in name for word in _OF_SOMETHING_ELSE)]
    if len(found) - len(others) == 1:
        found = {name: module for name, module in found.items() if name not in others}
    return list(found.values())
