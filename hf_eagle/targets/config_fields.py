"""Fields of a target's config: one value for all of its layers, or an error. Loads no torch, so `--help` is instant."""

from typing import Any


_NEEDED = object()


def has_field(config, name: str) -> bool:
    """Return whether a config has a field, `null` or not, for all layers or one a layer."""
    try:
        return hasattr(config, name)
    except RuntimeError:  # as in `read_field`
        return True


def read_field(config, name: str, default: Any = _NEEDED) -> Any:
    """Return a field of a (text) config that is the same for all layers; `null` counts as absent given a default.

    A list of equal values, one a layer, is read as that value.

    Args:
        config: the target's text config.
        name: of the field.
        default: if the config has none, or `null`.

    Raises:
        ValueError: if the layers differ in it, or it is missing and has no default.
    """
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers refuses to give one value of a field that each layer has for itself
        value = [getattr(layer, name, None) for layer in config.per_layer_config]

    if isinstance(value, list | tuple):
        seen = list(dict.fromkeys(value))
        if len(seen) > 1:
            raise ValueError(
                f"The target is a {config.model_type}, whose layers differ in `{name}` "
                f"({', '.join(map(str, seen))}): a draft takes over one value for its own layer, and which one is not "
                "known, so use another target."
            )
        value = seen[0] if seen else None

    if value is not None:
        return value

    if default is _NEEDED:
        raise ValueError(
            f"The target is a {config.model_type}, whose config names no `{name}`, which a draft takes over: use "
            "another target."
        )

    return default
