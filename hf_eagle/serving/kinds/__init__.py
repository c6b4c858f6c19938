"""The servers' table of kinds: whatever they do to one kind of draft and not to another is said in its row.

A row restates the servers' sources and leans on nothing that writes drafts. A new kind takes a file here that ends in
its `ServedKind`, and a place in `SERVED`, before rows that would take its folders for theirs.
"""

from ..draft_folder import DraftFolder
from . import eagle1, eagle3, latent
from .row import ServedKind


# name -> row; a folder is what the first says that knows it
SERVED: dict[str, ServedKind] = {row.name: row for row in (latent.ROW, eagle1.ROW, eagle3.ROW)}


def kind_of(folder: DraftFolder) -> ServedKind:
    """The row of a folder, told from its tensors where it can be, since the config may be what is wrong.

    A folder that no row knows is held to the rules of EAGLE-3.
    """
    return next((row for row in SERVED.values() if row.tells(folder)), eagle3.ROW)


def rows_of(kind: str) -> list[ServedKind]:
    """The rows of one of hf_eagle's kinds; none where no server is known to run it."""
    return [row for row in SERVED.values() if row.kind == kind]


def serves(kind: str) -> bool:
    """Whether a server is known to run drafts of one of hf_eagle's kinds."""
    return bool(rows_of(kind))
