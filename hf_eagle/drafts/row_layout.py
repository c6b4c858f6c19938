"""Which rows of a batch an unroll computes, and which step-0 keys each of them sees."""

from dataclasses import dataclass
from functools import cached_property

import torch


_BLOCK = 128  # rows and keys of a block of `flex_attention`


def mark_padding(
    documents: torch.Tensor | None, attention_mask: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor:
    """Document ids `(batch, length)` of a batch, -1 on padding; one document a sequence where none are given.

    Args:
        documents: ids of packed documents.
        attention_mask: 0 on padding; no padding when `None`.
        like: `(batch, length)`.
    """
    documents = torch.zeros_like(like) if documents is None else documents
    return documents if attention_mask is None else documents.masked_fill(attention_mask == 0, -1)


def number_documents(documents: torch.Tensor) -> torch.Tensor:
    """Which document of the batch each token is of, counted from 0: `(batch, length)` ids -> `(batch * length,)`.

    A document is a run of one id in one sequence; a run of padding counts as one.
    """
    changes = torch.ones_like(documents, dtype=torch.bool)
    changes[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return changes.flatten().cumsum(0) - 1


@dataclass
class RowLayout:
    """The unrolled rows of a `(batch, length)` grid, and the rows that need a key for them.

    A row's key is needed when an unrolled row of the same document stands at or behind it: padding, and what follows
    the last supervised row of a document, costs nothing.

    Attributes:
        rows: `(N,)` flat ids `b * length + t` of the unrolled rows, ascending.
        keys: `(K,)` flat ids of the rows with a step-0 key, ascending; they hold `rows`.
        row_in_keys: `(N,)`: `keys[row_in_keys] == rows`.
        document_of_row, document_of_key: `(N,)` and `(K,)`, ascending document numbers.
    """

    rows: torch.Tensor
    keys: torch.Tensor
    row_in_keys: torch.Tensor
    document_of_row: torch.Tensor
    document_of_key: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, documents: torch.Tensor) -> "RowLayout":
        """For these rows of a batch whose tokens belong to `documents` `(batch, length)`, each in one piece."""
        document = number_documents(documents)
        places = torch.arange(document.numel(), device=rows.device)
        last_row = torch.full_like(places, -1).scatter_reduce(0, document[rows], rows, "amax")
        needed = places <= last_row[document]
        keys = needed.nonzero()[:, 0]
        return cls(rows, keys, (needed.cumsum(0) - 1)[rows], document[rows], document[keys])

    @cached_property
    def documents(self) -> list[tuple[int, int, int, int]]:
        """First row, end of rows, first key, end of keys of each document, counted in `rows` and in `keys`."""
        row_counts, key_counts = (
            torch.unique_consecutive(document, return_counts=True)[1].tolist()
            for document in (self.document_of_row, self.document_of_key)
        )
        found, row, key = [], 0, 0
        for rows, keys in zip(row_counts, key_counts, strict=True):
            found.append((row, row + rows, key, key + keys))
            row, key = row + rows, key + keys
        return found

    @cached_property
    def spans(self) -> list[tuple[slice, list[tuple[slice, bool]]]]:
        """Rows that stand side by side, each with its blocks of keys, `(keys, causal)`: all before it, its own."""
        joined = (self.rows[1:] == self.rows[:-1] + 1) & (self.document_of_row[1:] == self.document_of_row[:-1])
        starts = [0, *((~joined).nonzero()[:, 0] + 1).tolist()]
        places, documents = self.row_in_keys.tolist(), iter(self.documents)
        found, end_of_document, first_key = [], 0, 0
        for start, end in zip(starts, [*starts[1:], len(places)], strict=True):
            if start == end_of_document:  # rows ascend, so a new document begins with a new span
                _, end_of_document, first_key, _ = next(documents)
            own = slice(places[start], places[start] + end - start)
            before = slice(first_key, own.start)
            found.append((slice(start, end), [(own, True)] + [(before, False)] * (before.start < before.stop)))
        return found

    @cached_property
    def block_mask(self):
        """The same as a mask of `flex_attention`: blocks of keys that a block of rows sees in full, or in part."""
        from torch.nn.attention.flex_attention import BlockMask

        def visible(batch, head, row, key):
            same = self.document_of_row[row] == self.document_of_key[key]
            return same & (self.keys[key] <= self.rows[row])

        # rows, keys and documents ascend, so the ends of a block say what is in it
        first_row, last_row = (x[:, None] for x in _ends_of_blocks(self.rows))
        row_document, last_row_document = (x[:, None] for x in _ends_of_blocks(self.document_of_row))
        first_key, last_key = _ends_of_blocks(self.keys)
        key_document, last_key_document = _ends_of_blocks(self.document_of_key)
        met = (first_key <= last_row) & (key_document <= last_row_document) & (last_key_document >= row_document)
        full = (last_key <= first_row) & (key_document == last_row_document) & (last_key_document == row_document)
        return BlockMask.from_kv_blocks(
            *_listed(met & ~full),
            *_listed(full),
            BLOCK_SIZE=_BLOCK,
            mask_mod=visible,
            seq_lengths=(self.rows.numel(), self.keys.numel()),
        )


def _ends_of_blocks(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last of every `_BLOCK` ids."""
    starts = torch.arange(0, ids.numel(), _BLOCK, device=ids.device)
    return ids[starts], ids[(starts + _BLOCK - 1).clamp_max(ids.numel() - 1)]


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool `(rows, columns)` as `flex_attention` wants it: how many columns a row has, and which, those first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]
