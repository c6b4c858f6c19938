"""The plan of a batch for drafts unrolled token by token: which rows, which keys they see, and where."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from ..data.collators import any_packed, documents_of, mark_padding, number_documents
from ..losses.supervision import SupervisionPlan, supervised_steps
from ..targets.packed_attention import Segments
from .flex_context import FlexMask
from .training_base import PlanOfTensors


@dataclass
class RowLayout:
    """The unrolled rows of a `(batch, length)` grid, and the rows whose keys these need.

    A row's key is needed if an unrolled row of the same document stands at or after it. So padding and what follows
    the last supervised row of a document cost nothing.

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
        """For these rows of a batch whose tokens belong to `documents` `(batch, length)`, each contiguous."""
        document = number_documents(documents)
        indices = torch.arange(document.numel(), device=rows.device)
        last_row = torch.full_like(indices, -1).scatter_reduce(0, document[rows], rows, "amax")
        needed = indices <= last_row[document]
        keys = needed.nonzero()[:, 0]
        return cls(rows, keys, (needed.cumsum(0) - 1)[rows], document[rows], document[keys])

    def counted(self) -> "RowLayout":
        """Itself, with the numbers that kernels need computed now: on a device, reading them would wait for it."""
        if self.rows.numel():
            self.spans  # noqa: B018 - `documents` too
        return self

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "RowLayout":
        """The same layout, with each of its tensors changed, for instance moved; what was counted on the host stays."""
        counted = {name: self.__dict__[name] for name in ("documents", "spans") if name in self.__dict__}
        changed = replace(self, **{f.name: change(getattr(self, f.name)) for f in fields(self)})
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
    def spans(self) -> list[tuple[slice, list[tuple[slice, bool]]]]:
        """Runs of adjacent rows, each with its blocks of keys, `(keys, causal)`: all before it, and its own."""
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

    @cached_property
    def flex_mask(self) -> FlexMask:
        """The layout as `flex_attention` takes it."""
        return FlexMask.of(self.rows, self.document_of_row, self.keys, self.document_of_key)


@dataclass
class StepTokens:
    """The tokens that an unroll meets: row `t` meets token `t + 1 + s` at step `s`, and a key of row `t` token `t + 1`.

    Tokens recur in rows and steps. Each distinct one is embedded and projected once, so the unroll needs to know where.

    Attributes:
        ids: `(T,)` flat ids of the distinct tokens, ascending.
        of_key: `(K,)`, indices into `ids` of the tokens that keys meet.
        of_row: `(steps, N)`, indices into `ids` of those that rows meet.
        asked: `(Q,)`, indices into `ids` of those that any row meets, ascending.
        asked_by_row: `(steps, N)`, indices into `asked` of those that rows meet.
    """

    ids: torch.Tensor
    of_key: torch.Tensor
    of_row: torch.Tensor
    asked: torch.Tensor
    asked_by_row: torch.Tensor

    @classmethod
    def of(cls, layout: RowLayout, num_steps: int, num_tokens: int) -> "StepTokens":
        """For these rows of a batch of `num_tokens` tokens; a row at its end meets the last token."""
        steps, last = torch.arange(num_steps, device=layout.rows.device)[:, None], num_tokens - 1
        by_rows = (layout.rows + 1 + steps).clamp_max(last)
        by_keys = (layout.keys + 1).clamp_max(last)

        met = torch.zeros(2, num_tokens, dtype=torch.bool, device=layout.rows.device)
        met[0, by_rows.flatten()] = True  # by a row
        met[1] = met[0]
        met[1, by_keys] = True  # by a row or a key

        index, index_asked = met[1].cumsum(0) - 1, met[0].cumsum(0) - 1
        asked = met[0].nonzero()[:, 0]
        return cls(met[1].nonzero()[:, 0], index[by_keys], index[by_rows], index[asked], index_asked[by_rows])

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "StepTokens":
        """The same, with each of its tensors changed, for instance moved."""
        return StepTokens(**{f.name: change(getattr(self, f.name)) for f in fields(self)})


@dataclass
class UnrollPlan(PlanOfTensors):
    """Which rows are unrolled, at which positions, and what each is compared with.

    Attributes:
        documents, packed, segments: as in [`BatchPlan`].
        position_ids: `(batch, length)`, or `(3, batch, length)`, positions of tokens.
        num_steps: TTT steps.
        layout: the rows, and which step-0 keys they need.
        tokens: those that rows and keys meet.
        supervised: what each row is compared with; `None` without a comparison.
    """

    documents: torch.Tensor
    packed: bool
    position_ids: torch.Tensor
    num_steps: int
    layout: RowLayout
    tokens: StepTokens
    supervised: SupervisionPlan | None = None
    segments: Segments | None = None

    @property
    def counts(self) -> torch.Tensor:
        return self.supervised.counts

    @classmethod
    def of(cls, batch: Mapping[str, Any], num_steps: int, supervision: str = "serving") -> "UnrollPlan":
        """From a collator's output, see [`DraftTraining.plan`]."""
        documents = documents_of(batch)
        supervised = SupervisionPlan.of(supervised_steps(batch["loss_mask"], documents, num_steps, supervision))
        layout = RowLayout.of(supervised.rows, documents).counted()
        return cls(
            documents=documents,
            packed=any_packed(documents),
            position_ids=_positions(batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")),
            num_steps=num_steps,
            layout=layout,
            tokens=StepTokens.of(layout, num_steps, documents.numel()),
            supervised=supervised,
            segments=Segments.of(documents),
        )

    @classmethod
    def of_rows(
        cls,
        input_ids: torch.Tensor,
        rows: torch.Tensor | None = None,
        num_steps: int = 1,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
    ) -> "UnrollPlan":
        """For chosen rows, `(N,)` flat ids `b * length + t`, ascending; all rows when `None`."""
        if rows is None:
            rows = torch.arange(input_ids.numel(), device=input_ids.device)

        documents = mark_padding(documents, attention_mask, like=input_ids)
        positions = _positions(input_ids, attention_mask, position_ids)
        layout = RowLayout.of(rows, documents)
        tokens = StepTokens.of(layout, num_steps, documents.numel())
        return cls(documents, any_packed(documents), positions, num_steps, layout, tokens)

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "UnrollPlan":
        """The same plan, with each of its tensors changed, for instance moved; what was counted on the host stays."""
        return replace(
            self,
            documents=change(self.documents),
            position_ids=change(self.position_ids),
            layout=self.layout.each(change),
            tokens=self.tokens.each(change),
            supervised=None if self.supervised is None else self.supervised.each(change),
            segments=None if self.segments is None else self.segments.each(change),
        )


def _positions(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """The given positions, or those counted along the unpadded tokens."""
    if position_ids is not None:
        return position_ids

    present = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    return (present.cumsum(-1) - 1).clamp_min(0)
