"""Check, on one short row of tokens, that the distribution which a draft learns is the target's own."""

from weakref import WeakSet

import torch
import torch.distributed as dist

from .sharding import TargetSharding, gathered
from .weights import all_numbers, listed


_TOKENS = 8
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FIRST_ID = 20  # smaller ids are special tokens in many vocabularies
_CHECKED: WeakSet = WeakSet()  # heads that passed, so that a model is checked once, however often it is wrapped


@torch.no_grad()
def check_teacher(target) -> None:
    """Compare the distribution of `teacher_head` with that of the model's own forward on one short row.

    All ranks of a sharded target must call this together, since it reduces over them. Both distributions follow from
    the same last hidden states. So they differ only by rounding, unless the forward changes the logits in an unknown
    way.

    Args:
        target ([`FrozenTarget`]): the target.

    Raises:
        ValueError: if the distributions differ by more than rounding.
    """
    if target.parts.head in _CHECKED:
        return

    own, hidden, given = _own_logits(target)
    if hidden is None:
        raise ValueError(
            f"The target {type(target.model).__name__} ({target.config.model_type}) cannot be tapped: its forward "
            f"never runs its only norm that may be the final one (a {type(target.parts.final_norm).__name__}), so use "
            "another target."
        )
    taught = target.teacher_head()(hidden).float()
    gap = _max_over_ranks(_difference(own, taught), target.sharding)

    # rounding: the spacing of the dtype, or what sums in another order change
    if gap > max(1e-3, torch.finfo(hidden.dtype).eps):
        raise ValueError(_message(target, own, gap, behind_norm=given is None or torch.equal(given, hidden)))
    _CHECKED.add(target.parts.head)


def _difference(own: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """Return how far two distributions differ in their log-probabilities, relative to the magnitude of the logits.

    This is the larger of two measures. The root mean square hardly changes with rounding. The largest difference shows
    a change of only a few tokens; a fourth of it counts, since rounding moves single values further.
    """
    size = own.where(own.isfinite(), 0.0).abs()
    own, taught = own.log_softmax(-1), taught.log_softmax(-1)
    difference = torch.where(own == taught, 0.0, own - taught).abs()  # inf - inf would be NaN

    # logits close to zero are no scale to measure by, hence at least 0.1
    mean = difference.square().mean().sqrt() / size.square().mean().sqrt().clamp_min(0.1)
    return torch.maximum(mean, difference.max() / 4 / size.max().clamp_min(0.1))


def _own_logits(target) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the logits of the model's forward, `(1, tokens, vocabulary)` in float32, its last hidden states, and what
    its head was given; `None` for what did not run."""
    ids = (_FIRST_ID + torch.arange(_TOKENS, device=target.device)[None]) % target.vocab_size

    # `forward` skips torch.compile, which would compile once more for this one batch; a sharded model gathers its
    # weights only when it is called itself
    forward = target.model.forward if target.sharding is None else target.model
    given = []
    handle = target.parts.head.register_forward_pre_hook(lambda module, args: given.extend(args[:1]))
    try:
        with target._recording([]) as seen:  # no taps, only the last hidden states
            logits = gathered(forward(input_ids=ids, use_cache=False).logits).float()
    finally:
        handle.remove()

    if target.sharding is not None:
        target.sharding.release()
    return logits, seen.get("last_hidden"), given[0] if given else None


def _max_over_ranks(gap: torch.Tensor, sharding: TargetSharding | None) -> float:
    """Return the largest gap of all ranks, so that all continue or none. NaN, which a maximum may lose, is infinity."""
    gap = gap.nan_to_num(nan=torch.inf)
    if sharding is not None:
        gap = gap.to(sharding.device)
        dist.all_reduce(gap, dist.ReduceOp.MAX, group=sharding.group)
    return gap.item()


def _message(target, own: torch.Tensor, gap: float, behind_norm: bool) -> str:
    model, path = type(target.model).__name__, getattr(target.model, "name_or_path", "")
    if not own.isnan().any():
        why = "" if behind_norm else "the head is given something else than the final norm's output, "
        return (
            f"The target {model} returns other logits than its head: {why}their log-probabilities differ by {gap:.2g} "
            f"of the logits' size on a row of {_TOKENS} tokens, and a draft learns from the head, so use another "
            "target."
        )

    weights = dict(target.model.named_parameters())
    broken = [name for name, x in weights.items() if x.dtype in _FLOATS and not all_numbers(x)]
    seen = f"`target` {path or model} gives NaN for a row of {_TOKENS} tokens, so there is nothing to learn from"
    if broken:
        return (
            f"{seen}: {len(broken)} of its {len(weights)} weights hold NaN or infinity ({listed(broken)}), so download "
            "or save it again, or name another target."
        )
    return (
        f"{seen}, though its weights are finite: the range of {target.dtype} may be too small for it, so save it in "
        "float32 or bfloat16, or name another target."
    )
