"""Ask for the features of the next batches before a step needs them, a few batches at a time."""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait


Ask = Callable[[list[int]], Future]


class AskedAhead:
    """Batches that are known, the first of which are asked for.

    The others only wait as tokens: features of all batches of an accumulated step would take more memory than the
    target did. A batch is recognised by its documents, as rows that only fill up a last batch are left out of it.

    Args:
        ask: asks for the features of a document, and returns where they will be.
        most: batches whose features are asked for ahead.
    """

    def __init__(self, ask: Ask, most: int = 2):
        self._ask, self._most = ask, most
        self._waiting: deque[list[list[int]]] = deque()
        self._begun: deque[dict[tuple[int, ...], deque[Future]]] = deque()

    def add(self, documents: Iterable[list[int]]) -> None:
        """A batch that a step will need."""
        self._waiting.append(list(documents))
        self._begin()

    def take(self, documents: list[list[int]]) -> list[Future]:
        """Where the features of a batch will be, asked for now if they were not before."""
        wanted = Counter(map(tuple, documents))
        place = next((n for n, batch in enumerate(self._begun) if _holds(batch, wanted)), None)

        asked: dict[tuple[int, ...], deque[Future]] = {}
        if place is not None:
            for _ in range(place):  # nobody took them: a run stopped between two steps
                _cancel(self._begun.popleft())
            asked = self._begun.popleft()
        else:
            self._waiting = deque(batch for batch in self._waiting if Counter(map(tuple, batch)) != wanted)

        taken = [asked[tuple(ids)].popleft() if asked.get(tuple(ids)) else self._ask(ids) for ids in documents]
        _cancel(asked)
        self._begin()
        return taken

    def forget(self, seconds: float) -> None:
        """Ask for nothing more, and wait at most so long for what is under way."""
        under_way = [future for batch in self._begun for futures in batch.values() for future in futures]
        self._waiting.clear()
        self._begun.clear()
        wait([future for future in under_way if not future.cancel()], timeout=seconds)

    def _begin(self) -> None:
        while self._waiting and len(self._begun) < self._most:
            batch: dict[tuple[int, ...], deque[Future]] = {}
            for ids in self._waiting.popleft():
                batch.setdefault(tuple(ids), deque()).append(self._ask(ids))
            self._begun.append(batch)


def _holds(batch: dict[tuple[int, ...], deque[Future]], wanted: Counter) -> bool:
    return all(len(batch.get(ids, ())) >= number for ids, number in wanted.items())


def _cancel(batch: dict[tuple[int, ...], deque[Future]]) -> None:
    for futures in batch.values():
        for future in futures:
            future.cancel()
