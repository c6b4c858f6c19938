"""A run's position in a stream: part of every checkpoint, and the same on any number of ranks."""

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ..data.reads import same_is_read, told_reads
from ..data.streaming import RankStream
from .checkpoints import read_manifest, read_state


logger = logging.getLogger(__name__)


@dataclass
class StreamPlace:
    """A pass over a stream, and the steps taken in it; data read ahead but not trained on do not count.

    Each step takes the next examples in the stream's order. If ranks share examples by number, this does not depend on
    the number of ranks. Several workers of a data loader read their own files and take turns with batches: then a
    step's examples depend on ranks, batch and workers. Workers may also shuffle files differently from a run without.

    Attributes:
        number: of the pass, counted from 0.
        steps: optimizer steps taken in that pass.
        ranks, batch, workers: processes, rows of a batch, and workers of each process's data loader.
        by_number: whether ranks share examples by their number.
        reads: the data, as `what_is_read` describes them; `None` if they are not known.
    """

    number: int = 0
    steps: int = 0
    ranks: int = 1
    batch: int = 1
    workers: int = 0
    by_number: bool = True
    reads: list[dict] | None = None

    @classmethod
    def beginning(cls, stream, args, batch: int) -> "StreamPlace | None":
        """Return the place at the start of a run on this stream; `None` for data that are not a stream.

        Args:
            stream: the training data.
            args ([`TrainingArguments`]): of the run.
            batch: rows of a rank's batch.
        """
        if not isinstance(stream, RankStream):
            return None
        ranks = args.world_size
        by_number = stream.shares_by_number(ranks)
        return cls(0, 0, ranks, batch, args.dataloader_num_workers, by_number, stream.reads)

    def take_step(self, number: int) -> None:
        """Note that a step of that pass is about to be taken."""
        if number != self.number:
            self.number, self.steps = number, 0
        self.steps += 1

    def end_pass(self) -> None:
        """Note that no rank has a batch left."""
        self.number, self.steps = self.number + 1, 0

    def go_on_from(self, folder: str | Path, steps_a_pass: int | None, from_its_beginning: bool = False) -> None:
        """Continue from the place of a checkpoint.

        Args:
            folder: the checkpoint.
            steps_a_pass: optimizer steps in a pass, if the stream has a length.
            from_its_beginning: start the pass over, as `ignore_data_skip` asks.
        """
        before = place_of(folder)
        if before is None:
            logger.warning("%s does not state its place in the stream: it is derived from steps and `epoch`.", folder)
            self.number, self.steps = _place_by_epoch(folder, steps_a_pass)
        else:
            self.number, self.steps = before.number, before.steps

        if self.steps == steps_a_pass:
            self.end_pass()
        if from_its_beginning:
            self.steps = 0


def place_of(folder: str | Path) -> StreamPlace | None:
    """Return the place that a checkpoint holds; `None` for data that are not a stream, or an old checkpoint."""
    held = read_manifest(folder).get("stream")
    if held is None:
        return None
    return StreamPlace(**{name: held[name] for name in asdict(StreamPlace()) if name in held})


def _place_by_epoch(folder: str | Path, steps_a_pass: int | None) -> tuple[int, int]:
    """Return the pass and the steps in it, for a checkpoint of a version that did not save places."""
    state = read_state(folder)
    if steps_a_pass is not None:
        return divmod(state.global_step, steps_a_pass)

    number = max(math.ceil(state.epoch or 0.0) - 1, 0)  # without a length, the share is of all steps
    return number, round(((state.epoch or 0.0) - number) * state.max_steps)


def check_reading(folder: str | Path, stream: bool, argument: str = "train_dataset") -> None:
    """Check that the run of a checkpoint read its data as this one does, as a stream or not.

    Args:
        folder: the checkpoint.
        stream: whether this run's data are a stream.
        argument: that decides it.

    Raises:
        ValueError: if not, because its place in the data would mean other examples.
    """
    held = read_manifest(folder)
    if "stream" not in held or (held["stream"] is not None) == stream:
        return

    now, before = ("a stream", "data that are none") if stream else ("no stream", "one")
    mend = f"give `{argument}` as before"
    if argument == "streaming":
        now, mend = ("set", "leave it out") if stream else ("not set", "set it")
        before = "whole data" if stream else "a stream"

    raise ValueError(
        f"`{argument}` is {now}, but {folder} was written by a run on {before}, so its place in the data means other "
        f"examples here: {mend}, or start the data over with `ignore_data_skip`."
    )


def check_same_data(folder: str | Path, reads: list[dict]) -> None:
    """Check that a checkpoint's place counts the records of the data that this run reads.

    Args:
        folder: the checkpoint; one of an earlier version does not say what it read.
        reads: this run's data, as `what_is_read` describes them.

    Raises:
        ValueError: if the checkpoint's run read other data.
    """
    before = place_of(folder)
    if before is None or before.reads is None or same_is_read(before.reads, reads):
        return

    raise ValueError(
        f"`train_data` is {told_reads(reads, before.reads)}, but {folder} was written by a run on "
        f"{told_reads(before.reads, reads)}, so its place in the stream means other records here: give the same data "
        "in the same order and shares, or start the pass over with `ignore_data_skip`."
    )


def check_stream_place(folder: str | Path, now: StreamPlace) -> None:
    """Check that a checkpoint's place means the same examples in this run.

    Raises:
        ValueError: if the examples of a step depend on processes, batch or workers, and these have changed.
    """
    before = place_of(folder)
    if before is None:
        return

    told = ("ranks", "batch", "workers")
    if all(getattr(before, name) == getattr(now, name) for name in told):
        return
    if before.by_number and now.by_number and before.workers == now.workers < 2:
        return

    raise ValueError(
        f"{folder} was written on {before.ranks} processes with `per_device_train_batch_size` {before.batch} and "
        f"`dataloader_num_workers` {before.workers}, by which each step took its examples of the stream; now they "
        f"are {now.ranks}, {now.batch} and {now.workers}: keep all three (`ignore_data_skip` starts the pass over)."
    )
