"""Train an EAGLE-3 draft, unrolled on its own output, on the target's distributions (arXiv 2503.01840)."""

import torch

from ...losses.objectives import DraftObjective
from ..training_base import DraftTraining, Lesson
from ..unroll_plan import UnrollPlan
from .configuration import EagleConfig


# steps of the training-time test by default
DEFAULT_STEPS = 7


class Eagle3Training(DraftTraining):
    """The training-time test: several steps, each compared with the target's distribution of the token it predicts.

    Args:
        objective: the loss.
        num_steps: TTT steps.
        step_weight: the weight of step s is `step_weight ** s`, divided by the sum of all weights.
        supervision: which rows count, see `supervised_steps`.
        sees_embeddings: see [`DraftTraining`].
        window: of the draft's attention, see [`EagleConfig`].
        loss_window: rows of a document that are trained at most, side by side; `None` for all.

    Raises:
        ValueError: for a window in which the last step would see no key of the target's features.
    """

    def __init__(
        self,
        objective: DraftObjective,
        num_steps: int = DEFAULT_STEPS,
        step_weight: float = 0.8,
        supervision: str = "serving",
        sees_embeddings: bool = False,
        window: int | None = None,
        loss_window: int | None = None,
    ):
        if window is not None and window <= num_steps:
            raise ValueError(
                f"`draft_sliding_window` is {window}, but must be above the {num_steps} steps of the training-time "
                "test (`ttt_steps`): a later step sees its own keys of the earlier ones first."
            )

        self.objective, self.supervision, self.sees_embeddings = objective, supervision, sees_embeddings
        self.window, self.loss_window = window, loss_window
        weights = torch.tensor([step_weight**s for s in range(num_steps)])
        self.step_weights = weights / weights.sum()

    def plan(self, batch, draw) -> UnrollPlan:
        return UnrollPlan.of(batch, self.steps, self.supervision, self.window, self.loss_window, draw)

    def teach(self, target, draft, seen, plan, step_factors, dtype) -> Lesson:
        """The target's distributions over the draft's vocabulary, cheaper if the summary of the whole head is known."""
        positions = plan.supervised.positions
        teacher = target.distribution(
            seen.last_hidden.flatten(0, 1)[positions],
            draft.draft_ids,
            dtype=dtype,
            with_mass=self.objective.needs_mass,
            head_summary=None if seen.head_summary is None else seen.head_summary.at(positions),
        )

        return Lesson(seen, self.objective.bind(plan.supervised, teacher, step_factors, draft.head_operands))


def training_for(args, config: EagleConfig) -> Eagle3Training:
    """From the arguments of a run, see `EagleArguments`."""
    return Eagle3Training(
        DraftObjective(args.loss, args.oov_rows, args.lk_scale, args.lk_decay),
        args.ttt_steps or DEFAULT_STEPS,
        args.step_weight,
        args.supervision,
        sees_embeddings=config.image_embeddings != "token",
        window=config.draft_sliding_window,
        loss_window=args.loss_window,
    )
