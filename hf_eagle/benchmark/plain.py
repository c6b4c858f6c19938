"""Train an EAGLE-3 draft the plain way, for comparison: unroll all rows, and compute and keep all their logits.

Loss and gradients equal those of the fast way, which skips the rows that do not count.
"""

from dataclasses import replace

import torch

from ..data.collators import documents_of
from ..drafts.training_base import DraftTraining, Lesson
from ..drafts.unroll_plan import UnrollPlan
from ..losses.output import EagleOutput, Objective
from ..losses.supervision import SupervisionPlan, supervised_steps
from ..targets.features import TargetDistribution


class PlainTraining(DraftTraining):
    """Unroll all rows of a batch at all steps; mask the losses of those that do not count at the end.

    Args:
        num_steps: TTT steps.
        window: of the draft's attention; all keys when `None`.
    """

    def __init__(self, num_steps: int, window: int | None = None):
        self.window = window
        weights = torch.tensor([0.8**s for s in range(num_steps)])
        self.step_weights = weights / weights.sum()

    def plan(self, batch, draw) -> UnrollPlan:
        documents = documents_of(batch)
        counted = supervised_steps(batch["loss_mask"], documents, self.steps).flatten(1)
        rows = torch.arange(documents.numel())

        # ask the target at every token but the first of a sequence, which no row is compared with
        positions = rows.view(documents.shape)[:, 1:].flatten()
        answer_of = torch.zeros(documents.numel() + self.steps, dtype=torch.long)
        answer_of[positions] = torch.arange(len(positions))
        compared = answer_of[rows + 1 + torch.arange(self.steps)[:, None]]

        mask, positions_of_tokens = batch["attention_mask"], batch.get("position_ids")
        where = (mask, positions_of_tokens, documents, self.window)
        plan = UnrollPlan.of_rows(batch["input_ids"], rows, self.steps, *where)
        plan.layout.counted()
        return replace(plan, supervised=SupervisionPlan(rows, counted, positions, compared))

    def teach(self, target, draft, seen, plan, step_factors, dtype) -> Lesson:
        """The target's distributions at all positions."""
        hidden = seen.last_hidden.flatten(0, 1)[plan.supervised.positions]
        teacher = target.distribution(hidden, draft.draft_ids, dtype)
        return Lesson(seen, _masked_cross_entropy(plan.supervised, teacher, step_factors))


def _masked_cross_entropy(plan: SupervisionPlan, teacher: TargetDistribution, step_factors: torch.Tensor) -> Objective:
    """Cross-entropy from the logits of all rows, which autograd keeps for the backward pass."""

    def objective(normed, head):
        losses, hits = [], []
        for hidden, counted, where in zip(normed, plan.counted, plan.position_of, strict=True):
            logits = head(hidden).float()
            row_losses = -(teacher.probs[where].float() * logits.log_softmax(-1)).sum(-1)
            losses.append((row_losses * counted).sum())
            hits.append(((logits.argmax(-1) == teacher.argmax[where]) & counted).sum())

        losses = torch.stack(losses)
        return EagleOutput(loss=(step_factors * losses).sum(), loss_sums=losses.detach(), correct=torch.stack(hits))

    return objective
