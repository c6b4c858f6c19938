"""The loss of a draft's distributions against the target's: soft cross-entropy, and the LK losses.

An objective receives the factor of each TTT step's SUM over supervised rows in the final loss: whoever has the whole
accumulated batch divides once, beforehand.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..targets.features import TargetDistribution
from .fused_head import FusedHeadLoss, LossRows, acceptance_rates, in_autocast
from .output import EagleOutput, Objective
from .supervision import SupervisionPlan


# (rows, hidden) -> what a head multiplies, `(rows, width)` and `(vocabulary, width)`
HeadOperands = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class DraftObjective:
    """A loss of the draft's logits against the target's distribution (contract section 2).

    Args:
        loss: `"ce"` is `-sum_v p(v) log q(v)` over the draft vocabulary, `p` renormalised to it. `"lk_alpha"` is
            `-log alpha`, `alpha = sum_v min(p_full(v), q(v))`. `"lk_lambda"` is `lam * ce + (1 - lam) * (1 - alpha)`,
            `lam = lk_scale * exp(-lk_decay * mean alpha)` without a gradient (arXiv 2602.23881). The mean is taken over
            this forward's rows, so `lk_lambda` alone depends on how a batch is split.
        oov_rows: whether the loss skips rows whose target argmax lies outside the draft vocabulary (`"mask"`), or keeps
            them (`"renormalize"`). They stay in the count that divides, and count as wrong in the accuracy.
        lk_scale, lk_decay: the constants of `lk_lambda`.
    """

    loss: str = "ce"
    oov_rows: str = "mask"
    lk_scale: float = 1.0
    lk_decay: float = 3.0

    @property
    def needs_mass(self) -> bool:
        """Whether the target's full softmax is needed, beyond the draft vocabulary."""
        return self.loss != "ce"

    def bind(
        self,
        plan: SupervisionPlan,
        teacher: TargetDistribution,
        step_factors: torch.Tensor,
        operands: HeadOperands | None = None,
    ) -> Objective:
        """Build the callable that a draft's unroll takes, for one batch.

        Args:
            plan: which row counts at which step, and where its target is.
            teacher: the target's distribution at `plan.positions`.
            step_factors: `(steps,)`, the factor of each step's summed loss in the final one.
            operands: what the head multiplies, if it is more than a weight.

        Returns:
            A function of the normed hidden states of all steps, `(steps, N, hidden)`, and of the head.
        """

        def objective(normed: torch.Tensor, head: nn.Module):
            steps, count, _ = normed.shape
            indices, taught = self._taught(plan, teacher)

            # the rows of all steps at once: the head runs once, in full chunks
            step = indices // count
            x = normed.flatten(0, 1)[indices]
            x, weight = (x, head.weight) if operands is None else operands(x)

            factor = step_factors.float()[step]
            rows = LossRows(
                loss=self.loss,
                probs=teacher.probs,
                argmax=teacher.argmax,
                mass=teacher.mass,
                where=plan.position_of.flatten()[indices],
                factor=factor if taught is None else factor.masked_fill(~taught, 0),
            )

            def summed(values: torch.Tensor) -> torch.Tensor:
                return summed_by_step(values if taught is None else values.masked_fill(~taught, 0), step, steps)

            cast = None
            if self.loss == "lk_lambda":
                cast = in_autocast(weight.detach())  # once for both runs of the head
                alphas = acceptance_rates(x, cast, rows)
                mean = summed(alphas) / summed(torch.ones_like(step)).clamp_min(1)
                rows.ce_share = (self.lk_scale * torch.exp(-self.lk_decay * mean))[step]

            loss, losses, hits = FusedHeadLoss.apply(x, weight, rows, torch.is_grad_enabled(), cast)
            hits = hits & teacher.in_draft[rows.where]
            return EagleOutput(loss=loss, loss_sums=summed(losses), correct=summed_by_step(hits, step, steps))

        return objective

    def _taught(self, plan: SupervisionPlan, teacher: TargetDistribution) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Flat indices of rows for the head, as in `plan.indices`, and which of them are trained on; `None` for all.

        Skipped rows neither train the draft nor count as correct. A CPU does not compute them. How many there are only
        the target's answer tells, for which the host would wait, so an accelerator computes them all.
        """
        if self.oov_rows != "mask":
            return plan.indices, None

        taught = teacher.in_draft[plan.position_of.flatten()[plan.indices]]
        return (plan.indices[taught], None) if taught.device.type == "cpu" else (plan.indices, taught)


def summed_by_step(values: torch.Tensor, step: torch.Tensor, steps: int) -> torch.Tensor:
    """Sum the values of each step, `(steps,)`; integers stay integers."""
    values = values.long() if values.dtype == torch.bool else values
    return values.new_zeros(steps).index_add_(0, step, values)


def estimated_acceptance_length(accuracies: list[float]) -> float:
    """Teacher-forced estimate `1 + sum_k prod_{j <= k} accuracy_j`, not a measured acceptance length."""
    total, product = 1.0, 1.0
    for accuracy in accuracies:
        product *= accuracy
        total += product
    return total
