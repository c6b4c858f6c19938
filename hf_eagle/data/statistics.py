"""Describe tokenised conversations: lengths, supervised share, duplicates."""

import hashlib
from collections import Counter

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from .columns import IGNORED, check_data


def token_statistics(rows: Dataset) -> dict:
    """Count the tokens in rows of `build_dataset`, or in any rows that a collator takes.

    -100 is not supervised, `labels` may stand for the mask, and padding marked by an `attention_mask` is not counted.

    Returns `conversations`, `tokens`, `supervised_tokens`, `supervised_share` in [0, 1], and `length` and `supervised`,
    each the `mean`, `median`, `p90`, `p99` and `max` of tokens in a conversation. Raises a `ValueError` that names a
    missing column.
    """
    check_data(rows=rows)
    mask = "loss_mask" if "loss_mask" in rows.column_names else "labels"
    names = ["input_ids", mask, *({"attention_mask"} & set(rows.column_names))]

    lengths, supervised = [], []
    for batch in rows.select_columns(names).with_format("arrow").iter(batch_size=4096):
        size = pc.list_value_length(batch["input_ids"]).to_numpy()
        ends = np.cumsum(size)
        for found, counted in zip((lengths, supervised), _counted(batch), strict=True):
            sums = np.concatenate([[0], np.cumsum(counted, dtype=np.int64)])
            found.append(sums[ends] - sums[ends - size])

    lengths, supervised = (np.concatenate(parts or [np.zeros(0, np.int64)]) for parts in (lengths, supervised))
    return {
        "conversations": len(lengths),
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(supervised.sum()),
        "supervised_share": float(supervised.sum() / max(1, lengths.sum())),
        "length": _spread(lengths),
        "supervised": _spread(supervised),
    }


def _counted(batch) -> tuple[np.ndarray, np.ndarray]:
    """Return two masks over a batch's concatenated rows: of all tokens, and of supervised tokens."""
    columns = {name: pc.list_flatten(batch[name]).to_numpy() for name in batch.column_names}
    present = columns.get("attention_mask", np.ones(len(columns["input_ids"]))) != 0
    marked = columns["loss_mask"] > 0 if "loss_mask" in columns else columns["labels"] != IGNORED
    return present, present & marked


def duplicate_statistics(rows: Dataset) -> dict[str, int]:
    """Count `duplicates`: conversations with the same tokens, images and videos as an earlier conversation."""
    seen = Counter()
    names = [name for name in ("input_ids", "media_fingerprint") if name in rows.column_names]

    for batch in rows.select_columns(names).with_format("numpy").iter(batch_size=4096):
        media = batch.get("media_fingerprint", [""] * len(batch["input_ids"]))
        seen.update(
            hashlib.blake2b(np.asarray(ids, np.int64).tobytes() + str(shown).encode(), digest_size=16).digest()
            for ids, shown in zip(batch["input_ids"], media, strict=True)
        )
    return {"duplicates": seen.total() - len(seen)}


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    found = dict(zip(("median", "p90", "p99"), np.percentile(values, [50, 90, 99]).tolist(), strict=True))
    found = {"mean": float(values.mean()), **found}
    return {**{name: round(value, 1) for name, value in found.items()}, "max": int(values.max())}
