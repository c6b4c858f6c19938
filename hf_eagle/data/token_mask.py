"""Convert spans of characters to a mask of tokens, in one pass over the text."""

import re
from bisect import bisect_right
from collections.abc import Callable

import numpy as np


def mask_by_offsets(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """Return 0 or 1 for each token, by the characters that a fast tokenizer made it from.

    A token belongs to the span that it ends in: one that straddles a header's end is the answer's first token.
    """
    mask = np.zeros(len(offsets), dtype=np.int8)
    ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 1]
    for first, last in np.searchsorted(ends, np.asarray(spans, dtype=np.int64).reshape(-1, 2), side="right"):
        mask[first:last] = 1
    return mask.tolist()


def mask_by_pieces(
    tokens: Callable[[str], list[int]], special: re.Pattern, text: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """Return ids and mask from a tokenizer without offsets.

    Special tokens cut the text, and only the piece in which a span begins or ends is tokenised again. So the work is
    linear in the text, whatever the number of turns.

    Args:
        tokens: gives a text's token ids.
        special: matches the special tokens.
        text: a rendered conversation.
        spans: `(start, end)` in characters, ascending.
    """
    ids = tokens(text)
    borders = [0, *(place for found in special.finditer(text) for place in found.span()), len(text)]

    counts, joined = [0], []
    for begin, end in zip(borders, borders[1:], strict=False):
        joined += tokens(text[begin:end]) if begin < end else []
        counts.append(len(joined))

    def before(cut: int) -> int:
        """Return the number of tokens that end at or before a character."""
        if joined != ids:  # the tokenizer depends on the text before a piece
            return shared_length(tokens(text[:cut]), ids)

        piece = bisect_right(borders, cut) - 1
        if borders[piece] == cut:
            return counts[piece]
        own = ids[counts[piece] : counts[piece + 1]]
        return counts[piece] + shared_length(tokens(text[borders[piece] : cut]), own)

    mask = [0] * len(ids)
    for span in spans:
        start, end = map(before, span)
        mask[start:end] = [1] * (end - start)
    return ids, mask


def shared_length(one: list[int], other: list[int]) -> int:
    """Return the length of the longest common prefix."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
