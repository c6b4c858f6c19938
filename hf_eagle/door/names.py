"""Tell a repository on the Hub from a folder on this machine, by its name."""

import os
import re
from pathlib import Path


# what git refuses in the name of a branch
_NO_BRANCH = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[/-]|[/.]$|(^|/)\.|\.lock(/|$)|^@?$")


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form `owner/name` or `name`, as repositories have; ignore what is on the disk."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def at_home(name: str | os.PathLike) -> Path:
    """Return a path with `~` expanded; `~name` of an unknown user stays as it is."""
    return Path(os.path.expanduser(name))


def as_named(name: str | os.PathLike) -> str:
    """Make local paths absolute and leave Hub ids as they are, so that from then on the form tells the two apart.

    `~` is expanded. A name that fits both means the folder, as it does when a model is loaded.
    """
    path = at_home(name)
    return os.path.abspath(path) if os.path.exists(path) or not is_hub_id(str(name)) else str(name)


def same_model(target: str, name: str | None) -> bool:
    """Return whether a server's name of a model, an id or a folder that is here too, means this target."""
    if not name or "\0" in name:  # no path may hold a null byte
        return False
    return target == name or (os.path.isdir(name) and os.path.realpath(target) == os.path.realpath(name))


def check_hub_id(argument: str, name: str) -> None:
    """Raise `ValueError` for a name that is not a Hub id, or is a folder on this machine: a card cannot link to it."""
    if not is_hub_id(as_named(name)):
        is_path = name.startswith((".", "/", "~")) or name and os.path.exists(name)
        what = "a folder of this machine" if is_path else "which is no Hub id"
        raise ValueError(
            f"`{argument}` is {name}, {what}: give the target's id on the Hub, from a folder where nothing else has "
            "that name."
        )


def check_branch(argument: str, name: str | None) -> None:
    """Raise `ValueError` for a name that git does not accept for a branch; `None` is the main branch."""
    if name is not None and _NO_BRANCH.search(name):
        raise ValueError(f"`{argument}` {name!r} is not a valid branch name: give one like `v2`, or leave it out.")
