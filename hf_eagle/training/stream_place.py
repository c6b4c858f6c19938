"""Where a run stands in a stream: part of every checkpoint, and the same on any number of ranks."""

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ..data.streaming import RankStream
from .checkpoints import read_manifest, read_state


logger = logging.getLogger(__name__)


@dataclass
class StreamPlace:
    """A pass over a stream and the steps taken in it; what was read ahead and not trained on does not count.

    Each step takes the next examples in the stream's order, the same on any number of ranks that share them by their
    number. Several workers of a data loader read files of their own and take turns with batches: what a step takes then
    depends on ranks, batch and workers. Files may be shuffled otherwise in one worker than in none.

    Attributes:
        number: of the pass, counted from 0.
        steps: optimizer steps taken in that pass.
        ranks, batch, workers: processes, rows of a batch, and workers of each process's data loader.
        by_number: whether ranks share examples by their number.
    """

    number: int = 0
    steps: int = 0
    ranks: int = 1
    batch: int = 1
    workers: int = 0
    by_number: bool = True

    @classmethod
    def beginning(cls, stream, args, batch: int) -> "StreamPlace | None":
        """Of a run on this stream; `None` of other data.

        Args:
            stream: the data that are trained on.
            args ([`TrainingArguments`]): of the run.
            batch: rows of a rank's batch.
        """
        if not isinstance(stream, RankStream):
            return None
        ranks = args.world_size
        return cls(0, 0, ranks, batch, args.dataloader_num_workers, stream.shares_by_number(ranks))

    def take_step(self, number: int) -> None:
        """A step is about to be taken in that pass."""
        if number != self.number:
            self.number, self.steps = number, 0
        self.steps += 1

    def end_pass(self) -> None:
        """No rank has a batch left."""
        self.number, self.steps = self.number + 1, 0

    def go_on_from(self, folder: str | Path, steps_a_pass: int | None, from_its_beginning: bool = False) -> None:
        """Take up the place of a checkpoint.

        Args:
            folder: the checkpoint.
            steps_a_pass: optimizer steps of a stream that has a length.
            from_its_beginning: of the pass, as `ignore_data_skip` asks.
        """
        before = place_of(folder)
        if before is None:
            logger.warning("%s does not say where its stream stood: its steps and its `epoch` tell.", folder)
            self.number, self.steps = _place_by_epoch(folder, steps_a_pass)
        else:
            self.number, self.steps = before.number, before.steps

        if self.steps == steps_a_pass:
            self.end_pass()
        if from_its_beginning:
            self.steps = 0


def place_of(folder: str | Path) -> StreamPlace | None:
    """The place that a checkpoint holds; `None` of a run on other data, or of an old checkpoint."""
    held = read_manifest(folder).get("stream")
    return None if held is None else StreamPlace(**{name: held[name] for name in asdict(StreamPlace())})


def _place_by_epoch(folder: str | Path, steps_a_pass: int | None) -> tuple[int, int]:
    """Pass and steps in it, of a checkpoint from before places were kept."""
    state = read_state(folder)
    if steps_a_pass is not None:
        return divmod(state.global_step, steps_a_pass)
    number = max(math.ceil(state.epoch or 0.0) - 1, 0)  # the share of a stream without a length is of all steps
    return number, round(((state.epoch or 0.0) - number) * state.max_steps)


def check_reading(folder: str | Path, stream: bool, argument: str = "train_dataset") -> None:
    """Was a checkpoint written by a run that read its data as this one does, as a stream or not?

    Args:
        folder: the checkpoint.
        stream: whether this run's data are a stream.
        argument: that says so.

    Raises:
        ValueError: if not, since its place in the data would mean other examples.
    """
    held = read_manifest(folder)
    if "stream" not in held or (held["stream"] is not None) == stream:
        return
    now, before = ("a stream", "data that are none") if stream else ("no stream", "one")
    mend = f"give `{argument}` as then"
    if argument == "streaming":
        now, mend = ("set", "leave it out") if stream else ("not set", "set it")
        before = "whole data" if stream else "a stream"
    raise ValueError(
        f"`{argument}` is {now}, but {folder} was written by a run on {before}, so its place in the data means other "
        f"examples here: {mend}, or start the data over with `ignore_data_skip`."
    )


def check_stream_place(folder: str | Path, now: StreamPlace) -> None:
    """Does a checkpoint's place mean the same examples in this run?

    Raises:
        ValueError: if the examples of a step depend on processes, batch or workers, and these are others.
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
