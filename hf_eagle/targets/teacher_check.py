"""Check on one short row that a draft is taught the target's own distribution."""

from weakref import WeakSet

import torch
import torch.distributed as dist

from .sharding import TargetSharding, gathered
from .weights import all_numbers, listed


_TOKENS = 8
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LEAST = 20  # ids below are special ones in many vocabularies
_CHECKED: WeakSet = WeakSet()  # heads, so that a model wrapped again and again is compared once


@torch.no_grad()
def check_teacher(target) -> None:
    """Compare the distribution of `teacher_head` with that of the model's own forward on one short row.

    All ranks of a sharded target must call this, once. The last hidden states come from the same forward, so only what
    follows them can differ: by rounding, or because the forward changes the logits in an unknown way.

    Args:
        target ([`FrozenTarget`]): the target.

    Raises:
        ValueError: if they differ by more than rounding.
    """
    if target.parts.head in _CHECKED:
        return

    own, hidden = _own_logits(target)
    taught = target.teacher_head()(hidden).float()
    gap = _of_all_ranks(_difference(own, taught), target.sharding)

    if not gap <= max(1e-3, torch.finfo(hidden.dtype).eps):
        raise ValueError(_told(target, own, gap))
    _CHECKED.add(target.parts.head)


def _difference(own: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """How far two log-distributions are apart, as a share of the logits' size.

    The larger of two measures: the root mean square, which rounding hardly moves, and a fourth of the largest
    difference, which shows a change of only a few tokens.
    """
    size = own.where(own.isfinite(), 0.0).abs()
    own, taught = own.log_softmax(-1), taught.log_softmax(-1)
    apart = torch.where(own == taught, 0.0, own - taught).abs()  # equal infinities are no difference
    mean = apart.square().mean().sqrt() / size.square().mean().sqrt().clamp_min(0.1)
    return torch.maximum(mean, apart.max() / 4 / size.max().clamp_min(0.1))


def _own_logits(target) -> tuple[torch.Tensor, torch.Tensor]:
    """`(1, tokens, vocabulary)` of the model's forward, float32, and its last hidden states."""
    places = _LEAST + torch.arange(_TOKENS, device=target.device)[None]
    ids = places % target.vocab_size

    # not the compiled forward, which would be compiled again for a batch that never comes back
    forward = target.model.forward if target.sharding is None else target.model
    with target._recording([]) as seen:
        logits = gathered(forward(input_ids=ids, use_cache=False).logits).float()

    if target.sharding is not None:
        target.sharding.release()
    return logits, seen["last_hidden"]


def _of_all_ranks(gap: torch.Tensor, sharding: TargetSharding | None) -> float:
    """The largest, so that no rank continues while another refuses; NaN as infinity, which a maximum keeps."""
    gap = gap.nan_to_num(nan=torch.inf)
    if sharding is not None:
        gap = gap.to(sharding.device)
        dist.all_reduce(gap, dist.ReduceOp.MAX, group=sharding.group)
    return gap.item()


def _told(target, own: torch.Tensor, gap: float) -> str:
    model, place = type(target.model).__name__, getattr(target.model, "name_or_path", "")
    if own.isnan().any():
        weights = dict(target.model.named_parameters())
        broken = [name for name, x in weights.items() if x.dtype in _FLOATS and not all_numbers(x)]
        told = f"`target` {place or model} gives NaN for a row of {_TOKENS} tokens, so there is nothing to learn from"
        if broken:
            return (
                f"{told}: {len(broken)} of its {len(weights)} weights hold NaN or infinity ({listed(broken)}), so "
                "restore them, or name another target."
            )
        return (
            f"{told}, though its weights are finite: {target.dtype} may be too narrow for it, so save it in float32 or "
            "bfloat16, or name another target."
        )
    return (
        f"The target {model} returns other logits than its head: on a row of {_TOKENS} tokens its log-probabilities "
        f"differ from those that a draft would be taught, by {gap:.2g} of their size, so its forward changes the "
        "logits in an unknown way: use another target."
    )
