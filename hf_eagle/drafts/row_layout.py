"""Which rows of a batch are unrolled, and which keys each of them sees: all of its document's past, or a window."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch

from ..data.collators import number_documents
from .flex_context import FlexMask


# rows of a sliding window that attend in one call of a kernel, as a share of it, and their bounds: each such call also
# reads the keys that only some of its rows see
_BAND_SHARE, _BAND_ROWS = 4, (64, 512)

# keys of a run of rows, and how it sees them: causally, all of them (False), or by ids alone (`None`)
Block = tuple[slice, bool | None]
Span = tuple[slice, list[Block]]


@dataclass
class RowLayout:
    """The unrolled rows of a `(batch, length)` grid, and the rows whose keys these need.

    A row's key is needed if an unrolled row of the same document stands at or after it, less than a window away. So
    padding and what follows the last supervised row of a document cost nothing.

    Attributes:
        rows: `(N,)` flat ids `b * length + t` of the unrolled rows, ascending.
        keys: `(K,)` flat ids of the rows with a step-0 key, ascending; they hold `rows`.
        row_in_keys: `(N,)`: `keys[row_in_keys] == rows`.
        document_of_row, document_of_key: `(N,)` and `(K,)`, ascending document numbers.
        window: keys that a row sees, its own of later steps included; all when `None`. Servers count it so: at step
            `s` row `i` sees the step-0 keys `i + s - window < j <= i`.
    """

    rows: torch.Tensor
    keys: torch.Tensor
    row_in_keys: torch.Tensor
    document_of_row: torch.Tensor
    document_of_key: torch.Tensor
    window: int | None = None

    @classmethod
    def of(cls, rows: torch.Tensor, documents: torch.Tensor, window: int | None = None) -> "RowLayout":
        """For these rows of a batch whose tokens belong to `documents` `(batch, length)`, each contiguous."""
        document = number_documents(documents)
        indices = torch.arange(document.numel(), device=rows.device)
        last_row = torch.full_like(indices, -1).scatter_reduce(0, document[rows], rows, "amax")
        needed = indices <= last_row[document]
        if window is not None and len(rows):
            next_row = rows[torch.searchsorted(rows, indices).clamp_max(len(rows) - 1)]
            needed &= next_row - indices < window

        keys = needed.nonzero()[:, 0]
        return cls(rows, keys, (needed.cumsum(0) - 1)[rows], document[rows], document[keys], window)

    def counted(self) -> "RowLayout":
        """Itself, with the numbers that kernels need computed now: on a device, reading them would wait for it."""
        if self.rows.numel():
            self.spans  # noqa: B018 - `documents` too
        return self

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "RowLayout":
        """The same layout, with each of its tensors changed, for instance moved; what was counted on the host stays."""
        counted = {name: self.__dict__[name] for name in ("documents", "spans") if name in self.__dict__}
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "window"}
        changed = replace(self, **{name: change(tensor) for name, tensor in tensors.items()})
        changed.__dict__.update(counted)
        return changed

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "RowLayout":
        """On another device."""
        return self.each(lambda x: x.to(device, non_blocking=non_blocking))

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
    def spans(self) -> list[Span]:
        """Runs of adjacent rows, each with its blocks of keys without a window: all before it, and its own."""
        joined = (self.rows[1:] == self.rows[:-1] + 1) & (self.document_of_row[1:] == self.document_of_row[:-1])
        starts = [0, *((~joined).nonzero()[:, 0] + 1).tolist()]

        key_of, documents = self.row_in_keys.tolist(), iter(self.documents)
        found, end_of_document, first_key = [], 0, 0
        for start, end in zip(starts, [*starts[1:], len(key_of)], strict=True):
            if start == end_of_document:  # rows ascend, so a new document begins with a new span
                _, end_of_document, first_key, _ = next(documents)
            own = slice(key_of[start], key_of[start] + end - start)
            before = slice(first_key, own.start)
            found.append((slice(start, end), [(own, True)] + [(before, False)] * (before.start < before.stop)))

        return found

    def spans_at(self, step: int) -> list[Span]:
        """`spans` of a TTT step. Where a window cuts, runs are shorter, so that rows meet few keys behind it."""
        if self.window is None:
            return self.spans
        if step not in self._spans_at:
            self._spans_at[step] = [part for span in self.spans for part in self._cut(*span, self.window - step)]
        return self._spans_at[step]

    @cached_property
    def _spans_at(self) -> dict[int, list[Span]]:
        return {}

    @cached_property
    def _ids(self) -> tuple[list[int], list[int]]:
        return self.rows.tolist(), self.keys.tolist()

    def _cut(self, rows: slice, blocks: list[Block], reach: int) -> list[Span]:
        """A span whose rows see `reach` step-0 keys at most, in parts."""
        (row_ids, key_ids), own = self._ids, blocks[0][0]
        first_key = blocks[-1][0].start  # of the document
        if row_ids[rows.stop - 1] - key_ids[first_key] < reach:
            return [(rows, blocks)]

        found, least, most = [], *_BAND_ROWS
        count = min(max(self.window // _BAND_SHARE, least), most)
        for start in range(rows.start, rows.stop, count):
            stop = min(start + count, rows.stop)
            end_of_keys = own.start + stop - rows.start
            first = bisect_right(key_ids, row_ids[start] - reach, first_key, end_of_keys)
            found.append((slice(start, stop), [(slice(first, end_of_keys), None)]))
        return found

    def hidden(self, rows: slice, keys: slice, step: int) -> torch.Tensor:
        """Which of these keys of their document these rows do not see, bool `(rows, keys)`."""
        row, key = self.rows[rows, None], self.keys[None, keys]
        later = key > row
        return later if self.window is None else later | (key <= row + step - self.window)

    def flex_mask(self, step: int) -> FlexMask:
        """The layout as `flex_attention` takes it at a TTT step, made once."""
        step = 0 if self.window is None else step
        if step not in self._flex_masks:
            first = None if self.window is None else self.rows + (step + 1 - self.window)
            where = (self.rows, self.document_of_row, self.keys, self.document_of_key)
            self._flex_masks[step] = FlexMask.of(*where, first)
        return self._flex_masks[step]

    @cached_property
    def _flex_masks(self) -> dict[int, FlexMask]:
        return {}
