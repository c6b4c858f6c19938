"""What a set of tokenised conversations holds: lengths, supervised share, duplicates."""

import hashlib
from collections import Counter

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset


def token_statistics(rows: Dataset) -> dict:
    """Numbers of tokens in rows of `build_dataset`.

    Returns `conversations`, `tokens`, `supervised_tokens`, `supervised_share` in [0, 1], and `length` and `supervised`,
    each the `mean`, `median`, `p90`, `p99` and `max` of tokens in a conversation.
    """
    lengths, supervised = [], []
    for batch in rows.select_columns(["input_ids", "loss_mask"]).with_format("arrow").iter(batch_size=4096):
        size = pc.list_value_length(batch["input_ids"]).to_numpy()
        marked = np.concatenate([[0], np.cumsum(pc.list_flatten(batch["loss_mask"]).to_numpy(), dtype=np.int64)])
        ends = np.cumsum(size)
        lengths.append(size)
        supervised.append(marked[ends] - marked[ends - size])
    lengths, supervised = (np.concatenate(parts).astype(np.int64) for parts in (lengths, supervised))
    return {
        "conversations": len(lengths),
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(supervised.sum()),
        "supervised_share": float(supervised.sum() / max(1, lengths.sum())),
        "length": _spread(lengths),
        "supervised": _spread(supervised),
    }


def duplicate_statistics(rows: Dataset) -> dict[str, int]:
    """`duplicates`: conversations whose tokens were all there before."""
    seen = Counter()
    for batch in rows.select_columns(["input_ids"]).with_format("numpy").iter(batch_size=4096):
        seen.update(
            hashlib.blake2b(np.asarray(ids, np.int64).tobytes(), digest_size=16).digest() for ids in batch["input_ids"]
        )
    return {"duplicates": seen.total() - len(seen)}


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    found = dict(zip(("median", "p90", "p99"), np.percentile(values, [50, 90, 99]).tolist(), strict=True))
    found = {"mean": float(values.mean()), **found}
    return {**{name: round(value, 1) for name, value in found.items()}, "max": int(values.max())}
