"""The servers' table of kinds: a row says what they do to one kind of draft and not to another.

A row restates the servers' sources and uses nothing that writes drafts. To add a kind, add a file here that ends in its
`ServedKind`, and place it in `SERVED` before rows that would take its folders for theirs.
"""

from ..draft_folder import DraftFolder
from . import dflash, eagle1, eagle3, latent
from .row import ServedKind


# name -> row; the first row that recognises a folder applies
SERVED: dict[str, ServedKind] = {row.name: row for row in (dflash.ROW, latent.ROW, eagle1.ROW, eagle3.ROW)}


def kind_of(folder: DraftFolder) -> ServedKind:
    """The row of a folder, recognised by its tensors if possible, since the config may be what is wrong.

    EAGLE-3's rules apply to a folder that no row recognises.
    """
    return next((row for row in SERVED.values() if row.tells(folder)), eagle3.ROW)


def rows_of(kind: str) -> list[ServedKind]:
    """The rows of one of hf_eagle's kinds; none if no server is known to run it."""
    return [row for row in SERVED.values() if row.kind == kind]


def serves(kind: str) -> bool:
    """Whether a server is known to run drafts of one of hf_eagle's kinds."""
    return bool(rows_of(kind))
