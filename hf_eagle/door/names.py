"""What a name means: a repository of the Hub, or a folder of this machine."""

import os
from pathlib import Path


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository's, `owner/name` or `name`; the disk is not asked."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def as_named(name: str | os.PathLike) -> str:
    """What is on this machine by its whole path, a Hub id as it is; from then on the form tells the two apart.

    `~` is expanded. A name that fits both is the folder's, as it is for whoever loads a model.
    """
    path = Path(name).expanduser()
    return os.path.abspath(path) if path.exists() or not is_hub_id(str(name)) else str(name)


def check_hub_id(argument: str, name: str) -> None:
    """`ValueError` for what is no Hub id, or a folder of this machine, to which no card can link."""
    if not is_hub_id(as_named(name)):
        is_path = name.startswith((".", "/", "~")) or name and Path(name).exists()
        what = "a folder of this machine" if is_path else "which is no Hub id"
        raise ValueError(
            f"`{argument}` is {name}, {what}: give the target's id on the Hub, from a folder where nothing else has "
            "that name."
        )
