"""Which rows a step takes: orders drawn from seed and epoch alone, and how a pass is dealt out to the ranks.

Whatever else is drawn from torch's own generator (noise, dropout) may differ between ranks and after a resumption, so
no order is drawn from it: ranks with different orders would train on some rows twice and never on others.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler, get_length_grouped_indices

from ..drafts.training_base import Draw


def _generator(draw: Draw) -> torch.Generator:
    return torch.Generator().manual_seed(draw.seed + draw.epoch)


class DrawnOrder(Sampler):
    """The rows of a data set in an order of each epoch's own, the same on all ranks and after a resumption.

    Args:
        rows: of the data set.
        draw: says what the order is drawn from.
        lengths: tokens of each row; rows of similar lengths follow each other then.
        group: rows that are to be of similar lengths: those of a step, of all ranks together.
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
    """`BatchRebalanceSampler`, drawn from seed and epoch, whose completed rows have known places.

    A last step of fewer rows than batches is completed with rows that were seen already: they come last, and each batch
    of that step has one row.

    Args:
        sampler: the one that `Trainer` made.
        draw: says what the order is drawn from.
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
        """Batches of all ranks in a pass that hold rows which were not seen before."""
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
    """`Trainer`'s sampler, or one in its place that draws from seed and epoch alone.

    Args:
        sampler: what `Trainer` made.
        draw: says what orders are drawn from.
        rows_per_step: rows of an optimizer step, of all ranks together.
    """
    if isinstance(sampler, BatchRebalanceSampler):
        return RebalancedBatches(sampler, draw)
    if isinstance(sampler, LengthGroupedSampler):
        return DrawnOrder(len(sampler), draw, sampler.lengths, rows_per_step)
    return DrawnOrder(len(sampler), draw) if isinstance(sampler, RandomSampler) else sampler


@dataclass(frozen=True)
class Dealing:
    """How the rows of a pass are dealt out: each rank gets `share` of every `ranks * share` rows in their order.

    accelerate completes the last of them with rows that were seen already, since all ranks must take equally many
    batches. These rows are nobody's own: they are computed, and count nothing.

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
        """Read off a data loader that accelerate made; `None` of a stream's, or of batches made in some other way.

        Args:
            loader: the loader.
            args ([`TrainingArguments`]): of the run.
        """
        batches = loader.batch_sampler
        while hasattr(batches, "batch_sampler"):  # a rank's part of them
            batches = batches.batch_sampler
        ranks, rank = args.world_size, args.process_index
        if isinstance(batches, RebalancedBatches):
            # a row a batch stands for all of its rows: the last step alone may have batches of nobody's
            return cls(batches.own_batches, 1, len(loader), ranks, rank)
        if isinstance(loader.dataset, IterableDataset) or not isinstance(batches, BatchSampler):
            return None
        share = batches.batch_size // ranks if args.accelerator_config.split_batches else batches.batch_size
        return cls(len(batches.sampler), share, len(loader), ranks, rank)

    def without_filler(self, batch: dict[str, Any], place: int) -> dict[str, Any]:
        """A rank's batch, in which only its own rows are supervised; without its plan where that is a change.

        Args:
            batch: what the collator made.
            place: its number in the pass, counted from 0.
        """
        left, size = self.rows - place * self.ranks * self.share, len(batch["loss_mask"])
        own = max(left - self.rank * size, 0)
        if left >= self.ranks * self.share or own >= size:
            return batch
        loss_mask = batch["loss_mask"].clone()
        loss_mask[own:] = 0
        return {name: x for name, x in batch.items() if name != "plan"} | {"loss_mask": loss_mask}

    def end_of_pass(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The last batches of a pass, likewise."""
        first = self.batches - len(batches)
        return [self.without_filler(batch, first + n) for n, batch in enumerate(batches)]
