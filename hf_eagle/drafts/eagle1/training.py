"""Train an EAGLE-1/2 draft to predict the target's next feature, from features with noise (arXiv 2401.15077)."""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import smooth_l1_loss

from ...data.collators import number_documents
from ...losses.fused_head import FusedHeadLoss, StreamedRows
from ...losses.output import EagleOutput, Objective
from ...losses.supervision import SupervisionPlan
from ..training_base import DraftTraining, HeadTeacher, Lesson
from ..unroll_plan import UnrollPlan
from .configuration import Eagle1Config


@dataclass
class FeatureObjective:
    """EAGLE-1's loss of a predicted feature `f^` against the target's `f` (arXiv 2401.15077; contract section 3).

    `regression_weight * smooth_l1(f^, f) + ce_weight * cross-entropy`. The first has beta 1 and is a mean over the
    feature's width. The second is between the outputs of the target's head for both, over the full vocabulary.

    Args:
        regression_weight, ce_weight: of the two parts.
    """

    regression_weight: float = 1.0
    ce_weight: float = 0.1

    def bind(self, plan: SupervisionPlan, teacher: HeadTeacher, step_factors: torch.Tensor) -> Objective:
        """As [`DraftObjective.bind`], for the predicted features of one step, `(1, N, hidden)`."""

        def objective(predicted: torch.Tensor, head: nn.Module):
            predicted, where = predicted[0], plan.position_of[0]
            factor = step_factors.float().expand(len(where))

            wanted = teacher.hidden[where].float()
            regression = smooth_l1_loss(predicted.float(), wanted, beta=1.0, reduction="none").mean(-1)

            # the head runs in the loss a chunk at a time, so that full logits never exist at once
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
        kind: `"none"`; `"uniform"`, `(U[0, 1) - 0.5) * 0.2 * 512 / tokens of the document`; or `"gaussian"`, with
            standard deviation 0.2, whatever the length.
    """
    if kind == "none":
        return features
    if kind == "gaussian":
        return features + 0.2 * torch.randn_like(features)

    number = number_documents(documents)
    # not `bincount`, whose result has a size that the host would wait for
    lengths = torch.zeros_like(number).index_add_(0, number, torch.ones_like(number))[number].view(documents.shape)
    width = (0.2 * 512 / lengths).to(features.dtype)[..., None]
    return features + (torch.rand_like(features) - 0.5) * width


class Eagle1Training(DraftTraining):
    """One step, and a loss on features.

    Args:
        objective: the loss.
        feature_noise: what is added to the features in training, see `add_feature_noise`.
        supervision: which rows count, see `supervised_steps`.
    """

    def __init__(self, objective: FeatureObjective, feature_noise: str = "none", supervision: str = "serving"):
        self.objective, self.feature_noise, self.supervision = objective, feature_noise, supervision
        self.step_weights = torch.ones(1)

    def plan(self, batch, draw) -> UnrollPlan:
        return UnrollPlan.of(batch, 1, self.supervision)

    def teach(self, target, draft, seen, plan, step_factors, dtype) -> Lesson:
        """The next features without noise, and the target's own head. The draft's input gets noise only in training,
        so that it learns to bear its own errors."""
        hidden = seen.last_hidden.flatten(0, 1)[plan.supervised.positions]
        teacher = HeadTeacher(hidden, target.teacher_head(), dtype)

        if draft.training:
            noisy = add_feature_noise(seen.last_hidden, plan.documents, self.feature_noise)
            seen = replace(seen, last_hidden=noisy)
        return Lesson(seen, self.objective.bind(plan.supervised, teacher, step_factors))


def training_for(args, config: Eagle1Config) -> Eagle1Training:
    """From the arguments of a run, see `EagleArguments`."""
    objective = FeatureObjective(args.regression_weight, args.ce_weight)
    return Eagle1Training(objective, args.feature_noise, args.supervision)
