"""Fields of a target's config: one value for all of its layers, or an error. Loads no torch, so `--help` is instant."""

import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any


_NEEDED = object()


def has_field(config, name: str) -> bool:
    """Whether a config has a field, `null` or not, for all layers or one a layer."""
    try:
        return hasattr(config, name)
    except RuntimeError:  # as in `read_field`
        return True


def read_field(config, name: str, default: Any = _NEEDED) -> Any:
    """A field of a (text) config that is the same for all layers; `null` counts as absent if there is a default.

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


def wrong_numbers(config: Mapping[str, Any], may_be_null: bool = False) -> Iterator[str]:
    """What is wrong with the numbers that a layer computes with, each as "`field` is ..., and must be ...".

    Config classes accept these values, and the model then gives NaN, or positions that mean nothing.

    Args:
        config: the content of a config.json, or a config's `to_dict()`.
        may_be_null: whether `rms_norm_eps` may be `null`: some models take the dtype's own for it.
    """
    eps = config.get("rms_norm_eps", 0)
    if not (eps is None and may_be_null) and not (_is_number(eps) and eps >= 0):
        yield f"`rms_norm_eps` is {_as_written(eps)}, and must be a number of at least 0"

    # each type of layer may have RoPE of its own
    rope = config.get("rope_parameters")
    by_type = rope.items() if isinstance(rope, Mapping) else ()
    places = {"": config, "rope_parameters.": rope} | {f"rope_parameters.{kind}.": fields for kind, fields in by_type}
    for place, fields in places.items():
        theta = fields.get("rope_theta") if isinstance(fields, Mapping) else None
        if theta is not None and not (_is_number(theta) and theta > 0):
            yield f"`{place}rope_theta` is {_as_written(theta)}, and must be a number above 0"


def check_numbers(argument: str, path: Any, config: Mapping[str, Any], may_be_null: bool = False) -> None:
    """`ValueError` for the first of [`wrong_numbers`] in a model's config.json.

    Args:
        argument, path: that named the model.
    """
    for wrong in wrong_numbers(config, may_be_null):
        raise ValueError(f"`{argument}` {path}: in its config.json {wrong}: restore what it was trained with.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _as_written(value: Any) -> str:
    return "null" if value is None else repr(value)
