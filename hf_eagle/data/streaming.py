"""Read a stream on several ranks: each rank reads different examples, and empty batches once it has no more."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader, IterableDataset


NO_ROW = {"input_ids": [0], "loss_mask": [0]}  # nothing is supervised


class RankStream(IterableDataset):
    """One rank's examples of a stream that all ranks read in the same order: every `world`-th, beginning with `rank`.

    So every example belongs to one rank, however many files there are, and a global batch of all ranks holds the same
    examples as an equally large batch on one rank. An example without a row is `None`.

    Args:
        stream (`IterableDataset`): stream of `datasets` or torch.
        rank (`int`, *optional*, defaults to 0): this rank's number.
        world (`int`, *optional*, defaults to 1): number of ranks that share the stream; 1 if it is one rank's already.
        reads (`list[dict]`, *optional*): the data behind the stream, as `what_is_read` describes them.

    Example:
        >>> list(RankStream(range(5), rank=1, world=2))
        [1, 3]
    """

    def __init__(self, stream, rank: int = 0, world: int = 1, reads: list[dict] | None = None):
        self.stream, self.rank, self.world, self.reads = stream, rank, world, reads
        self._number, self._resumed = 0, False
        # shared, so that long-lived workers learn of the next pass
        self._pass = torch.full((1,), -1).share_memory_()
        self._passed_over = (-1, 0)

    def __iter__(self) -> Iterator:
        if self._pass >= 0:
            self.set_epoch(int(self._pass))
        if not self._resumed:
            self._number = 0
        self._resumed = False

        for example in self._examples():
            self._number += 1
            if (self._number - 1) % self.world == self.rank:
                yield example

    def _examples(self) -> Iterator:
        number, rows = self._passed_over
        if number == int(self._pass) and self._keeps_places:
            return self.stream.rows(rows * self.world)
        return iter(self.stream)

    @property
    def _keeps_places(self) -> bool:
        return getattr(self.stream, "keep_places", False)

    def shares_by_number(self, ranks: int) -> bool:
        """Whether `ranks` ranks together take the same examples in a step as one rank would."""
        return ranks in (1, self.world) or (self._keeps_places and self.stream.world == ranks)

    def pass_over(self, epoch: int, rows: int) -> None:
        """Allow `None` in place of this rank's first rows in that pass: they were trained on, and are not read."""
        self._passed_over = (epoch, rows)

    def __len__(self) -> int:
        # the length on the rank with most examples, so that all ranks expect the same number of batches
        return -(-len(self.stream) // self.world)

    @property
    def column_names(self) -> list[str] | None:
        return getattr(self.stream, "column_names", None)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as in that pass, if the stream is shuffled."""
        self._pass.fill_(epoch)
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last yielded example, if the stream knows its position."""
        return {"stream": self.stream.state_dict(), "number": self._number}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the next iteration from a position of `state_dict`."""
        self.stream.load_state_dict(state["stream"])
        self._number, self._resumed = state["number"], True
        self._pass.fill_(-1)  # the loaded state decides the pass


def keep_rank_stream(loader: DataLoader) -> DataLoader:
    """Make the loader that accelerate built from a `RankStream` pass that stream on unchanged.

    accelerate splits every stream among the ranks, and fills the last batch with rows that were already trained on.
    """
    split = loader.dataset
    if isinstance(split, IterableDatasetShard):
        split.batch_size = split.num_processes = 1
        split.process_index = 0
    return loader


def empty_batch(device: torch.device) -> dict[str, torch.Tensor]:
    """Return a batch of one unsupervised token: it adds nothing to the loss, but gives all parameters a gradient."""
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    return {"input_ids": zero, "attention_mask": torch.ones_like(zero), "loss_mask": zero.clone()}
