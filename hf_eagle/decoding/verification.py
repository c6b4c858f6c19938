"""Decide which drafted tokens are kept: those that equal the target's choice, its best token or a drawn one.

Drafted candidates are given, not drawn, so the lossless rule of speculative sampling (arXiv 2211.17192; for trees,
EAGLE-2) reads: accept candidate x with the target's p(x); on rejection set p(x) to zero, renormalise, try the next
sibling; when none is accepted, draw from what is left. Drawing ONE token from p and keeping the sibling that equals it
is the same experiment: x is kept with probability p(x). Given that x was not, its sibling y is kept with p(y) / (1 -
p(x)). A token that equals no sibling is distributed as p without them. So the choice at each place is drawn first;
greedy decoding is the case where it is the most probable token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .tree import DraftTree


@dataclass(frozen=True)
class Sampling:
    """How the target chooses a token: the most probable one at `temperature` 0, else a drawn one.

    The order is that of `transformers`: temperature, then `top_k`, then `top_p`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    generator: torch.Generator | None = None

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """`(..., vocabulary)` in float32."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1.0:
            ordered, index = logits.sort(dim=-1)
            tail = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            tail[..., -1] = False  # the most probable token always stays
            logits = logits.masked_fill(tail.scatter(-1, index, tail), -torch.inf)
        return logits.softmax(-1)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """`(..., vocabulary)` -> `(...)`."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probs = self.probabilities(logits)
        # the race of exponential clocks: what `torch.multinomial` does, without its check of the values on the host
        return (probs / torch.empty_like(probs).exponential_(generator=self.generator)).argmax(-1)


@dataclass(frozen=True)
class Verdict:
    """The result of a round.

    Attributes:
        accepted: `(rows,)`, drafted tokens that were kept.
        chosen: `(rows, deepest + 1)`, the target's choices along the kept path: the kept tokens, the one after them,
            and then values without meaning.
        path: `(rows, deepest + 1)`, places in the window along the kept path, the root first; `None` in a chain, where
            they are 0, 1, 2, ...
    """

    accepted: torch.Tensor
    chosen: torch.Tensor
    path: torch.Tensor | None = None


def judge(
    logits: torch.Tensor, window: torch.Tensor, tree: DraftTree | None, deepest: int, sampling: Sampling
) -> Verdict:
    """
    Verify a round by the target's logits.

    Args:
        logits: `(rows, n + 1, vocabulary)` of the window.
        window: `(rows, n + 1)`: the newest verified token and the drafted ones.
        tree ([`DraftTree`] or `None`): how they are connected; a chain when `None`.
        deepest (`int`): the most drafted tokens that can be kept.
        sampling ([`Sampling`]): how the target chooses.
    """
    return keep_chosen(sampling.choose(logits), window, tree, deepest)


def keep_chosen(choices: torch.Tensor, window: torch.Tensor, tree: DraftTree | None, deepest: int) -> Verdict:
    """Keep the drafted tokens that equal the target's choice `(rows, n + 1)` after their parent, up to the root."""
    if tree is None:
        right = window[:, 1:] == choices[:, :-1]
        return Verdict(accepted=right.long().cumprod(1).sum(1), chosen=choices)

    right = window == choices.gather(1, tree.parents)
    right[:, 0] = True
    kept = ~(tree.ancestors & ~right[:, None]).any(-1)  # siblings differ: at most one node of a level
    # nodes are ordered by level, so the kept ones, moved to the front in their order, are the path
    path = kept.long().sort(dim=1, descending=True, stable=True).indices[:, : deepest + 1]
    return Verdict(accepted=kept.sum(1) - 1, chosen=choices.gather(1, path), path=path)


def per_position(accepted_by_round: Sequence[int], depth: int) -> list[int]:
    """How many rounds accepted at least 1, 2, ... `depth` drafted tokens."""
    return [sum(count > position for count in accepted_by_round) for position in range(depth)]
