"""Define which features of a conversation are stored, and find conversations in data sets and batches."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset

from .dtypes import bytes_a_token


@dataclass(frozen=True)
class Conversation:
    """One conversation as training reads it.

    Attributes:
        input_ids, loss_mask: `(length,)`, int32 and int8.
        media: fingerprint of its images and videos, in hex digits; `""` if it has none.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    media: str = ""

    @cached_property
    def key(self) -> bytes:
        """A hash of 16 bytes that identifies the conversation together with its mask and media."""
        content = self.input_ids.tobytes() + self.loss_mask.tobytes() + bytes.fromhex(self.media)
        return hashlib.blake2b(content, digest_size=16).digest()

    @cached_property
    def kept(self) -> int:
        """Number of tokens, from the start, whose features matter: training uses nothing after its last row."""
        answered = np.flatnonzero(self.loss_mask)
        return min(int(answered[-1]) + 2, len(self.loss_mask)) if len(answered) else 0

    @cached_property
    def judged(self) -> np.ndarray:
        """Positions whose next-token distribution training may need: every answer's tokens, and the one after it.

        No number of TTT steps and no alignment of the supervision needs more.
        """
        near = self.loss_mask.astype(bool)
        near[1:] |= near[:-1].copy()
        return np.flatnonzero(near)


@dataclass(frozen=True)
class StoreLayout:
    """The stored features of a conversation. For `kept` tokens these are the taps. For `judged` tokens they are the
    last hidden states and two results of the target's whole head: its most probable token and its log-sum-exp.

    Args:
        taps: taps per token. 0 for a draft that uses last hidden states only: then those of all `kept` tokens are
            stored, and nothing of the head.
        hidden: width of one tap, and of the last hidden state.
        dtype: a key of `STORE_DTYPES`.
        axes: positions per token. 3 for a target with m-RoPE and data with media, stored for `kept` tokens; 0 if
            tokens are simply counted.
    """

    taps: int
    hidden: int
    dtype: str
    axes: int = 0

    def places(self, conversation: Conversation) -> np.ndarray:
        """Return the positions whose last hidden state and head results are stored, ascending."""
        return conversation.judged if self.taps else np.arange(conversation.kept)

    def bytes_of(self, conversation: Conversation) -> int:
        """Return the bytes that a conversation takes on the disk, without file headers."""
        taps = conversation.kept * (bytes_a_token(self.dtype, self.hidden, self.taps) + 4 * self.axes)
        last = len(self.places(conversation)) * (bytes_a_token(self.dtype, self.hidden, 1) + 8 * bool(self.taps))
        return taps + last + 5 * len(conversation.input_ids) + 8


def conversations_of(dataset: Dataset) -> Iterator[tuple[int, Conversation]]:
    """Yield the conversations of a data set, packed or not, with the row of each. Reads Arrow batches."""
    names = dataset.column_names or ["loss_mask"]
    if "attention_mask" in names or "loss_mask" not in names:
        raise ValueError(
            "A feature store holds conversations of `input_ids` and `loss_mask` without padding, but the data have the "
            f"columns {', '.join(names)}: cut the padding off, and leave out `attention_mask` and `labels`."
        )

    row = 0
    for batch in dataset.with_format("arrow").iter(batch_size=1024):
        ids, mask = (
            pc.list_flatten(batch[name].combine_chunks()).to_numpy(zero_copy_only=False).astype(dtype)
            for name, dtype in (("input_ids", np.int32), ("loss_mask", np.int8))
        )
        mask = mask.clip(0)  # -100 is not supervised

        sizes = pc.list_value_length(batch["input_ids"]).to_numpy()
        rows = np.arange(row, row + len(sizes))
        if "document_lengths" in batch.column_names:
            rows = np.repeat(rows, pc.list_value_length(batch["document_lengths"]).to_numpy())
            sizes = pc.list_flatten(batch["document_lengths"].combine_chunks()).to_numpy()

        bounds = np.concatenate([[0], np.cumsum(sizes)]).tolist()

        # one fingerprint per row is enough: a row with media is never packed
        media = [""] * len(rows)
        if "media_fingerprint" in batch.column_names:
            media = batch["media_fingerprint"].to_pylist()

        for place, (start, end), shown in zip(rows.tolist(), pairwise(bounds), media, strict=True):
            yield place, Conversation(ids[start:end], mask[start:end], shown)
        row += len(batch)


def conversations_in(
    batch: dict[str, torch.Tensor], media: Sequence[str] | None = None
) -> list[tuple[int, int, Conversation]]:
    """Return the conversations of a collated batch: row, first position in the row, conversation.

    Args:
        batch: a collator's batch.
        media: fingerprint of each row's images and videos; `None` for text.

    Raises:
        ValueError: if the batch holds media whose fingerprints are not known.
    """
    others = sorted(set(batch) - {"input_ids", "loss_mask", "attention_mask", "documents", "position_ids"})
    if others and media is None:
        raise ValueError(
            f"`feature_store` cannot tell conversations by their tokens, since the batch has {', '.join(others)}: make "
            "the data with `build_vision_dataset`, which adds the column `media_fingerprint`."
        )

    ids, mask = batch["input_ids"].int().numpy(), batch["loss_mask"].to(torch.int8).numpy()
    labels = batch["documents"] if "documents" in batch else torch.zeros_like(batch["input_ids"])
    labels = labels.masked_fill(batch["attention_mask"] == 0, -1).numpy()

    found = []
    for n, row in enumerate(labels):
        changes = np.flatnonzero(row[1:] != row[:-1]) + 1
        for start, end in pairwise([0, *changes.tolist(), len(row)]):
            if row[start] >= 0:
                shown = "" if media is None else media[n]
                found.append((n, start, Conversation(ids[n, start:end], mask[n, start:end], shown)))
    return found
