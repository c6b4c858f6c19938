"""States of recurrent layers while tokens are verified: kept after every token, taken back where tokens are rejected.

A window's tokens run through a recurrent layer one after the other, as in plain decoding, and the layer's state is kept
after each. When the round is judged, each row goes on from the state after its last accepted token. That needs no
second forward, lets the rows of a batch accept different numbers of tokens, and computes what the target alone
computes. It holds one state for each token of the window: K + 1 times the memory of the layers' states.

It is also the faster way on most layers. The other way runs the window in the layer's form for many tokens, and then
the accepted tokens again. On a CPU with transformers' own code, at hidden size 1,024 and a window of 4 tokens, single
steps take 0.09 of that time in Kimi-Linear, 0.17 in Bamba, 0.6 in Qwen3-Next, and as long in LFM2 and MiniMax. With 8
tokens they take 0.19, 0.34, 1.0, 1.4 and 1.9 of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache

from ..targets.recurrent import Mixer, Mixers, states_of
from .caches import Lengths


class RecurrentStates:
    """The states of a target's mixers for every row of a batch; nothing for a target of attention alone.

    Args:
        mixers: the target's.
    """

    def __init__(self, mixers: Mixers):
        self.mixers = mixers
        self._caches: dict[Mixer, Cache] = {}
        self._after: dict[Mixer, list[list[torch.Tensor]]] = {}  # a window's states, after each of its tokens

    def __bool__(self) -> bool:
        return bool(self.mixers)

    @contextmanager
    def reading(self, lengths: Lengths) -> Iterator[None]:
        """Inside the block, run prompts of these lengths, padded on the right; padding does not reach a state."""
        rows_of: dict[int, list[int]] = {}
        for row, length in enumerate(lengths.host):
            rows_of.setdefault(length, []).append(row)

        def read(mixer: Mixer, hidden: torch.Tensor, apply) -> torch.Tensor:
            if lengths.uniform:
                self._caches[mixer] = mixer.new_cache()
                return apply(lambda x: x, self._caches[mixer])

            output, caches = None, []
            for length, rows in rows_of.items():
                caches.append(mixer.new_cache())
                part = apply(lambda x, rows=rows, length=length: x[rows, :length], caches[-1])
                output = part.new_zeros(*hidden.shape[:2], part.shape[-1]) if output is None else output
                output[rows, :length] = part
            self._caches[mixer] = _joined(caches, list(rows_of.values()))
            return output

        with self.mixers.run_by(read):
            yield

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Inside the block, run a window of tokens one by one, from the states that were kept last."""
        self._after = {}

        def step(mixer: Mixer, hidden: torch.Tensor, apply) -> torch.Tensor:
            cache, outputs, after = self._caches[mixer], [], []
            for t in range(hidden.shape[1]):
                outputs.append(apply(lambda x, t=t: x[:, t : t + 1], cache))
                if hidden.shape[1] > 1:  # a single token is always kept
                    after.append([state.clone() for state in _states(cache)])  # layers write in place
            self._after[mixer] = after
            return torch.cat(outputs, dim=1)

        with self.mixers.run_by(step):
            yield

    def keep(self, counts: list[int], counts_on_device: torch.Tensor) -> None:
        """Go back to the states after the first `counts` tokens of the window, at least one in each row."""
        uniform = len(set(counts)) == 1
        for mixer, after in self._after.items():
            if not after:
                continue

            if uniform:
                kept = after[counts[0] - 1]
            else:
                rows = torch.arange(len(counts), device=counts_on_device.device)
                kept = [torch.stack(states)[counts_on_device - 1, rows] for states in zip(*after, strict=True)]
            _put(self._caches[mixer], kept)
        self._after = {}

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch only."""
        for cache in self._caches.values():
            _put(cache, [state[rows] for state in _states(cache)])


def _states(cache: Cache) -> list[torch.Tensor]:
    return [container[key] for container, key in states_of(cache)]


def _put(cache: Cache, states: list[torch.Tensor]) -> None:
    for (container, key), state in zip(states_of(cache), states, strict=True):
        container[key] = state


def _joined(caches: list[Cache], rows: list[list[int]]) -> Cache:
    """One cache for all rows, from caches of some of them each; it is the first of them, changed."""
    count = sum(map(len, rows))
    states: list[Any] = [state.new_empty(count, *state.shape[1:]) for state in _states(caches[0])]
    for cache, places in zip(caches, rows, strict=True):
        for state, part in zip(states, _states(cache), strict=True):
            state[places] = part
    _put(caches[0], states)
    return caches[0]
