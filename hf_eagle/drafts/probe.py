"""A change of one thing in a draft: if more is accepted with it, that thing was wrong."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Probe:
    """One change of a draft, which undoes a fault that its folder does not show.

    Attributes:
        cause: name of the fault, a row of `diagnosis/causes.py`.
        change: what is changed, to follow "with".
        apply: changes a draft. It replaces tensors and never writes into them, since a copy shares them.
        tap_ids: entry ids that the target must be read with; `None` for those of the draft.
    """

    cause: str
    change: str
    apply: Callable[[Any], None]
    tap_ids: list[int] | None = None

    def changed(self, draft):
        """A copy of the draft with this change. All that is not changed is shared in memory."""
        shared = {id(tensor): tensor for tensor in [*draft.parameters(), *draft.buffers()]}
        other = copy.deepcopy(draft, shared)
        self.apply(other)
        return other.eval()
