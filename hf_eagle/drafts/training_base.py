"""What every kind of draft says of its training: which rows of a batch count, and what they are compared with."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch

from ..losses.output import Objective
from ..targets.features import TargetFeatures


@dataclass(frozen=True)
class Draw:
    """Where a plan's random choices come from: they depend on the run's seed, the epoch and the example alone.

    So they are the same for any number of ranks and workers, and when a run is resumed.
    """

    seed: int = 0
    epoch: int = 0

    def generator(self, tokens: torch.Tensor) -> torch.Generator:
        """For one example, known by its tokens `(length,)` without padding, on the CPU."""
        digest = blake2b(tokens.numpy().tobytes(), digest_size=8, key=f"{self.seed} {self.epoch}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


class BatchPlan(ABC):
    """What of one batch is trained on. It depends on the batch's tokens alone, and is made on the CPU.

    Attributes:
        documents: `(batch, length)`, the document of each token, negative on padding.
        packed: whether a row holds more than one document.
        counts: `(steps,)`, what each step's summed loss is divided by, over the whole accumulated batch.
    """

    documents: torch.Tensor
    packed: bool
    counts: torch.Tensor

    @abstractmethod
    def to(self, device: torch.device | str, non_blocking: bool = False) -> "BatchPlan":
        """The plan on the device of a step."""


@dataclass
class Lesson:
    """What a draft is given for one batch.

    Attributes:
        features: of the target, as the draft is to see them.
        objective: compares what the draft makes of them with the target.
    """

    features: TargetFeatures
    objective: Objective


class DraftTraining(ABC):
    """How a kind of draft is trained. It holds numbers only, and travels to the workers that make batches.

    Attributes:
        step_weights: `(steps,)`, the weight of each step in the loss.
        sees_embeddings: whether the draft looks at what the target's first layer gets.
    """

    step_weights: torch.Tensor
    sees_embeddings: bool = False

    @property
    def steps(self) -> int:
        """How many summed losses a batch has."""
        return len(self.step_weights)

    @abstractmethod
    def plan(self, batch: Mapping[str, Any], draw: Draw) -> BatchPlan:
        """Which rows of a batch are trained on.

        Args:
            batch: what a collator made, on the CPU: `input_ids` and `loss_mask` `(batch, length)`, and where it has
                them `attention_mask`, `documents` and `position_ids`.
            draw: where random choices come from.
        """

    @abstractmethod
    def teach(
        self, target, draft, seen: TargetFeatures, plan: BatchPlan, step_factors: torch.Tensor, dtype: torch.dtype
    ) -> Lesson:
        """What the draft is given, and what it is compared with.

        Args:
            target ([`FrozenTarget`]): its head is asked.
            draft ([`EaglePreTrainedModel`]): the one that learns.
            seen: what the target said of the batch.
            plan: of the batch, on the target's device.
            step_factors: `(steps,)`, the factor of each step's summed loss in the final one.
            dtype: of distributions that are kept.
        """
