"""Refuse numbers in a model's config.json that no layer can use, although config classes accept them."""

import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any


def wrong_numbers(config: Mapping[str, Any], may_be_null: bool = False) -> Iterator[str]:
    """Yield each number that no layer can use, as "`field` is ..., and must be ...".

    Config classes accept these values, but the model then computes NaN or meaningless positions.

    Args:
        config: the content of a config.json, or a config's `to_dict()`.
        may_be_null: whether `rms_norm_eps` may be `null`: some targets then use the dtype's own epsilon, and
            transformers refuses it for the others.
    """
    eps = config.get("rms_norm_eps", 0)
    if not (eps is None and may_be_null) and not (_is_number(eps) and eps >= 0):
        yield f"`rms_norm_eps` is {_as_written(eps)}, and must be a number of at least 0"

    # each type of layer may have its own RoPE
    rope = config.get("rope_parameters")
    by_type = rope.items() if isinstance(rope, Mapping) else ()
    places = {"": config, "rope_parameters.": rope} | {f"rope_parameters.{kind}.": fields for kind, fields in by_type}
    for place, fields in places.items():
        theta = fields.get("rope_theta") if isinstance(fields, Mapping) else None
        if theta is not None and not (_is_number(theta) and theta > 0):
            yield f"`{place}rope_theta` is {_as_written(theta)}, and must be a number above 0"


def check_config_numbers(argument: str, path: Any, config: Mapping[str, Any], may_be_null: bool = False) -> None:
    """Raise `ValueError` for the first of [`wrong_numbers`] in a model's config.json.

    Args:
        argument, path: the argument that named the model, and its value.
    """
    for wrong in wrong_numbers(config, may_be_null):
        raise ValueError(f"`{argument}` {path}: in its config.json {wrong}: restore that of its training.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _as_written(value: Any) -> str:
    return "null" if value is None else repr(value)
