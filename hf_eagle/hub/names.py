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
