"""Cut the vocabulary of a trained draft: remove rows of its head, and keep the others bit for bit."""

from collections.abc import Iterable

import torch
from torch import nn

from .modeling_base import EaglePreTrainedModel
from .vocabulary import VocabularyMapping, coverage_by_size


def check_prunable(draft: EaglePreTrainedModel) -> None:
    """`ValueError` for a draft without a vocabulary of its own."""
    if not draft.own_head:
        raise ValueError(f"A {type(draft).__name__} proposes by the target's head and has no vocabulary to prune.")


def prune_vocabulary(draft: EaglePreTrainedModel, token_ids: torch.Tensor) -> VocabularyMapping:
    """Keep only some of the tokens that a draft can propose, in place; their logits do not change.

    Args:
        draft: of the whole vocabulary or of a part of it.
        token_ids: target ids to keep, in any order; the draft must be able to propose each now.

    Returns:
        The new mapping, already set.

    Raises:
        ValueError: if the draft has no vocabulary of its own, cannot propose one of the tokens, or would keep all.
    """
    check_prunable(draft)

    config = draft.config
    mapping = VocabularyMapping.from_token_ids(token_ids.cpu(), config.vocab_size)
    kept, current = mapping.t2d.nonzero()[:, 0], proposable(draft)

    # the present row of each kept token
    rows = torch.searchsorted(current, kept).clamp_max(len(current) - 1)
    missing = kept[current[rows] != kept].tolist()
    if missing:
        raise ValueError(
            f"`token_ids` holds {len(missing)} tokens that the draft cannot propose (the first is {missing[0]}): "
            "pruning only takes tokens away; train with a larger `draft_vocab_size` to have them."
        )
    _check_smaller(len(kept), len(current), "token_ids")

    old = draft.lm_head.weight
    draft.lm_head = nn.Linear(config.hidden_size, len(kept), bias=False, device="meta")
    draft.lm_head.weight = nn.Parameter(old.detach()[rows.to(old.device)], requires_grad=old.requires_grad)

    # the buffers change size, or did not exist before
    config.draft_vocab_size = len(kept)
    del draft.d2t, draft.t2d
    draft.register_vocabulary(config)
    draft.to(old.device)  # the new buffers
    draft.set_vocabulary(mapping)
    return mapping


def most_frequent(
    draft: EaglePreTrainedModel,
    counts: torch.Tensor,
    draft_vocab_size: int,
    special_ids: Iterable[int] = (),
    fill_ids: Iterable[int] = (),
) -> torch.Tensor:
    """The most frequent of the tokens that a draft can propose, always with the special tokens.

    Args:
        draft: the draft to prune.
        counts: int `(vocab_size,)`, how often each token occurred.
        draft_vocab_size: how many to keep.
        special_ids: kept whatever their count, if the draft can propose them.
        fill_ids: kept in this order if too few different tokens were counted; skipped if the draft cannot propose them.

    Returns:
        Target ids `(draft_vocab_size,)`, ascending.

    Raises:
        ValueError: if the draft has no more tokens than that, or too few different ones were counted.
    """
    current = proposable(draft)
    _check_smaller(draft_vocab_size, len(current), "draft_vocab_size")

    counts, special_ids = _of_draft(current, counts, special_ids)
    known = set(current.tolist())
    fill_ids = [i for i in fill_ids if i in known]
    return VocabularyMapping.from_counts(counts, draft_vocab_size, special_ids, fill_ids).t2d.nonzero()[:, 0]


def coverage(draft: EaglePreTrainedModel, counts: torch.Tensor, special_ids: Iterable[int] = ()) -> dict[int, float]:
    """Share of all counted tokens that the draft can propose, by the size it is pruned to: 4096, 8192, ..., all."""
    current, total = proposable(draft), int(counts.sum())
    counts, special_ids = _of_draft(current, counts, special_ids)
    return coverage_by_size(counts, special_ids, len(current), total)


def proposable(draft: EaglePreTrainedModel) -> torch.Tensor:
    """Target ids that a draft can propose, ascending, on the CPU."""
    return torch.arange(draft.config.vocab_size) if draft.draft_ids is None else draft.draft_ids.cpu()


def _of_draft(current: torch.Tensor, counts: torch.Tensor, special_ids: Iterable[int]):
    inside = torch.zeros(len(counts), dtype=torch.bool)
    inside[current] = True
    special = sorted({int(i) for i in special_ids if i is not None and 0 <= int(i) < len(counts) and inside[int(i)]})
    return counts.where(inside, 0), special


def _check_smaller(size: int, current: int, name: str) -> None:
    if size >= current:
        seen = f"is {size}" if name == "draft_vocab_size" else f"names {size} tokens"
        raise ValueError(f"`{name}` {seen}, but the draft has {current} already and cannot grow: keep fewer.")

    if size < 1:
        raise ValueError(f"`{name}` must keep at least one token, got {size}.")
