"""Plan which rows are trained at which TTT step, and find the target's answer to each."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch


def supervised_steps(
    loss_mask: torch.Tensor, documents: torch.Tensor, num_steps: int, supervision: str = "serving"
) -> torch.Tensor:
    """Which rows count at which step: row `t` at step `s` predicts token `t + 2 + s`.

    `serving` counts what a server drafts: tokens `t + 1 .. t + 2 + s` lie in one answer. `reference` is the official
    alignment: token `t + s` belongs to an answer, and token `t + 1 + s` exists (contract section 2).

    Args:
        loss_mask: `(batch, length)`, 1 on the tokens of an answer.
        documents: `(batch, length)`, the document of each token, negative on padding.
        num_steps: TTT steps.
        supervision: `"serving"` or `"reference"`.

    Returns:
        bool `(num_steps, batch, length)`.
    """
    batch, length = loss_mask.shape
    answered = loss_mask.bool() & (documents >= 0)
    starts = answered.clone()
    starts[:, 1:] &= ~answered[:, :-1] | (documents[:, 1:] != documents[:, :-1])
    span = starts.long().cumsum(1).masked_fill(~answered, 0)  # answers are numbered from 1

    counted = torch.zeros(num_steps, batch, length, dtype=torch.bool, device=loss_mask.device)
    for step in range(num_steps):
        if supervision == "serving":
            rows = length - 2 - step
            if rows > 0:
                # the first and the last token bear one answer's number, so all between them do
                first, last = span[:, 1 : 1 + rows], span[:, 2 + step :]
                in_answer = (first > 0) & (first == last)
                counted[step, :, :rows] = in_answer & (documents[:, :rows] == documents[:, 1 : 1 + rows])
        else:
            rows = length - 1 - step
            if rows > 0:
                same = documents[:, :rows] == documents[:, 1 + step :]
                counted[step, :, :rows] = answered[:, step : step + rows] & same & (documents[:, :rows] >= 0)

    return counted


@dataclass
class SupervisionPlan:
    """The rows an unroll computes, and what each of them is compared with.

    Attributes:
        rows: `(N,)` flat ids `b * length + t` of the rows supervised at one step or more, ascending.
        counted: bool `(steps, N)`.
        positions: `(P,)` flat ids of the tokens whose target distribution is needed, ascending.
        position_of: `(steps, N)` indices into `positions`; 0 where a row does not count.
        indices: `(M,)` flat ids `s * N + n` of the rows that count, of all steps, ascending; found in `counted` if not
            given.
    """

    rows: torch.Tensor
    counted: torch.Tensor
    positions: torch.Tensor
    position_of: torch.Tensor
    indices: torch.Tensor | None = None

    def __post_init__(self):
        if self.indices is None:  # before it is sent to a device, which would have to say how many there are
            self.indices = self.counted.flatten().nonzero()[:, 0]

    @property
    def counts(self) -> torch.Tensor:
        """Supervised rows of each step, `(steps,)`."""
        return self.counted.sum(1)

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "SupervisionPlan":
        """The same plan, with each of its tensors changed, for instance moved."""
        return SupervisionPlan(**{f.name: change(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SupervisionPlan":
        """On another device."""
        return self.each(lambda x: x.to(device, non_blocking=non_blocking))

    @classmethod
    def of(cls, counted: torch.Tensor) -> "SupervisionPlan":
        """From `supervised_steps`: bool `(steps, batch, length)`."""
        num_steps = counted.shape[0]
        flat = counted.flatten(1)
        rows = flat.any(0).nonzero()[:, 0]
        counted = flat[:, rows]

        steps = torch.arange(num_steps, device=rows.device)[:, None]
        # row t at step s is compared with what the target says at token t + 1 + s
        indices = (rows[None] + 1 + steps).masked_fill(~counted, -1)
        positions = torch.unique(indices[counted])
        position_of = torch.searchsorted(positions, indices).masked_fill(~counted, 0)
        return cls(rows=rows, counted=counted, positions=positions, position_of=position_of)
