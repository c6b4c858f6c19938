"""Probes that kinds share: taps, RoPE, norms, rows of the head. Each kind lists its own in its module `probes`."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

from .probe import Probe
from .rope import draft_rope
from .vocabulary import VocabularyMapping


# bases that targets of many families have, and transformers' default, which is what a lost base becomes
BASES = (10_000.0, 500_000.0, 1_000_000.0)
_SAMPLE = 256  # rows of a head that are compared first
_KNOWN = 0.9  # share of these that must resemble the target's row of their own token, for the order to be right
_ROWS = 256  # rows that are compared with the target's head at once


def column_orders(
    name: str,
    blocks: int,
    cause: str,
    told: Callable[[tuple[int, ...]], str],
    besides: Callable[[Any, tuple[int, ...]], None] | None = None,
) -> Iterator[Probe]:
    """Read what a linear module takes side by side in another order.

    Args:
        name: of the module.
        blocks: how many inputs of one width it takes. Of more than three, only the reverse and swapped neighbours.
        cause: name of the fault.
        told: says what order is tried.
        besides: changes what goes with the columns.
    """
    first = tuple(range(blocks))
    orders = list(permutations(first)) if blocks <= 3 else [first[::-1], *_swapped_neighbours(first)]
    for order in orders:
        if order != first:
            yield Probe(cause, told(order), partial(_reorder, name=name, order=order, besides=besides))


def _swapped_neighbours(first: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for place in range(len(first) - 1):
        order = list(first)
        order[place], order[place + 1] = order[place + 1], order[place]
        yield tuple(order)


def _reorder(draft, name: str, order: tuple[int, ...], besides: Callable[[Any, tuple[int, ...]], None] | None) -> None:
    module = draft.get_submodule(name)
    parts = module.weight.detach().chunk(len(order), dim=1)
    module.weight = nn.Parameter(torch.cat([parts[place] for place in order], dim=1), requires_grad=False)
    if besides is not None:
        besides(draft, order)


def tap_shifts(tap_ids: Sequence[int], known: range, set_taps: Callable[[Any, list[int]], None]) -> Iterator[Probe]:
    """Tap one layer earlier, and one later, as far as there are such layers.

    Args:
        tap_ids: the draft's, entry ids.
        known: entry ids that such a draft can have.
        set_taps: writes entry ids into a config.
    """
    for step, way in ((-1, "earlier"), (1, "later")):
        ids = [number + step for number in tap_ids]
        if set(ids) <= set(known):
            change = f"taps one layer {way}, {', '.join(map(str, ids))}"
            yield Probe("tap_ids", change, partial(_tap, ids=ids, set_taps=set_taps), ids)


def _tap(draft, ids: list[int], set_taps: Callable[[Any, list[int]], None]) -> None:
    set_taps(draft.config, ids)


def rope_bases(draft, target_config, bases: Sequence[float] = ()) -> Iterator[Probe]:
    """Rotate with another base: one that was named, the target's, or a common one."""
    rope = draft.config.rope_parameters
    theirs = draft_rope(target_config.get_text_config())["rope_theta"]
    for base in dict.fromkeys(map(float, (*bases, theirs, *BASES))):
        if base != float(rope["rope_theta"]):
            change = partial(_rotate, rope={**rope, "rope_theta": base})
            yield Probe("rope_base", f"a RoPE base of {base:,.10g}", change)


def rope_scalings(draft, target_config) -> Iterator[Probe]:
    """Rotate with the target's scaling, and without any."""
    own = dict(draft.config.rope_parameters)
    theirs = draft_rope(target_config.get_text_config()) | {"rope_theta": own["rope_theta"]}
    plain = {"rope_type": "default", "rope_theta": own["rope_theta"]}
    for rope, change in ((theirs, "the target's RoPE scaling"), (plain, "no RoPE scaling")):
        if rope not in (own, plain if rope is theirs else None):
            yield Probe("rope_scaling", change, partial(_rotate, rope=rope))


