"""What a set of tokenised conversations holds: lengths, supervised share, duplicates, overlap with test prompts."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from .messages import read_record


_NGRAM = 13  # words, as the GPT-3 paper counts overlap with test sets
_WORDS = re.compile(r"\w+")


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


class HeldOut:
    """Prompts kept for evaluation, to be looked for in training data.

    A prompt counts as found when a conversation holds 13 words of it in a row, in lower case and without punctuation;
    one of fewer words when it is a whole message.

    Args:
        prompts (`list[str]`): what users say in the evaluation.
    """

    def __init__(self, prompts: list[str]):
        self._runs: dict[tuple, set[int]] = {}
        self._whole: dict[tuple, set[int]] = {}
        for number, prompt in enumerate(prompts):
            words = _words(prompt)
            for gram in _ngrams(words):
                self._runs.setdefault(gram, set()).add(number)
            if 0 < len(words) < _NGRAM:
                self._whole.setdefault(tuple(words), set()).add(number)
        self._starts = {gram[0] for gram in self._runs}

    def found_in(self, texts: Iterable[str]) -> set[int]:
        """Numbers of the prompts that lie in the messages of one conversation."""
        found: set[int] = set()
        for text in texts:
            words = _words(text)
            found |= self._whole.get(tuple(words), set()) if len(words) < _NGRAM else set()
            for gram in _ngrams(words, self._starts):
                found |= self._runs.get(gram, set())
        return found


def overlap_statistics(records: Iterable[dict], prompts: list[str], form: str | None = None) -> dict[str, int]:
    """How many test prompts lie in the conversations, as `HeldOut` finds them.

    Returns `prompts`, `prompts_found`, and `conversations_found`, those that hold any of them.
    """
    held_out = HeldOut(prompts)
    found: set[int] = set()
    conversations = 0
    for index, record in enumerate(records):
        here = held_out.found_in(message["content"] for message in read_record(record, index, form)[0])
        found |= here
        conversations += bool(here)
    return {"prompts": len(prompts), "prompts_found": len(found), "conversations_found": conversations}


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def _ngrams(words: list[str], starts: set[str] | None = None) -> Iterator[tuple]:
    """All runs of 13 words, or those that begin with one of `starts`."""
    for n in range(len(words) - _NGRAM + 1):
        if starts is None or words[n] in starts:
            yield tuple(words[n : n + _NGRAM])


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    found = dict(zip(("median", "p90", "p99"), np.percentile(values, [50, 90, 99]).tolist(), strict=True))
    found = {"mean": float(values.mean()), **found}
    return {**{name: round(value, 1) for name, value in found.items()}, "max": int(values.max())}
