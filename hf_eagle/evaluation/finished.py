"""Continue a measurement where it stopped: keep decoded batches, with the settings that they depend on."""

import hashlib
import json

import torch

from ..data.media import own_tokenizer
from ..door.journal import Journal
from ..store.fingerprints import target_fingerprints
from .summary import described


_FORMAT = 2  # of a journal's lines


class Finished:
    """Decoded batches, each saved as soon as it is finished.

    Args:
        journal ([`Journal`], *optional*): holds the batches, after the settings that they depend on; without a journal,
            nothing is saved.
        part (`str`, *optional*, defaults to `"main"`): name that distinguishes several measurements in one journal.
    """

    def __init__(self, journal: Journal | None = None, part: str = "main"):
        self.journal, self.part = journal, part
        rows = journal.rows if journal is not None else []
        self._rows = {row["batch"]: row["decoded"] for row in rows if row["part"] == part}

    def row(self, batch: int) -> dict | None:
        """Return the result of the batch with this number, `None` if it is not decoded yet."""
        return self._rows.get(batch)

    def keep(self, batch: int, decoded: dict) -> None:
        """Save a batch; it is on the disk when this returns."""
        if self.journal is not None:
            self.journal.append({"part": self.part, "batch": batch, "decoded": decoded})


def depends_on(target, draft, processing, prompts: str, settings, **others) -> dict:
    """Return everything that determines the counts of a measurement, for the first line of its journal.

    Args:
        target ([`FrozenTarget`]), draft: the two models.
        processing: the target's tokenizer or processor.
        prompts: the digest that `check_rendering` returns.
        settings ([`DecodingSettings`]): how to decode them.
        others: further settings by name, which JSON can hold.
    """
    template = own_tokenizer(processing).chat_template
    return {
        "format": _FORMAT,
        **{f"target_{name}": digest for name, digest in target_fingerprints(target).items()},
        "draft_weights": draft_fingerprint(draft),
        "prompts": prompts,
        "chat_template": hashlib.sha256(json.dumps(template, default=str).encode()).hexdigest()[:16],
        "device": str(target.device),
        **described(settings),
        **others,
    }


def draft_fingerprint(draft) -> str:
    """Return a hash, 16 hex digits, of a draft's config and weights, without the weights that its target lends."""
    config = {name: value for name, value in draft.config.to_diff_dict().items() if name != "_name_or_path"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())

    for name, tensor in sorted(draft.state_dict().items()):
        if name not in draft.lent_tensors:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
