"""The plan of a batch for drafts unrolled token by token: which rows, which keys they see, and where."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..data.collators import any_packed, documents_of, mark_padding
from ..losses.supervision import SupervisionPlan, supervised_steps
from ..targets.packed_attention import Segments
from .drawn_rows import draw_together
from .row_layout import RowLayout
from .training_base import Draw, PlanOfTensors


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
    def of(
        cls,
        batch: Mapping[str, Any],
        num_steps: int,
        supervision: str = "serving",
        window: int | None = None,
        loss_window: int | None = None,
        draw: Draw | None = None,
    ) -> "UnrollPlan":
        """From a collator's output, see [`DraftTraining.plan`].

        Args:
            batch: of a collator, on the CPU.
            num_steps: TTT steps.
            supervision: which rows count, see `supervised_steps`.
            window: as in [`RowLayout`].
            loss_window: rows of a document that count at most, drawn with `draw`; all when `None`.
        """
        documents = documents_of(batch)
        counted = supervised_steps(batch["loss_mask"], documents, num_steps, supervision)
        if loss_window is not None:
            counted &= draw_together(batch["input_ids"], documents, counted.any(0), loss_window, draw)
        supervised = SupervisionPlan.of(counted)
        layout = RowLayout.of(supervised.rows, documents, window).counted()
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
        window: int | None = None,
    ) -> "UnrollPlan":
        """For chosen rows, `(N,)` flat ids `b * length + t`, ascending; all rows when `None`."""
        if rows is None:
            rows = torch.arange(input_ids.numel(), device=input_ids.device)

        documents = mark_padding(documents, attention_mask, like=input_ids)
        positions = _positions(input_ids, attention_mask, position_ids)
        layout = RowLayout.of(rows, documents, window)
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
