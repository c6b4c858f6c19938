"""Open a draft to be examined; one whose folder cannot be read as it was trained is mended in a copy first."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from ..door.json_files import read_json
from ..drafts.build import load_draft
from ..drafts.kinds import kind_of_folder
from ..drafts.probe import Probe
from ..serving.check import check_draft
from ..serving.draft_folder import DraftFolder
from ..serving.repair import repair_draft
from .case import Case, Tried
from .findings import Finding, counts_of, gain_over


@dataclass
class Opened:
    """A draft that can be examined.

    Attributes:
        draft: the draft, or its mended copy.
        folder: where it lies on this machine.
        faults: sentences of `hf-eagle check` about the folder.
        mended: what was mended, so that it could be loaded at all.
        served_offsets: `d2t` as the folder holds it, if it was mended.
        bases: RoPE bases that the folder names.
    """

    draft: Any
    folder: Path
    faults: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    served_offsets: torch.Tensor | None = None
    bases: list[float] = field(default_factory=list)


def open_draft(path: str, target_config, dtype: torch.dtype) -> Opened:
    """
    Load a draft folder or Hub id, and look at the folder as servers do.

    Raises:
        ValueError: if it is no draft, or cannot be mended.
        OSError: if there is no such folder or Hub id.
    """
    folder = Path(cached_file(path, "config.json")).parent
    kind = kind_of_folder(folder)
    name = None if kind is None else kind.name
    found = {"folder": folder, "faults": _faults(folder, target_config, name), "bases": _bases(folder)}
    try:
        return Opened(load_draft(path, dtype=dtype), **found)
    except ValueError as problem:
        if not found["faults"]:
            raise
        with tempfile.TemporaryDirectory() as made:
            mended = Path(made) / "mended"
            try:
                done = repair_draft(folder, mended, target_config, name)
                draft = load_draft(mended, dtype=dtype)
            except ValueError:
                raise problem from None  # which names the folder that was given
        return Opened(draft, mended=done, served_offsets=_offsets(folder, draft), **found)


def _faults(folder: Path, target_config, kind: str | None) -> list[str]:
    try:
        return [str(found) for found in check_draft(folder, target_config, kind=kind) if found.level == "fault"]
    except ValueError:
        return []  # loading says more


def _bases(folder: Path) -> list[float]:
    """Every RoPE base in config.json, in whichever spelling."""
    try:
        config = read_json(folder / "config.json", {})
    except ValueError:
        return []  # loading says more
    places = [config, *(config.get(name) for name in ("rope_parameters", "rope_scaling"))]
    found = [place.get("rope_theta") for place in places if isinstance(place, dict)]
    return [float(base) for base in found if isinstance(base, int | float) and base > 0]


def _offsets(folder: Path, draft) -> torch.Tensor | None:
    """`d2t` of a folder, if it is another than the mended draft's."""
    held = DraftFolder.read(folder)
    if "d2t" not in held.shapes or draft.d2t is None:
        return None
    offsets = held.tensor("d2t").long()
    return None if offsets.shape != draft.d2t.shape or torch.equal(offsets, draft.d2t.cpu()) else offsets


def folder_findings(case: Case, opened: Opened) -> list[Tried]:
    """What is wrong with the folder, and what it costs where that can be measured."""
    if not opened.faults or not case.wants("folder"):
        return []
    told = opened.faults[0].partition(" Fix: ")[0].rstrip(".")
    more = f" ({len(opened.faults) - 1} more)" if len(opened.faults) > 1 else ""
    details = {"faults": opened.faults, "mended": opened.mended}
    gained: dict[str, Any] = {}
    if opened.served_offsets is not None:
        as_served = Probe("folder", "", _with_offsets(opened.served_offsets)).changed(case.draft)
        (served,) = case.sample.replayed([as_served])
        gained = gain_over(counts_of(served), case.counts)
    change = "the folder mended" if opened.mended else None
    finding = Finding("folder", told + more, change, **gained, seen=True, details=details)
    return [Tried(finding, changed=(lambda: case.draft) if opened.mended else None)]


def _with_offsets(offsets: torch.Tensor):
    """Read the draft vocabulary as servers would, who do not look whether the ids are tokens."""

    def apply(draft) -> None:
        draft.d2t = offsets.to(draft.d2t.device)

    return apply
