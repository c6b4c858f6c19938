"""What a draft would accept at most without one of its limits: its vocabulary, or its own hidden states."""

from collections.abc import Sequence

from ..decoding.replay import rounds_of
from ..evaluation.measurement import Measurement
from .findings import Counts


def without_vocabulary(accepted: Sequence[int], outside: Sequence[bool], depth: int) -> list[int]:
    """
    Return how many drafted tokens were right at every place, if a draft also knew all that it cannot propose.

    It goes on behind such a token as if it had just been shown it. So a draft of a larger vocabulary that is otherwise
    like this one does not accept more.

    Args:
        accepted: how many of `depth` drafted tokens are right behind each token of an answer but the last.
        outside: of each token of the answer, and of `depth - 1` behind its end, whether it cannot be proposed.
        depth: tokens drafted in a round.
    """

    def reach(place: int) -> int:
        count = 0
        while place + count < len(accepted):
            count += accepted[place + count]
            if count >= depth or not outside[place + count + 1]:
                return min(count, depth)
            count += 1
        return depth  # what is right behind the end is not known

    return list(map(reach, range(len(accepted))))


def right_where_known(accepted: Sequence[Sequence[int]], outside: Sequence[Sequence[bool]]) -> float:
    """
    Return how often the first drafted token is right where the next token can be proposed.

    Args:
        accepted, outside: of every prompt, as for `without_vocabulary`.
    """
    pairs = zip(accepted, outside, strict=True)
    known = [count > 0 for counts, row in pairs for place, count in enumerate(counts) if not row[place + 1]]
    return sum(known) / max(len(known), 1)


def with_features(right: Sequence[int], depth: int) -> list[int]:
    """
    Return how many drafted tokens were right at every place, if a draft saw the target's features of them too.

    Args:
        right: whether the first drafted token is right behind each token of an answer but the last.
        depth: tokens drafted in a round.
    """

    def reach(place: int) -> int:
        known = right[place : place + depth]
        return next((count for count, one in enumerate(known) if not one), depth)

    return list(map(reach, range(len(right))))


def counts_of_rounds(rounds: list[list[int]]) -> Counts:
    """The counts of the rounds of every prompt."""
    return list(map(sum, rounds)), list(map(len, rounds))


def counts_at_places(accepted: list[list[int]]) -> Counts:
    """The counts of the rounds of every prompt, from what is accepted at every place of its answer."""
    return counts_of_rounds(list(map(rounds_of, accepted)))


def by_category(measurement: Measurement, values: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Shares `part / whole` of every prompt's values, summed by the prompts' category; without any, of `all`."""
    sums: dict[str, list[int]] = {}
    for run, (part, whole) in zip(measurement.runs, values, strict=True):
        found = sums.setdefault(str(run.prompt.category or "all"), [0, 0])
        found[0] += part
        found[1] += whole
    return {name: part / whole for name, (part, whole) in sums.items() if whole}
