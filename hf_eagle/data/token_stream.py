"""Shuffle and tokenise records during training; the position in the stream can be saved and restored."""

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ..door.logs import errors_only
from .encoding import CUT, Encoders, check_sample, encode_records
from .loss_mask import MaskOptions
from .mask_check import show_mask
from .messages import read_record, read_tools


logger = logging.getLogger(__name__)

_CHECKED = 16  # conversations whose mask is compared with a second method's
_BATCH = 64  # records that are tokenised together
_LOOKED_AT = 1024  # first records, one of which must have an answer
_NAMED = 3  # bad records that are logged one by one; further ones are counted


class ShuffledRecords(IterableDataset):
    """Records of a stream in a different order in each pass: files are shuffled, and records within a buffer.

    `state_dict` holds the pass, the position in the files, and the buffer with its records: no record is repeated, and
    none is left out. [`TokenStream`] says when it is needed.

    Args:
        records (`datasets.IterableDataset`): records as `load_records` returns them.
        seed (`int`, *optional*, defaults to 0): determines the order, together with the number of the pass.
        buffer_size (`int`, *optional*, defaults to 1000): number of records from which the next one is drawn.
    """

    def __init__(self, records, seed: int = 0, buffer_size: int = 1000):
        # with a buffer of one record, this shuffles files, but not records
        self.records = records.shuffle(seed=seed, buffer_size=1)
        self.seed, self.buffer_size, self.epoch = seed, buffer_size, 0

        self._buffer: list = []
        self._random = np.random.default_rng()
        self._resumed: dict | None = None
        self._drained = False

    def __iter__(self) -> Iterator[dict]:
        resumed, self._resumed = self._resumed, None
        self._random = np.random.default_rng([self.seed, self.epoch])

        self._buffer, self._drained = [], False
        if resumed is not None:
            self._buffer, self._drained = list(resumed["buffer"]), resumed["drained"]
            self._random.bit_generator.state = resumed["random"]
        source = _from_place(self.records, resumed and resumed["records"])

        if not self._drained:
            yield from self._through_the_buffer(source)
            self._random.shuffle(self._buffer)
            self._drained = True

        while self._buffer:
            yield self._buffer.pop()

    def _through_the_buffer(self, source: Iterator[dict]) -> Iterator[dict]:
        for record in source:
            if len(self._buffer) < self.buffer_size:
                self._buffer.append(record)
                continue
            place = int(self._random.integers(self.buffer_size))
            given, self._buffer[place] = self._buffer[place], record
            yield given

    def set_epoch(self, epoch: int) -> None:
        """Set the pass that is iterated next."""
        if epoch != self.epoch:
            self.epoch, self._resumed = epoch, None
        self.records.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last yielded record."""
        if self._resumed is not None:
            return self._resumed

        state = {"pass": self.epoch, "records": self.records.state_dict(), "buffer": list(self._buffer)}
        return {**state, "random": self._random.bit_generator.state, "drained": self._drained}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """The next iteration continues from there, unless another pass is set first."""
        if state is not None:
            self.set_epoch(state["pass"])
        self._resumed = None if state is None else dict(state)


class TokenStream(IterableDataset):
    """Rows of `input_ids` and `loss_mask` of a stream of records; see `build_stream`.

    Each of `world` ranks tokenises every `world`-th record. With `keep_places`, a record without a row yields `None`.
    So the ranks together yield the same records in any number of rows as one rank, and rows can be skipped by counting
    records.

    There are two ways to continue a stream. A training run counts: its checkpoint holds the pass and the steps (see
    `training/stream_place.py`), and the records of those steps are read again but not tokenised. That works with any
    number of ranks, however far a data loader has read ahead. Other readers of the stream use `state_dict`, as do
    loaders that save states, such as torchdata's `StatefulDataLoader`. It holds the position in the records where the
    current batch of tokenisation begins, and how many of its rows were yielded. It reads nothing twice, but is valid
    only for this rank and this number of ranks.
    """

    column_names = ["input_ids", "loss_mask"]

    def __init__(
        self,
        records,
        encoders: Encoders,
        max_length: int,
        rank: int,
        world: int,
        skip: bool,
        keep_places: bool = False,
    ):
        self.records, self.encoders, self.max_length = records, encoders, max_length
        self.rank, self.world, self.skip, self.keep_places = rank, world, skip, keep_places

        self.epoch = 0
        self._left_out = _LeftOut()
        self._state = self._beginning()
        self._resumed = False

    def _beginning(self) -> dict[str, Any]:
        return {"pass": self.epoch, "records": None, "number": 0, "given": 0}

    def __iter__(self) -> Iterator[dict[str, list[int]] | None]:
        return self.rows()

    def rows(self, passed_over: int = 0) -> Iterator[dict[str, list[int]] | None]:
        """Yield the rows of this rank, with `None` in place of the first rows, which are not tokenised.

        Args:
            passed_over: how many rows to skip, with `keep_places`.
        """
        state = dict(self._state) if self._resumed else self._beginning()
        self._resumed, given, blank = False, state["given"], 0
        self._left_out.begin(self.epoch)
        source = _from_place(self.records, state["records"])
        number = state["number"]
        while True:
            place = _place(self.records) if number != state["number"] else state["records"]
            batch = list(islice(source, _BATCH))
            self._state = {"pass": self.epoch, "records": place, "number": number, "given": given}
            if not batch:
                break

            indices = [n for n in range(number, number + len(batch)) if n % self.world == self.rank]
            over = min(passed_over, len(indices))
            own = [batch[n - number] for n in indices[over:]]

            rows = encode_records(own, indices[over:], self.encoders(), self.max_length, self.skip, self._left_out.add)
            blank += sum(rows["blank"])

            for row in ([None] * over + self._kept(rows))[given:]:
                self._state["given"] += 1
                yield row

            number, given, passed_over = number + len(batch), 0, passed_over - over
        self._left_out.end(blank)

    def _kept(self, rows: dict[str, list]) -> list[dict[str, list[int]] | None]:
        whole = [
            {name: rows[name][n] for name in self.column_names} if outcome <= CUT else None
            for n, outcome in enumerate(rows["outcome"])
        ]
        return whole if self.keep_places else [row for row in whole if row is not None]

    def set_epoch(self, epoch: int) -> None:
        """Set the pass that is iterated next."""
        if epoch != self.epoch:
            self.epoch, self._resumed = epoch, False
            self._state = self._beginning()
        if hasattr(self.records, "set_epoch"):
            self.records.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last yielded row."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration continues from there, unless another pass is set first."""
        self.set_epoch(state["pass"])
        self._state, self._resumed = dict(state), True


