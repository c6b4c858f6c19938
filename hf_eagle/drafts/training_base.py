"""What every kind of draft defines for its training: which rows of a batch count, and their targets."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch

from ..losses.output import Objective
from ..targets.features import TargetFeatures
from ..targets.packed_attention import Segments


@dataclass(frozen=True)
class Draw:
    """Where a plan's random choices come from: only from the run's seed, the epoch and the example.

    So they do not change with the number of ranks and workers, or when a run resumes.
    """

    seed: int = 0
    epoch: int = 0

    def generator(self, tokens: torch.Tensor) -> torch.Generator:
        """For one example, identified by its tokens `(length,)` without padding, on the CPU."""
        digest = blake2b(tokens.numpy().tobytes(), digest_size=8, key=f"{self.seed} {self.epoch}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


class BatchPlan(ABC):
    """What to train on in one batch. It depends only on the batch's tokens, and is made on the CPU.

    Attributes:
        documents: `(batch, length)`, the document of each token, negative on padding.
        packed: whether a row holds more than one document.
        counts: `(steps,)`, what each step's summed loss is divided by, over the whole accumulated batch.
        segments: the documents, end to end. With them a target on a device need not wait for where documents end.
    """

    documents: torch.Tensor
    packed: bool
    counts: torch.Tensor
    segments: Segments | None = None

    @abstractmethod
    def to(self, device: torch.device | str, non_blocking: bool = False) -> "BatchPlan":
        """The plan on the device of a step."""

    def pin_memory(self) -> "BatchPlan":
        """The plan in pinned memory, so that sending it to a device does not wait; a `DataLoader` calls this. A plan
        that is not pinned is sent too, with a wait."""
        return self


class PlanOfTensors(BatchPlan):
    """A plan that can change each of its tensors: moving and pinning them follow from that."""

    @abstractmethod
    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PlanOfTensors":
        """The same plan, with each of its tensors changed, for instance moved; what was counted on the host stays."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PlanOfTensors":
        if self.documents.device == torch.device(device):
            return self
        return self.each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PlanOfTensors":
        return self.each(torch.Tensor.pin_memory)


@dataclass
class HeadTeacher:
    """What a draft that uses its target's head is compared with.

    Attributes:
        hidden: `(positions, hidden)`, the target's last hidden states.
        logits: the target's logits `(rows, vocabulary)` from such.
        dtype: of the distributions made from them.
    """

    hidden: torch.Tensor
    logits: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype


@dataclass
class Lesson:
    """What a draft gets for one batch.

    Attributes:
        features: of the target, as the draft sees them.
        objective: compares the draft's output with the target.
    """

    features: TargetFeatures
    objective: Objective


class DraftTraining(ABC):
    """How a kind of draft is trained. It holds only numbers, and travels to the workers that make batches.

    Attributes:
        step_weights: `(steps,)`, the weight of each step in the loss.
        sees_embeddings: whether the draft reads the input of the target's first layer.
    """

    step_weights: torch.Tensor
    sees_embeddings: bool = False

    @property
    def steps(self) -> int:
        """How many summed losses a batch has."""
        return len(self.step_weights)

    def step_factors(self, total: torch.Tensor, processes: int = 1) -> torch.Tensor:
        """`(steps,)`, the factor of each step's summed loss: its weight, divided once by the rows of all batches.

        Args:
            total: `(steps,)`, the rows of each step in all batches whose gradients are added.
            processes: number of processes whose gradients are averaged.
        """
        weights = self.step_weights.to(total.device, non_blocking=True)
        return weights * processes / total.clamp_min(1)

    @abstractmethod
    def plan(self, batch: Mapping[str, Any], draw: Draw) -> BatchPlan:
        """Which rows of a batch to train on.

        Args:
            batch: a collator's output, on the CPU: `input_ids` and `loss_mask` `(batch, length)`, and if it has
                them `attention_mask`, `documents` and `position_ids`.
            draw: where random choices come from.
        """

    @abstractmethod
    def teach(
        self, target, draft, seen: TargetFeatures, plan: BatchPlan, step_factors: torch.Tensor, dtype: torch.dtype
    ) -> Lesson:
        """What the draft gets, and what it is compared with.

        Args:
            target ([`FrozenTarget`]): its head is used.
            draft ([`EaglePreTrainedModel`]): the one that is trained.
            seen: the target's features of the batch.
            plan: of the batch, on the target's device.
            step_factors: `(steps,)`, the factor of each step's summed loss in the final one.
            dtype: in which distributions are kept.
        """
