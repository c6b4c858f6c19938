"""Which trials there are: a configuration, a fault and a way of going on, drawn from a seed.

The first trials meet every value of every axis, the next ones every value beside every fault; what comes after them is
drawn at random. So the same seed gives the same trials, however many of them are run.
"""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from hf_eagle.drafts.kinds import KINDS, Kind


ROWS = 12  # of an optimizer step, on any number of ranks
STEPS = 6
# ranks and accumulation that divide a step
LAYOUTS = ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (4, 1), (4, 3))
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP")
DAMAGE = ("checkpoint cut", "checkpoint removed", "data cut")
FAULTS = (*SIGNALS, "full disk", "rank raises", *DAMAGE)
# where a fault strikes: while data are prepared, before a batch, in it, while a checkpoint or the results are written
MOMENTS = ("data", "begin", "loss", "checkpoint", "results")
# what is another when the run goes on
RESUMED = ("same", "ranks", "accumulation", "workers", "save_steps")


def draft_names() -> list[str]:
    """A name for each kind of draft in the table and, where one has several, each of its architectures."""
    return [name for kind in KINDS.values() for name in kind.architectures]


def kind_of(draft: str) -> Kind:
    """The kind that one of `draft_names` belongs to."""
    return next(kind for kind in KINDS.values() if draft in kind.architectures)


@dataclass(frozen=True)
class Configuration:
    """What a run is told.

    Attributes:
        draft: of `draft_names`.
        sampler: value of `train_sampling_strategy`.
        packing, streaming: as the arguments.
        ranks, accumulation: of `LAYOUTS`.
        target: value of `target_sharding`.
        wrapped: how the draft lies on the ranks: `alone`, `ddp` or `fsdp2`.
        store: value of `cache_mode`, or `none` without a store.
        acceptance: whether it is measured while training.
        workers: processes that collate.
        save_steps: as the argument.
        noise: whether features are noisy, where a kind has that; each rank draws its own.
    """

    draft: str
    sampler: str = "random"
    packing: bool = False
    streaming: bool = False
    ranks: int = 1
    accumulation: int = 1
    target: str = "none"
    wrapped: str = "alone"
    store: str = "none"
    acceptance: bool = False
    workers: int = 0
    save_steps: int = 2
    noise: bool = False

    @property
    def batch(self) -> int:
        """Rows of a rank's batch."""
        return ROWS // (self.ranks * self.accumulation)

    @property
    def trains_alike(self) -> "Configuration":
        """The configuration whose undisturbed run has the same steps, to the last bit."""
        return replace(self, acceptance=False, workers=0, save_steps=1)

    @property
    def layout(self) -> tuple:
        """What must stay for sums to be added in the same order."""
        return self.ranks, self.accumulation, self.target, self.wrapped

    @property
    def adds_in_one_order(self) -> bool:
        """Return whether a resumed run adds gradients in the order in which the undisturbed one does.

        DDP arranges its buckets anew after the first step of a process. Which rank's part of a sum comes first depends
        on the place in a bucket, so three ranks and more round otherwise in that step.
        """
        return self.ranks <= 2 or self.wrapped != "ddp"


@dataclass(frozen=True)
class Blow:
    """One fault and where it strikes.

    Attributes:
        fault: of `FAULTS`; damage to files follows a `SIGKILL`.
        moment: of `MOMENTS`.
        step: optimizer steps that were taken before.
        nth: of the places that one moment has, such as the files of a checkpoint.
        rank: whom it strikes.
        everywhere: whether the other ranks get the signal too.
        cut: whether the file that was just written loses its second half first.
        share: a number from 0 to 1, of which file is damaged and how much of it is left.
    """

    fault: str
    moment: str
    step: int
    nth: int
    rank: int
    everywhere: bool
    cut: bool
    share: float


@dataclass(frozen=True)
class Trial:
    """A run that is struck, and how it goes on.

    Attributes:
        number: in the plan.
        first: what the run is told.
        blow: what happens to it.
        change: of `RESUMED`.
        second: what the resumed run is told.
        again: what happens to that one, if it is struck too.
        launcher: whether the other ranks are ended when one has ended badly, as torchrun does.
    """

    number: int
    first: Configuration
    blow: Blow
    change: str
    second: Configuration
    again: Blow | None
    launcher: bool

    @property
    def values(self) -> set[tuple[str, object]]:
        """The values of all axes that it meets."""
        return set(asdict(self.first).items()) | {("fault", self.blow.fault), ("resumed", self.change)}

    @property
    def pairs(self) -> set[tuple]:
        """The values that it meets beside its fault."""
        return {(self.blow.fault, *value) for value in self.values if value[0] != "fault"}


