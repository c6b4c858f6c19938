"""Which rows a step takes: orders drawn only from seed and epoch, and how ranks share a pass.

Other draws from torch's own generator (noise, dropout) may differ between ranks and after resuming. So no order is
drawn from it: ranks with different orders would train on some rows twice and never on others.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import accelerate
import torch
from packaging.version import Version
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler, get_length_grouped_indices

from ..drafts.training_base import Draw


# the first accelerate that deals batches of different sizes
_DEALS_UNEVEN = Version("1.14")


def check_dealt(args) -> None:
    """`ValueError` for arguments of a run with which several ranks would get different numbers of batches, or none."""
    if args.world_size < 2:
        return

    if not args.accelerator_config.even_batches:
        raise ValueError(
            "`even_batches` is false in `accelerator_config`: a rank whose data end early would leave the others "
            "waiting forever; set it to true."
        )
    if (
        args.train_sampling_strategy == "batch_rebalance"
        and Version(accelerate.__version__).release < _DEALS_UNEVEN.release
    ):
        raise ValueError(
            f"`train_sampling_strategy` batch_rebalance on several ranks needs accelerate {_DEALS_UNEVEN} or newer, "
            f"and this is {accelerate.__version__}: install a newer one, or set it to group_by_length."
        )


def _generator(draw: Draw) -> torch.Generator:
    return torch.Generator().manual_seed(draw.seed + draw.epoch)


class DrawnOrder(Sampler):
    """The rows of a data set in a new order each epoch, the same on all ranks and after resuming.

    Args:
        rows: of the data set.
        draw: returns what the order is drawn from.
        lengths: tokens of each row; with it, rows of similar lengths are neighbours.
        group: rows to make similar in length: those of a step, on all ranks together.
    """

    def __init__(self, rows: int, draw: Callable[[], Draw], lengths: list[int] | None = None, group: int | None = None):
        self.rows, self.draw, self.lengths, self.group = rows, draw, lengths, group

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = _generator(self.draw())

        if self.lengths is not None:
            return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))
        return iter(torch.randperm(self.rows, generator=generator).tolist())


class RebalancedBatches(BatchRebalanceSampler):
    """`BatchRebalanceSampler`, drawn from seed and epoch, with filler rows in known places.

    A last step with fewer rows than batches is filled up with rows that were seen already. They come last, and each
    batch of that step has one row.

    Args:
        sampler: the one that `Trainer` made.
        draw: returns what the order is drawn from.
    """

    def __init__(self, sampler: BatchRebalanceSampler, draw: Callable[[], Draw]):
        names = ("lengths", "effective_batch_size", "dp_size", "grad_accum", "rank", "drop_last")
        super().__init__(**{name: getattr(sampler, name) for name in names})
        self.draw = draw

    @property
    def is_completed(self) -> bool:
        """Whether the last step has fewer rows than batches."""
        return self.has_tail and self.remainder < self.dp_size * self.grad_accum

    @property
    def own_batches(self) -> int:
        """Batches of all ranks in a pass that hold new rows."""
        a_step = self.dp_size * self.grad_accum
        return self.num_global_batches * a_step - (a_step - self.remainder if self.is_completed else 0)

    def __iter__(self) -> Iterator[list[int]]:
        draw = self.draw()
        self.seed, self.epoch = draw.seed, draw.epoch
        if not self.is_completed:
            yield from super().__iter__()
            return

        yield from islice(super().__iter__(), self.num_full_batches * self.grad_accum)
        order = torch.randperm(len(self.lengths), generator=_generator(draw)).tolist()
        tail = order[-self.remainder :]

        places = range(self.rank, self.dp_size * self.grad_accum, self.dp_size)
        yield from ([tail[place] if place < len(tail) else order[0]] for place in places)


def drawn(sampler: Sampler | None, draw: Callable[[], Draw], rows_per_step: int) -> Sampler | None:
    """`Trainer`'s sampler, or a replacement that draws only from seed and epoch.

    Args:
        sampler: the one that `Trainer` made.
        draw: returns what orders are drawn from.
        rows_per_step: rows of an optimizer step, on all ranks together.
    """
    if isinstance(sampler, BatchRebalanceSampler):
        return RebalancedBatches(sampler, draw)
    if isinstance(sampler, LengthGroupedSampler):
        return DrawnOrder(len(sampler), draw, sampler.lengths, rows_per_step)
    return DrawnOrder(len(sampler), draw) if isinstance(sampler, RandomSampler) else sampler


@dataclass(frozen=True)
class Dealing:
    """How ranks share the rows of a pass: each gets `share` of every `ranks * share` rows, in order.

    accelerate fills up the last of them with rows that were seen already, since all ranks must take equally many
    batches. These rows belong to no rank: they are computed, but not counted.

    Attributes:
        rows: of the pass.
        share: rows of a rank's batch.
        batches: that each rank takes.
        ranks, rank: how many ranks, and which.
    """

    rows: int
    share: int
    batches: int
    ranks: int = 1
    rank: int = 0

    @classmethod
    def of(cls, loader: DataLoader, args) -> "Dealing | None":
        """Read from a data loader that accelerate made; `None` for a stream, or for batches made in another way.

        Args:
            loader: the loader.
            args ([`TrainingArguments`]): of the run.
        """
        batches = loader.batch_sampler
        while hasattr(batches, "batch_sampler"):  # unwrap a rank's part of them
            batches = batches.batch_sampler

        ranks, rank = args.world_size, args.process_index

        if isinstance(batches, RebalancedBatches):
            # count batches instead of rows: only the last step may have batches that belong to no rank
            return cls(batches.own_batches, 1, len(loader), ranks, rank)
        if isinstance(loader.dataset, IterableDataset) or not isinstance(batches, BatchSampler):
            return None

        share = batches.batch_size // ranks if args.accelerator_config.split_batches else batches.batch_size
        return cls(len(batches.sampler), share, len(loader), ranks, rank)

    def without_filler(self, batch: dict[str, Any], place: int) -> dict[str, Any]:
        """A rank's batch with only its own rows supervised; its plan is dropped if that changes it.

        Args:
            batch: what the collator made.
            place: the batch's number in the pass, counted from 0.
        """
        left, size = self.rows - place * self.ranks * self.share, len(batch["loss_mask"])
        own = max(left - self.rank * size, 0)
        if left >= self.ranks * self.share or own >= size:
            return batch

        loss_mask = batch["loss_mask"].clone()
        loss_mask[own:] = 0
        return {name: x for name, x in batch.items() if name != "plan"} | {"loss_mask": loss_mask}

    def end_of_pass(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The last batches of a pass, each `without_filler`."""
        first = self.batches - len(batches)
        return [self.without_filler(batch, first + n) for n, batch in enumerate(batches)]
