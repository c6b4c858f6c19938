"""Streams on several ranks: each reads its own examples, and a rank that has run out takes part with empty batches."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader, IterableDataset


class RankStream(IterableDataset):
    """One rank's examples of a stream that all ranks read in the same order: every `world`-th, from number `rank` on.

    So every example belongs to one rank however many files there are, and a global batch of so many ranks holds the
    same examples as a batch of one rank that is as large.

    Args:
        stream (`IterableDataset`): of `datasets` or torch.
        rank (`int`, *optional*, defaults to 0): this rank's number.
        world (`int`, *optional*, defaults to 1): ranks that share the stream; 1 where it is one rank's already.

    Example:
        >>> list(RankStream(range(5), rank=1, world=2))
        [1, 3]
    """

    def __init__(self, stream, rank: int = 0, world: int = 1):
        self.stream, self.rank, self.world = stream, rank, world
        self._number, self._resumed = 0, False

    def __iter__(self) -> Iterator:
        if not self._resumed:
            self._number = 0
        self._resumed = False
        for example in self.stream:
            self._number += 1
            if (self._number - 1) % self.world == self.rank:
                yield example

    def __len__(self) -> int:
        # of the rank that has most, so that all ranks expect as many batches
        return -(-len(self.stream) // self.world)

    @property
    def column_names(self) -> list[str] | None:
        return getattr(self.stream, "column_names", None)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as that pass does, where the stream is shuffled."""
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The place behind the example that was given last, where the stream knows its own."""
        return {"stream": self.stream.state_dict(), "number": self._number}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on from there."""
        self.stream.load_state_dict(state["stream"])
        self._number, self._resumed = state["number"], True


def keep_rank_stream(loader: DataLoader) -> DataLoader:
    """The loader that accelerate made of a `RankStream`, which then hands on that stream as it is.

    accelerate splits every stream among the ranks, and completes the last batch with rows that were trained on.
    """
    split = loader.dataset
    if isinstance(split, IterableDatasetShard):
        split.batch_size = split.num_processes = 1
        split.process_index = 0
    return loader


def empty_batch(device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of one token and no supervised row: it adds nothing to the loss, and every parameter has a gradient."""
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    return {"input_ids": zero, "attention_mask": torch.ones_like(zero), "loss_mask": zero.clone()}