def _rotate(draft, rope: dict[str, Any]) -> None:
    draft.rotate_by(rope)


def swapped_norms(*pairs: Sequence[tuple[str, str]]) -> Iterator[Probe]:
    """Exchange the weights of two norms.

    Args:
        pairs: names of modules; those of one argument are exchanged together, as in all layers.
    """
    for together in pairs:
        first, second = (name.rpartition(".")[2] for name in together[0])
        yield Probe("norms", f"`{first}` and `{second}` exchanged", partial(_swap, pairs=together))


def _swap(draft, pairs: Sequence[tuple[str, str]]) -> None:
    for names in pairs:
        first, second = map(draft.get_submodule, names)
        first.weight, second.weight = second.weight, first.weight


def head_rows(draft, target) -> Iterator[Probe]:
    """Put the rows of a draft's own head in the order in which they resemble the rows of the target's.

    A trained head still resembles the target's, which it usually starts from. So a row tells which token it is of.
    Nothing is tried if most rows of a sample resemble that of their own token.
    """
    own, theirs = _unit_rows(draft.lm_head.weight), _unit_rows(target.head_weight())
    if own.shape[1] != theirs.shape[1]:
        return

    sample = torch.linspace(0, len(own) - 1, min(_SAMPLE, len(own)), device=own.device).long().unique()
    known = _ids_of(draft)[sample]
    if ((own[sample] @ theirs.T).argmax(-1) == known).float().mean() < _KNOWN:
        change = "rows of the head by the tokens that they resemble"
        yield Probe("head_rows", change, partial(_sort_head, theirs=theirs))


def _unit_rows(weight: torch.Tensor) -> torch.Tensor:
    return normalize(weight.detach().float(), dim=-1)


def _ids_of(draft) -> torch.Tensor:
    """Target ids of the rows of a draft's head."""
    weight, ids = draft.lm_head.weight, draft.draft_ids
    return torch.arange(len(weight), device=weight.device) if ids is None else ids.to(weight.device)


def _sort_head(draft, theirs: torch.Tensor) -> None:
    ids = resembled_ids(_unit_rows(draft.lm_head.weight), theirs, _ids_of(draft))
    order = ids.argsort()
    draft.lm_head.weight = nn.Parameter(draft.lm_head.weight.detach()[order], requires_grad=False)

    if draft.d2t is not None:
        del draft.d2t, draft.t2d  # shared with the draft that this is a copy of
        draft.register_vocabulary(draft.config)
        draft.to(order.device)
        draft.set_vocabulary(VocabularyMapping.from_token_ids(ids[order].cpu(), draft.config.vocab_size))


def resembled_ids(own: torch.Tensor, theirs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the token that each row of a head is of, by the rows of another, a different one for each row.

    A row is given the token whose row it resembles most, if that row resembles no other more. All other rows keep their
    token, or get one that is left over.

    Args:
        own: `(rows, hidden)`, of length 1.
        theirs: `(vocabulary, hidden)`, of length 1.
        ids: `(rows,)`, different tokens that the rows are of so far.
    """
    best, nearest = [], torch.full((len(theirs),), -2.0, device=own.device)
    row_of = torch.zeros(len(theirs), dtype=torch.long, device=own.device)
    for begin in range(0, len(own), _ROWS):
        likeness = own[begin : begin + _ROWS] @ theirs.T
        best.append(likeness.argmax(-1))
        top, row = likeness.max(0)
        row_of = torch.where(top > nearest, row + begin, row_of)
        nearest = torch.maximum(top, nearest)

    best, rows = torch.cat(best), torch.arange(len(own), device=own.device)
    mutual = row_of[best] == rows
    found = torch.where(mutual, best, -1)

    taken = torch.zeros(len(theirs), dtype=torch.bool, device=own.device)
    taken[best[mutual]] = True
    keeping = ~mutual & ~taken[ids]
    found[keeping] = ids[keeping]
    taken[ids[keeping]] = True
    left = found < 0
    found[left] = ids[~taken[ids]][: int(left.sum())]
    return found
