"""Fields of a target's config: one value for all of its layers, or an error. Loads no torch, so `--help` is instant."""

from typing import Any


_NEEDED = object()


def has_field(config, name: str) -> bool:
    """Return whether a config has a field, `null` or not, for all layers or one a layer."""
    try:
        return hasattr(config, name)
    except RuntimeError:  # as in `read_field`
        return True


def read_field(config, name: str, default: Any = _NEEDED, instead: str = "use another target") -> Any:
    """Return a field of a (text) config that is the same for all layers; `null` counts as absent given a default.

    A list of equal values, one a layer, is read as that value.

    Args:
        config: the target's text config.
        name: of the field.
        default: if the config has none, or `null`.
        instead: what to do where there is no such value, for the error.

    Raises:
        ValueError: if the layers differ in it, or it is missing and has no default.
    """
    value = _read(config, name)
    if isinstance(value, list):
        seen = list(dict.fromkeys(value))
        if len(seen) > 1:
            raise ValueError(
                f"The target is a {config.model_type}, whose layers differ in `{name}` "
                f"({', '.join(map(str, seen))}): a draft takes over one value for its own layer, and which one is not "
                f"known, so {instead}."
            )
        value = seen[0] if seen else None

    if value is not None:
        return value

    if default is _NEEDED:
        raise ValueError(
            f"The target is a {config.model_type}, whose config names no `{name}`, which a draft takes over: {instead}."
        )

    return default


def fields_of_most_layers(config, *names: str) -> tuple:
    """Return the values that most layers of a (text) config have in these fields together; `None` for a missing one.

    Layers without the first of them, such as recurrent ones in a list, are not counted. Of equally many, the first.
    """
    values = [_read(config, name) for name in names]
    layers = max((len(value) for value in values if isinstance(value, list)), default=1)
    rows = list(zip(*(value if isinstance(value, list) else [value] * layers for value in values), strict=False))

    counted = [row for row in rows if row[0]] or rows
    return max(counted, key=counted.count)


def largest_field(config, name: str) -> int:
    """Return the largest value that a layer of a (text) config has in this field; 0 if there is none."""
    value = _read(config, name)
    return max((x or 0 for x in (value if isinstance(value, list) else [value])), default=0)


def values_of_field(config, name: str) -> list:
    """Return the different values that layers of a (text) config have in this field; none if there is none."""
    value = _read(config, name)
    return [x for x in dict.fromkeys(value if isinstance(value, list) else [value]) if x]


def _read(config, name: str) -> Any:
    """Return a field, or a list of its values where each layer has its own; `None` if there is none."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers refuses to give one value of a field that each layer has for itself
        value = [getattr(layer, name, None) for layer in config.per_layer_config]
    return list(value) if isinstance(value, tuple) else value