def trials(seed: int) -> Iterator[Trial]:
    """The trials of a seed, without an end."""
    rng = random.Random(seed)
    # what can be met at all is what so many draws have met
    possible = [_draw(rng, -1) for _ in range(4000)]
    values = set().union(*(trial.values for trial in possible))
    pairs = set().union(*(trial.pairs for trial in possible))
    number = 0
    while True:
        rng = random.Random(f"{seed} {number}")
        drawn = [_draw(rng, number) for _ in range(60 if pairs else 1)]
        best = max(drawn, key=lambda trial: 100 * len(trial.values & values) + len(trial.pairs & pairs))
        values -= best.values
        pairs -= best.pairs
        yield best
        number += 1


def axes(seed: int) -> dict[str, list]:
    """Every value of every axis that the trials of a seed can meet."""
    found: dict[str, set] = {}
    rng = random.Random(seed)
    for _ in range(4000):
        for axis, value in _draw(rng, -1).values:
            found.setdefault(axis, set()).add(value)
    return {axis: sorted(found[axis], key=str) for axis in sorted(found)}


def _draw(rng: random.Random, number: int) -> Trial:
    first = _configuration(rng)
    blow = _blow(rng, first)
    # a stopped run goes on by itself
    change = "same" if blow.fault == "SIGSTOP" else rng.choice(RESUMED)
    if change in ("ranks", "accumulation"):  # other batches have other noise
        first = replace(first, noise=False)
    second = _changed(rng, first, change)
    if second == first:
        change = "same"
    again = None
    if blow.fault != "SIGSTOP" and blow.step < STEPS - 2 and rng.random() < 0.15:
        again = _blow(rng, second, blow)
    return Trial(number, first, blow, change, second, again, launcher=rng.random() < 0.5)


def _configuration(rng: random.Random) -> Configuration:
    ranks, accumulation = rng.choice(LAYOUTS)
    streaming = rng.random() < 0.3
    packing = not streaming and rng.random() < 0.4
    draft = rng.choice(draft_names())
    noisy = "feature_noise" not in kind_of(draft).meaningless
    return Configuration(
        draft=draft,
        sampler="random" if streaming or packing else rng.choice(("random", "group_by_length")),
        packing=packing,
        streaming=streaming,
        ranks=ranks,
        accumulation=accumulation,
        store="none" if streaming else rng.choice(("none", "read", "first_epoch")),
        acceptance=rng.random() < 0.4,
        workers=rng.choice((0, 0, 1)),
        save_steps=rng.choice((1, 2, 3)),
        noise=noisy and rng.random() < 0.5,
        **_spread(rng, ranks),
    )


def _spread(rng: random.Random, ranks: int) -> dict[str, str]:
    """How target and draft lie on so many ranks."""
    if ranks == 1:
        return {"target": "none", "wrapped": "alone"}
    return {"target": rng.choice(("none", "fsdp2")), "wrapped": rng.choice(("ddp", "fsdp2"))}


def _changed(rng: random.Random, first: Configuration, change: str) -> Configuration:
    if change == "ranks":
        ranks, accumulation = rng.choice([layout for layout in LAYOUTS if layout[0] != first.ranks])
        return replace(first, ranks=ranks, accumulation=accumulation, **_spread(rng, ranks))
    if change == "accumulation":
        layouts = [layout for layout in LAYOUTS if layout[0] == first.ranks and layout[1] != first.accumulation]
        return replace(first, accumulation=rng.choice(layouts)[1])
    if change == "workers" and not first.streaming:  # by which a stream is dealt out
        return replace(first, workers=1 - first.workers)
    if change == "save_steps":
        return replace(first, save_steps=rng.choice([n for n in (1, 2, 3) if n != first.save_steps]))
    return first


def _blow(rng: random.Random, struck: Configuration, before: Blow | None = None) -> Blow:
    fault = rng.choice(FAULTS)
    moment = _moment(rng, fault)
    # a checkpoint that can be damaged must be there first
    earliest = max(0 if before is None else before.step + 1, struck.save_steps if fault in DAMAGE else 0)
    step = rng.randint(min(earliest, STEPS - 1), STEPS - 1)
    if moment == "checkpoint":
        step = -(-max(step, 1) // struck.save_steps) * struck.save_steps  # the next one that is written
    step = {"data": 0, "results": STEPS}.get(moment, step)
    # data and results are written by the first rank
    written = moment == "data" or (fault, moment) == ("full disk", "results")
    rank = 0 if written else rng.randrange(struck.ranks)
    return Blow(
        fault=fault,
        moment=moment,
        step=step,
        nth=rng.randint(0, 11),
        rank=rank,
        everywhere=rng.random() < 0.5,
        cut=rng.random() < 0.5,
        share=rng.random(),
    )


def _moment(rng: random.Random, fault: str) -> str:
    if fault in DAMAGE:
        return rng.choice(("begin", "loss"))
    if fault == "rank raises":
        return rng.choice(("begin", "loss", "checkpoint"))
    if fault == "full disk":
        return rng.choice(("data", "loss", "checkpoint", "checkpoint", "results"))
    if fault in ("SIGTERM", "SIGINT"):  # behind the last step they end a run as they end any program
        return rng.choice(("data", "begin", "loss", "loss", "checkpoint"))
    return rng.choice(MOMENTS)