class _LeftOut:
    """Log, once per run, the records that a stream leaves out: the first bad ones at once, their number after a pass.

    A data loader's workers share the state of the log, since they live for one pass only.
    """

    def __init__(self):
        self._named = torch.zeros(1, dtype=torch.long).share_memory_()
        self._told_in = torch.full((1,), -1, dtype=torch.long).share_memory_()
        self._pass, self._number = 0, 0

    def begin(self, number: int) -> None:
        """Begin a pass."""
        self._pass, self._number = number, 0

    def add(self, problem: ValueError) -> None:
        """Note that a bad record, named by its error, was left out."""
        self._number += 1
        if self._named < _NAMED and self._is_first_pass():
            self._named += 1
            logger.warning("A bad record is skipped: %s", problem)

    def end(self, blank: int) -> None:
        """End the pass, in which `blank` answers were blank."""
        if not self._is_first_pass():
            return

        if self._number:
            counted = "1 bad record of the stream was" if self._number == 1 else f"{self._number} bad records were"
            logger.warning("%s left out in this pass; later passes leave out the same.", counted)
        if blank:
            logger.warning("%d answers are empty or white space only, and are not supervised.", blank)
        self._told_in.fill_(self._pass)

    def _is_first_pass(self) -> bool:
        """Whether no other pass was logged."""
        return int(self._told_in) in (-1, self._pass)


def build_stream(
    records,
    tokenizer,
    max_length: int = 2048,
    options: MaskOptions | None = None,
    template_kwargs: dict | None = None,
    rank: int = 0,
    world: int = 1,
    skip_bad_records: bool = False,
    keep_places: bool = False,
) -> TokenStream:
    """Do the same as `build_dataset`, but read and tokenise conversations during training.

    Nothing is cached or counted. The first conversations' masks are checked at once. If none of the first 1,024 has an
    answer, a warning says so; if there are no more, that is an error. All `world` ranks read the same records in the
    same order, and each tokenises every `world`-th record: there may be few files, of any size. A record without a
    supervised token yields no row, or with `keep_places` a `None`, so that a run can continue on a different number of
    ranks; see [`TokenStream`].

    Raises:
        `ValueError`: as for `build_dataset`; for a later record, when it is read.
    """
    encoders = Encoders(tokenizer, options, template_kwargs)
    parts = (records, encoders, max_length, rank, world, skip_bad_records, keep_places)

    source = iter(records)
    batch = list(islice(source, _CHECKED))
    if not batch:
        raise ValueError("`records` is empty; there is nothing to train on.")

    first, number = batch, 0
    check_sample(batch, list(range(len(batch))), encoders(), skip_bad_records)

    while batch and number < _LOOKED_AT:
        indices = list(range(number, number + len(batch)))
        rows = encode_records(batch, indices, encoders(), max_length, skip_bad_records)
        if min(rows["outcome"]) <= CUT:
            return TokenStream(*parts)
        number += len(batch)
        batch = list(islice(source, _BATCH))

    if batch:
        logger.warning("None of the first %d conversations of the stream has a supervised token.", number)
        return TokenStream(*parts)

    ids, mask = encoders().encode([read_record(first[0], 0)[0]], tools=[read_tools(first[0], 0)])[0]
    raise ValueError(
        "No conversation has a supervised token: `records` hold no answer, or `max_length` cuts every one. "
        f"Record 0 is {show_mask(encoders(), ids, mask)!r}"
    )


def _place(records) -> Any:
    return records.state_dict() if hasattr(records, "state_dict") else None


def _from_place(records, place: Any) -> Iterator:
    """Yield the records after a position of `state_dict`; a loaded state is valid for this iteration only."""
    if hasattr(records, "load_state_dict"):
        records.load_state_dict(place)
    elif place is not None:
        raise ValueError("`records` has no `load_state_dict`, which continuing a stream needs.")

    # it warns that its buffer is lost, which holds nothing here
    with errors_only("datasets.iterable_dataset"):
        source = iter(records)
        first = list(islice(source, 1))

    yield from first
    yield from source
