"""How many tokens to draft at which load: a busy server has no time left for drafts that pay where it has one request.

vLLM takes a schedule since 0.32 (`SpeculativeConfig`, `v1/spec_decode/dynamic/utils.py`): ranges of requests in flight,
each with the number of tokens that are drafted, 0 for none. After the last range its number goes on.
"""

import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..door.names import at_home


FIELD = "num_speculative_tokens_per_batch_size"
Schedule = list[list[int]]  # first and last number of requests in flight, tokens drafted

# a number of tokens counts as fast as another one if it is so near: what is measured differs by more from run to run
_ALIKE = 0.01
# says whether the vLLM of an environment has the field, without importing it, which takes seconds
_ASK = f"""
from importlib.util import find_spec
from pathlib import Path
folder = Path(find_spec("vllm").origin).parent
print({FIELD!r} in (folder / "config" / "speculative.py").read_text())
"""


def loads(entries: Sequence[Mapping]) -> list[int]:
    """The numbers of requests in flight that were measured, ascending."""
    return sorted({entry["batch_size"] for entry in entries})


def fastest_counts(entries: Sequence[Mapping]) -> dict[int, int]:
    """Number of drafted tokens with which the server was fastest, by requests in flight.

    The smallest one counts of those that are about as fast; it is 0 where no draft is faster than none.

    Args:
        entries: as `measure_serving` returns them.
    """
    found = {}
    for size in loads(entries):
        here = [entry for entry in entries if entry["batch_size"] == size]
        best = max(entry["speedup"] for entry in here)
        fast = [entry["num_speculative_tokens"] for entry in here if entry["speedup"] >= (1 - _ALIKE) * best]
        found[size] = min(fast)
    return found


def schedule_of(entries: Sequence[Mapping]) -> Schedule:
    """The ranges of requests in flight, from 1 on, and the number of tokens to draft in each.

    Between two measured loads the border is at their geometric mean. Neighbours with the same number are one range.
    """
    counts, found = fastest_counts(entries), []
    sizes, first = list(counts), 1
    for size, after in zip(sizes, [*sizes[1:], None], strict=True):
        last = size if after is None else math.isqrt(size * after)
        if found and found[-1][2] == counts[size]:
            found[-1][1] = last
        else:
            found.append([first, last, counts[size]])
        first = last + 1
    return found


def told_schedule(schedule: Schedule) -> str:
    """The schedule in words: `1 to 5 requests: 3 tokens; from 6: no draft`."""
    parts = []
    for place, (first, last, count) in enumerate(schedule):
        requests = f"{first} to {last}" if first < last else f"{first}"
        if place == len(schedule) - 1:
            requests = f"from {first}"
        drafted = f"{count} token{'s' * (count != 1)}" if count else "no draft"
        parts.append(f"{requests}{' requests' * (place == 0)}: {drafted}")
    return "; ".join(parts)


def told_model(result: Mapping) -> list[str]:
    """A line about how many tokens to draft at which load, if a result of `evaluate` holds a model of that."""
    if not result.get("modelled_speeds"):
        return []
    told = told_schedule(schedule_of(result["modelled_speeds"]))
    return [f"requests in flight and tokens to draft, by a model of costs (measure with benchmark-serving): {told}"]


def schedule_fields(schedule: Schedule) -> dict[str, object]:
    """Fields of vLLM's speculative config for a schedule; of one number, that number alone; none if no draft pays."""
    most = max(count for *_, count in schedule)
    if most == 0:
        return {}
    one = len(schedule) == 1
    return {"num_speculative_tokens": most} | ({} if one else {FIELD: schedule})


def takes_schedule(python: str | Path) -> bool:
    """Whether the vLLM in an interpreter's environment takes a schedule."""
    done = subprocess.run([at_home(python), "-c", _ASK], capture_output=True, text=True)
    return done.stdout.strip() == "True"
