"""Read JSON and check its form; errors name the file and the field."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    NoneType: "null",
}


def read_json(
    path: str | os.PathLike, fields: Mapping[str, Any] | None = None, mend: str = "restore it, or write it anew"
) -> Any:
    """Return the value in a JSON file.

    Args:
        path: the file.
        fields: the fields of the object that it must hold, as for `check_fields`; without them, any value is accepted.
        mend: what to do about a broken file, an imperative.

    Raises:
        ValueError: if the file cannot be read, or does not hold these fields; the message names its path.
    """
    if is_special(path):
        raise ValueError(f"{path} is no ordinary file: {mend}.")

    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        found = json.loads(text)
        if "\\ud" in text.lower():  # half a surrogate pair, which JSON can spell but UTF-8 cannot encode
            json.dumps(found, ensure_ascii=False).encode()
    except OSError as problem:
        raise ValueError(f"{path} cannot be read ({problem.strerror or problem}): {mend}.") from problem
    except UnicodeDecodeError as problem:
        byte = f"byte {problem.start} is 0x{problem.object[problem.start]:02x}"
        raise ValueError(f"{path} is not UTF-8 ({byte}): {mend}.") from problem
    except ValueError as problem:
        raise ValueError(f"{path} cannot be read as JSON ({problem}): {mend}.") from problem
    except RecursionError as problem:
        raise ValueError(f"{path} cannot be read as JSON (nested too deeply): {mend}.") from problem

    if fields is not None:
        check_fields(found, fields, path, mend)
    return found


def is_special(path: str | os.PathLike) -> bool:
    """Return whether this is a pipe, a device or the like, from which a read may never return."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def check_fields(
    found: Any, fields: Mapping[str, Any], where: str | os.PathLike, mend: str = "restore it, or write it anew"
) -> None:
    """Check that `found`, as parsed from JSON, is an object with these fields; it may hold others.

    Args:
        found: the value.
        fields: the form of each field, by name; a field whose name ends in `?` may be missing. A form is a type or a
            union of types, `[form]` for a list, `{str: form}` for an object with any names, or fields again for an
            object with these. `float` accepts whole numbers too, `object` accepts anything.
        where: the value's name in an error, for instance its file.
        mend: what to do about the error, an imperative.

    Raises:
        ValueError: naming the missing fields, or the first field with a value of the wrong form.

    Example:
        >>> check_fields({"steps": [{"loss": "low"}]}, {"steps": [{"loss": float, "rate?": float}]}, "state.json")
        ValueError: state.json must hold a number as `steps[0].loss`, but holds text: restore it, or write it anew.
    """
    problem = _problem(found, fields, "")
    if problem is not None:
        raise ValueError(f"{where} {problem}: {mend}.")


def _problem(value: Any, form: Any, place: str) -> str | None:
    """Return why a value does not have a form, as the rest of a sentence; `None` if it has."""
    if get_origin(form) in (Union, UnionType):
        fitting = [part for part in get_args(form) if _is_a(value, part)]
        return _problem(value, fitting[0], place) if fitting else _wrong(value, form, place)
    if not _is_a(value, form):
        return _wrong(value, form, place)

    inner = _inner(form)
    if inner is not None:
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        problems = (_problem(one, inner, f"{place}[{key!r}]") for key, one in inside)
    elif isinstance(form, Mapping):
        problems = _field_problems(value, form, f"{place}." if place else "")
    else:
        return None

    return next((problem for problem in problems if problem is not None), None)


def _field_problems(value: dict, fields: Mapping, place: str) -> Iterator[str | None]:
    missing = [f"`{place}{name}`" for name in fields if name not in value and not name.endswith("?")]
    if missing:
        yield f"lacks {', '.join(missing)}"

    for name, form in fields.items():
        key = name.removesuffix("?")
        if key in value:
            yield _problem(value[key], form, f"{place}{key}")


def _wrong(value: Any, form: Any, place: str) -> str:
    return f"must hold {_said(form)}{f' as `{place}`' if place else ''}, but holds {_said(type(value))}"


def _is_a(value: Any, form: Any) -> bool:
    """Return whether a value has the type of a form; its contents are not checked."""
    outer = _outer(form)
    if isinstance(value, bool):  # to Python, a bool is an int
        return outer in (bool, object)
    return isinstance(value, (int, float) if outer is float else outer)


def _outer(form: Any) -> type:
    if isinstance(form, Mapping):
        return dict
    return list if isinstance(form, list) else get_origin(form) or form


def _inner(form: Any) -> Any:
    """Return the form of a list's items, or of the values in an object with any names; `None` for other forms."""
    if isinstance(form, list):
        return form[0]
    return form.get(str) if isinstance(form, Mapping) else next(reversed(get_args(form)), None)


def _said(form: Any) -> str:
    if get_origin(form) in (Union, UnionType):
        return " or ".join(map(_said, get_args(form)))
    return _NAMES.get(_outer(form), _outer(form).__name__)
