"""What a draft is trained on: soft cross-entropy over the draft vocabulary, and the LK losses.

Every objective returns SUMS over supervised rows; whoever holds the whole accumulated batch divides once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from .supervision import SupervisionPlan
    from .targets.target import TargetDistribution


@dataclass
class DraftObjective:
    """A loss of the draft's logits against the target's distribution (contract section 2).

    Args:
        loss: `"ce"` is `-sum_v p(v) log q(v)` over the draft vocabulary, `p` renormalised to it. `"lk_alpha"` is
            `-log alpha`, `alpha = sum_v min(p_full(v), q(v))`. `"lk_lambda"` is `lam * ce + (1 - lam) * (1 - alpha)`,
            `lam = lk_scale * exp(-lk_decay * mean alpha)` without a gradient (arXiv 2602.23881). The mean is taken over
            this forward's rows, so `lk_lambda` alone depends on how a batch is split.
        oov_rows: rows whose target argmax lies outside the draft vocabulary are left out of the loss (`"mask"`), or
            kept (`"renormalize"`). They stay in the count that divides, and count as wrong in the accuracy.
        lk_scale, lk_decay: of `lk_lambda`.
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
        self, plan: "SupervisionPlan", teacher: "TargetDistribution"
    ) -> Callable[[int, torch.Tensor, Callable], tuple[torch.Tensor, torch.Tensor]]:
        """The callable a draft's unroll takes, for one batch.

        Args:
            plan: which row counts at which step, and where its target is.
            teacher: the target's distribution at `plan.positions`.
        """

        def objective(step: int, normed: torch.Tensor, head: Callable) -> tuple[torch.Tensor, torch.Tensor]:
            counts = plan.counted[step]
            if normed.shape[0] == 0:  # still a function of every parameter
                nothing = head(normed).float().sum() + normed.float().sum()
                return nothing, nothing.detach().long()
            where = plan.position_of[step][counts]
            logits = head(normed[counts]).float()
            kept = teacher.in_draft[where]
            correct = (logits.detach().argmax(-1) == teacher.argmax[where]) & kept
            kept = kept if self.oov_rows == "mask" else torch.ones_like(kept)
            mass = teacher.mass[where] if self.needs_mass else None
            losses = self._rows(logits, teacher.probs[where].float(), mass, kept)
            # where, not a product: a row that is left out may hold an infinity
            return torch.where(kept, losses, 0.0).sum(), correct.sum()

        return objective

    def _rows(self, logits, probs, mass, kept) -> torch.Tensor:
        """Loss of each row `(rows,)`."""
        log_q = logits.log_softmax(-1)
        if self.loss == "ce":
            return -(probs * log_q).sum(-1)
        alpha = torch.minimum(probs * mass[:, None], log_q.exp()).sum(-1)
        if self.loss == "lk_alpha":
            return -alpha.clamp_min(torch.finfo(alpha.dtype).tiny).log()
        mean = torch.where(kept, alpha.detach(), 0.0).sum() / kept.sum().clamp_min(1)
        share = self.lk_scale * torch.exp(-self.lk_decay * mean)
        return share * -(probs * log_q).sum(-1) + (1 - share) * (1 - alpha)


def estimated_acceptance_length(accuracies: list[float]) -> float:
    """Teacher-forced estimate `1 + sum_k prod_{j <= k} accuracy_j`: an estimate, not a measured acceptance length."""
    total, product = 1.0, 1.0
    for accuracy in accuracies:
        product *= accuracy
        total += product
    return total
