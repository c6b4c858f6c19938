"""What a draft is trained on: distributions (soft cross-entropy, LK losses), or the target's next feature (EAGLE-1).

Every objective knows the factor of each TTT step's SUM over supervised rows in the final loss: whoever holds the whole
accumulated batch divides once, beforehand.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import smooth_l1_loss

from ..drafts.adapters import head_operands
from ..drafts.modeling_base import EagleOutput, Objective
from ..drafts.row_layout import number_documents
from .fused_head import FusedHeadLoss, LossRows, StreamedRows, acceptance_rates


if TYPE_CHECKING:
    from ..arguments.objective import EagleArguments
    from ..targets.distribution import FullOutlook, TargetDistribution
    from ..targets.target import FrozenTarget
    from .supervision import SupervisionPlan


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

    def disturb(self, features: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        """Features as a draft is trained on them: as they are."""
        return features

    def ask(
        self,
        target: "FrozenTarget",
        hidden: torch.Tensor,
        draft_ids: torch.Tensor | None,
        dtype: torch.dtype,
        outlook: "FullOutlook | None" = None,
    ):
        """The teacher that `bind` takes: the target's distribution at the last hidden states `(positions, hidden)`,
        for less where their `outlook` is known."""
        return target.distribution(hidden, draft_ids, dtype=dtype, with_mass=self.needs_mass, outlook=outlook)

    def bind(self, plan: "SupervisionPlan", teacher: "TargetDistribution", step_factors: torch.Tensor) -> Objective:
        """The callable a draft's unroll takes, for one batch.

        Args:
            plan: which row counts at which step, and where its target is.
            teacher: the target's distribution at `plan.positions`.
            step_factors: `(steps,)`, the factor of each step's summed loss in the final one.

        Returns:
            A function of the normed hidden states of all steps, `(steps, N, hidden)`, and of the head.
        """

        def objective(normed: torch.Tensor, head: nn.Module):
            steps, count, _ = normed.shape
            kept = plan.counted
            if self.oov_rows == "mask":  # neither learned from nor correct: no need to look at them
                kept = kept & teacher.in_draft[plan.position_of]
            step, row = kept.nonzero(as_tuple=True)
            x, weight = head_operands(head, normed.flatten(0, 1)[step * count + row])
            rows = LossRows(
                loss=self.loss,
                probs=teacher.probs,
                argmax=teacher.argmax,
                mass=teacher.mass,
                where=plan.position_of[step, row],
                factor=step_factors.float()[step],
            )
            if self.loss == "lk_lambda":
                alphas = acceptance_rates(x, weight, rows)
                mean = _sums(alphas, step, steps) / kept.sum(1).clamp_min(1)
                rows.ce_share = (self.lk_scale * torch.exp(-self.lk_decay * mean))[step]
            loss, losses, hits = FusedHeadLoss.apply(x, weight, rows, torch.is_grad_enabled())
            hits = hits & teacher.in_draft[rows.where]
            return EagleOutput(loss=loss, loss_sums=_sums(losses, step, steps), correct=_sums(hits, step, steps))

        return objective


@dataclass
class FeatureTeacher:
    """What a draft of features is compared with.

    Attributes:
        hidden: `(positions, hidden)`, the target's last hidden states.
        logits: the target's logits `(rows, vocabulary)` of such.
        dtype: of the distributions that are made of them.
    """

    hidden: torch.Tensor
    logits: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype


@dataclass
class FeatureObjective:
    """EAGLE-1's loss of a predicted feature `f^` against the target's `f` (arXiv 2401.15077; contract section 3).

    `regression_weight * smooth_l1(f^, f) + ce_weight * cross-entropy`, the first with beta 1 and as a mean over the
    feature's width, the second between what the target's head makes of both over the full vocabulary.

    Args:
        regression_weight, ce_weight: of the two parts.
        feature_noise: what is added to the features in training, see `add_feature_noise`.
    """

    regression_weight: float = 1.0
    ce_weight: float = 0.1
    feature_noise: str = "none"

    def disturb(self, features: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        """Features as a draft is trained on them: with noise, so that it bears the errors of its own."""
        return add_feature_noise(features, documents, self.feature_noise)

    def ask(
        self,
        target: "FrozenTarget",
        hidden: torch.Tensor,
        draft_ids: torch.Tensor | None,
        dtype: torch.dtype,
        outlook: "FullOutlook | None" = None,
    ):
        """The teacher that `bind` takes: the last hidden states `(positions, hidden)`, and the target's whole head."""
        return FeatureTeacher(hidden, target.teacher_head(), dtype)

    def bind(self, plan: "SupervisionPlan", teacher: FeatureTeacher, step_factors: torch.Tensor) -> Objective:
        """As [`DraftObjective.bind`], of the predicted features of one step, `(1, N, hidden)`."""

        def objective(predicted: torch.Tensor, head: nn.Module):
            predicted, where = predicted[0], plan.position_of[0]
            factor = step_factors.float().expand(len(where))
            wanted = teacher.hidden[where].float()
            regression = smooth_l1_loss(predicted.float(), wanted, beta=1.0, reduction="none").mean(-1)
            rows = StreamedRows(
                hidden=teacher.hidden,
                teacher=teacher.logits,
                where=where,
                factor=self.ce_weight * factor,
                transform=head.transform,
                dtype=teacher.dtype,
            )
            ce_total, ce, hits = FusedHeadLoss.apply(predicted, head.weight, rows, torch.is_grad_enabled())
            parts = {"regression_loss": regression.detach().sum()[None], "ce_loss": ce.sum()[None]}
            return EagleOutput(
                loss=self.regression_weight * (regression * factor).sum() + ce_total,
                loss_sums=self.regression_weight * parts["regression_loss"] + self.ce_weight * parts["ce_loss"],
                correct=hits.sum()[None],
                parts=parts,
            )

        return objective


def add_feature_noise(features: torch.Tensor, documents: torch.Tensor, kind: str) -> torch.Tensor:
    """Noise as in the official EAGLE code, drawn from torch's own generator.

    Args:
        features: `(batch, length, hidden)`.
        documents: `(batch, length)`, the document of each token, negative on padding.
        kind: `"none"`; `"uniform"`, `(U[0, 1) - 0.5) * 0.2 * 512 / tokens of the document`; or `"gaussian"`, of
            standard deviation 0.2, whatever the length.
    """
    if kind == "none":
        return features
    if kind == "gaussian":
        return features + 0.2 * torch.randn_like(features)
    number = number_documents(documents)
    lengths = torch.bincount(number)[number].view(documents.shape)
    width = (0.2 * 512 / lengths).to(features.dtype)[..., None]
    return features + (torch.rand_like(features) - 0.5) * width


def objective_of(method: str, args: "EagleArguments") -> DraftObjective | FeatureObjective:
    """What a draft of this method is trained on."""
    if method == "eagle1":
        return FeatureObjective(args.regression_weight, args.ce_weight, args.feature_noise)
    return DraftObjective(args.loss, args.oov_rows, args.lk_scale, args.lk_decay)


def _sums(values: torch.Tensor, step: torch.Tensor, steps: int) -> torch.Tensor:
    """Sum of the values of each step, `(steps,)`; whole numbers stay whole."""
    values = values.long() if values.dtype == torch.bool else values
    return values.new_zeros(steps).index_add_(0, step, values)


def estimated_acceptance_length(accuracies: list[float]) -> float:
    """Teacher-forced estimate `1 + sum_k prod_{j <= k} accuracy_j`: an estimate, not a measured acceptance length."""
    total, product = 1.0, 1.0
    for accuracy in accuracies:
        product *= accuracy
        total += product
    return total
