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


def recipe_names() -> list[str]:
    """Names of recipes that `--config` takes."""
    return sorted(path.stem for path in shipped("training_args").glob("*.yaml"))


def find_config(name: str, argument: str = "--config") -> Path:
    """A YAML file by its path, or a recipe by its name, such as `smollm2-135m-eagle3`; `argument` named it.

    Raises:
        ValueError: if `name` looks like a recipe's name and no recipe has it.
    """
    path = Path(name)
    if os.path.exists(name) or path.name != name:
        return path

    stem = name.removesuffix(".yaml")
    recipe = shipped("training_args") / f"{stem}.yaml"
    if os.path.isfile(recipe):
        return recipe

    near = difflib.get_close_matches(stem, recipe_names(), n=1)
    if not near and path.suffix:
        return path  # meant as a file; its reader reports that it is missing

    hint = f"did you mean {near[0]}?" if near else f"recipes are {', '.join(recipe_names())}."
    raise ValueError(f"`{argument}` {name} is neither a file nor a recipe: {hint}")
