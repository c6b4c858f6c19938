"""Find recipes, card templates and scripts: a wheel has them inside the package, a clone next to it."""

import difflib
import os
from pathlib import Path


PACKAGE = Path(__file__).parent
_IN_WHEEL = {"scripts": "commands/scripts"}


def shipped(folder: str) -> Path:
    """The folder of `training_args`, `model_cards` or `scripts`."""
    inside = PACKAGE / _IN_WHEEL.get(folder, folder)
    return inside if inside.is_dir() else PACKAGE.parent / folder


# what `training_args/` holds, and in which of its folders
_RECIPES, _LAUNCH_CONFIGS = ("recipe", "."), ("launch config", "accelerate")


def recipe_names() -> list[str]:
    """Names of recipes that `--config` takes."""
    return _names(_RECIPES[1])


def find_config(name: str, argument: str = "--config") -> Path:
    """A YAML file by its path, or a recipe by its name, such as `smollm2-135m-eagle3`; `argument` named it.

    Raises:
        ValueError: if `name` looks like a recipe's name and no recipe has it.
    """
    return _find(name, argument, *_RECIPES)


def find_launch_config(name: str, argument: str) -> Path:
    """A launch config of accelerate by its path, or one of ours by its name, such as `fsdp2`; as [`find_config`]."""
    return _find(name, argument, *_LAUNCH_CONFIGS)


def _names(folder: str) -> list[str]:
    return sorted(path.stem for path in (shipped("training_args") / folder).glob("*.yaml"))


def _find(name: str, argument: str, kind: str, folder: str) -> Path:
    path = Path(name)
    if os.path.exists(name) or path.name != name:
        return path

    stem = name.removesuffix(".yaml")
    found = shipped("training_args") / folder / f"{stem}.yaml"
    if os.path.isfile(found):
        return found

    names = _names(folder)
    near = difflib.get_close_matches(stem, names, n=1)
    if not near and path.suffix:
        return path  # meant as a file; its reader reports that it is missing

    hint = f"did you mean {near[0]}?" if near else f"{kind}s are {', '.join(names)}."
    raise ValueError(f"`{argument}` {name} is neither a file nor a {kind}: {hint}")
