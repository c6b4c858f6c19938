"""One batch, from its tokens to its loss, in order: plan, target's features, teach, unroll."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

from ..data.collators import told_to_target
from ..data.columns import read_batch
from ..data.streaming import NO_ROW
from ..drafts.training_base import BatchPlan, DraftTraining, Draw, Lesson
from ..losses.output import EagleOutput
from ..store.cache import FeatureCache
from ..targets.features import TargetFeatures
from ..targets.media_inputs import RopeIndex
from ..targets.target import FrozenTarget
from ..targets.vision_sizes import SizesOfMedia


# columns of a batch that the target must not see
OWN_COLUMNS = ("loss_mask", "stored", "plan", "documents", "rope_index", "vision_sizes")


class TrainingStep:
    """The step of one batch, which the Trainer and the benchmark share.

    Args:
        target: the target.
        training: how the draft's kind is trained.
        dtype: of distributions kept between the target's part and the draft's.
        feature_cache: gives features instead of the target.
    """

    def __init__(
        self,
        target: FrozenTarget,
        training: DraftTraining,
        dtype: torch.dtype = torch.float32,
        feature_cache: FeatureCache | None = None,
    ):
        self.target, self.training, self.dtype, self.feature_cache = target, training, dtype, feature_cache

    def __call__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        draft: nn.Module | None = None,
        total: torch.Tensor | None = None,
        processes: int = 1,
        draw: Draw | None = None,
    ) -> tuple[EagleOutput, torch.Tensor]:
        """The loss of a batch.

        Args:
            model: the module to call: the draft, or its wrapper.
            batch: the collator's output; `input_ids` and `loss_mask` are `(batch, length)`.
            draft: the draft inside `model`.
            total: `(steps,)` rows of the whole accumulated global batch; this batch's own if `None`.
            processes: the number whose gradients are averaged.
            draw: where random choices come from, for a batch without a plan.

        Returns:
            The draft's output, and the supervised rows of each step, `(steps,)`.
        """
        plan = self.plan(batch, draw)
        counts = plan.counts
        seen = self.target_features(batch, plan)
        lesson = self.teach(draft or model, seen, plan, self.step_factors(counts, total, processes))
        return self.unroll(model, batch, plan, lesson), counts

    def plan(self, batch: Mapping[str, Any], draw: Draw | None = None) -> BatchPlan:
        """Which rows of the batch are trained on: the plan that came with it, or a new one if its collator made none.

        Code that changes the `loss_mask` of a batch must remove its `plan`; then it is planned anew.
        """
        plan = batch.get("plan")
        if plan is None or plan.documents.shape != batch["input_ids"].shape:  # the batch was cut since
            on_host = {name: x.cpu() for name, x in batch.items() if isinstance(x, torch.Tensor)}
            plan = self.training.plan(read_batch(on_host, self.target.config.vocab_size), draw or Draw())

        return plan.to(batch["input_ids"].device, non_blocking=True)

    def target_features(self, batch: Mapping[str, Any], plan: BatchPlan) -> TargetFeatures:
        """What the target, or the store in its place, says of the batch."""
        asked = {name: x for name, x in batch.items() if name not in OWN_COLUMNS}
        asked |= told_to_target(batch, plan.documents, plan.packed)
        if plan.segments is not None:
            asked["segments"] = plan.segments
        if "rope_index" in batch:
            asked["position_ids"] = batch["rope_index"]
        if "vision_sizes" in batch:
            asked["vision_sizes"] = batch["vision_sizes"]
        if self.feature_cache is None:
            seen = self.target(**asked)
        else:
            seen = self.feature_cache(batch, lambda: self.target(**asked))

        if not self.training.sees_embeddings:
            seen.embeddings = None  # as large as a tap
        return seen

    def step_factors(self, counts: torch.Tensor, total: torch.Tensor | None, processes: int) -> torch.Tensor:
        """`(steps,)`, the factor of each step's summed loss, by the rows of all batches or, without them, of this."""
        if total is None:
            return self.training.step_factors(counts)
        # data parallelism averages gradients
        return self.training.step_factors(total.to(counts.device, non_blocking=True), processes)

    def teach(self, draft: nn.Module, seen: TargetFeatures, plan: BatchPlan, step_factors: torch.Tensor) -> Lesson:
        """What the draft gets, and what it is compared with."""
        return self.training.teach(self.target, draft, seen, plan, step_factors, self.dtype)

    def unroll(self, model: nn.Module, batch: Mapping[str, Any], plan: BatchPlan, lesson: Lesson) -> EagleOutput:
        """Run the draft's one forward, and its loss."""
        return model(input_ids=batch["input_ids"], features=lesson.features, plan=plan, objective=lesson.objective)


class PlanningCollator:
    """A collator whose batches also hold `plan`, a [`BatchPlan`]; it checks their columns, see `read_batch`.

    With media they also hold `rope_index`, the target's positions, and `vision_sizes`, see [`VisionSizes`]: both cost a
    device many waits.

    A stream's example without a row is `None`, and is left out of its batch.

    Args:
        collator: makes the batches.
        training: how the draft's kind is trained.
        seed: of the draws.
        target: whose batches they are; it is not kept.
        ahead: told the tokens and documents of each batch that this process makes; a data loader is a batch ahead.
    """

    def __init__(
        self,
        collator,
        training: DraftTraining,
        seed: int,
        target: FrozenTarget,
        ahead: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    ):
        self.collator, self.training, self.seed, self._ahead = collator, training, seed, ahead
        self.vocab_size = target.vocab_size
        self.of_media = {"rope_index": RopeIndex(target.model), "vision_sizes": SizesOfMedia(target.model)}
        # shared, so that persistent workers see the next epoch
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()

    @property
    def draw(self) -> Draw:
        """Where random choices come from in this epoch."""
        return Draw(self.seed, int(self._epoch))

    def begin_epoch(self, epoch: int) -> None:
        """Draw anew in all batches from now on."""
        self._epoch.fill_(epoch)

    def __call__(self, rows: list[dict | None]) -> dict:
        rows = [row for row in rows if row is not None] or [NO_ROW]
        batch = read_batch(self.collator(rows), self.vocab_size)
        of_media = {name: make(batch) for name, make in self.of_media.items()}
        of_media = {name: x for name, x in of_media.items() if x is not None}
        plan = self.training.plan(batch, self.draw)
        if self._ahead is not None and get_worker_info() is None:  # a worker's requests would end with it
            self._ahead(batch["input_ids"], plan.documents)
        return {**batch, **of_media, "plan": plan}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_ahead": None}  # for workers


class EpochOfPlans(TrainerCallback):
    """Sets in a collator which pass over the data begins.

    Attributes:
        next (`int`): number of that pass, which the trainer sets when a run begins or resumes.
    """

    def __init__(self, collator: PlanningCollator):
        self.collator, self.next = collator, 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        # counted here, because `state.epoch` of a stream without a length is a share of `max_steps`
        self.collator.begin_epoch(self.next)
        self.next += 1
