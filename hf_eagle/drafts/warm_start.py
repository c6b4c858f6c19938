"""Start a draft from another one: the next version of a target, another data set, another draft vocabulary."""

import torch

from .modeling_base import EaglePreTrainedModel
from .prune import proposable


_OF_VOCABULARY = {"lm_head.weight", "d2t", "t2d"}


@torch.no_grad()
def start_from(draft: EaglePreTrainedModel, source: EaglePreTrainedModel) -> int:
    """Copy the weights of one draft into another, matching rows of the head by token.

    Args:
        draft: a new draft; its rows of tokens that `source` cannot propose do not change.
        source: the draft to start from, of any draft vocabulary.

    Returns:
        The number of copied rows of the head; 0 for a draft whose head is the target's.

    Raises:
        ValueError: naming the first difference of the two, before anything is copied.
    """
    _check_fits(draft, source)
    skipped = draft.lent_tensors | _OF_VOCABULARY

    given = source.state_dict()
    for name, tensor in draft.state_dict().items():
        if name not in skipped:
            tensor.copy_(given[name])

    if not draft.own_head:
        return 0

    # the two vocabularies may differ, so match rows of the head by token
    mine, theirs = proposable(draft), proposable(source)
    place = torch.searchsorted(theirs, mine).clamp_max(len(theirs) - 1)
    common = theirs[place] == mine
    head, given_head = draft.lm_head.weight, source.lm_head.weight
    head[common.nonzero()[:, 0].to(head.device)] = given_head[place[common].to(given_head.device)].to(head)
    return int(common.sum())


def _check_fits(draft: EaglePreTrainedModel, source: EaglePreTrainedModel) -> None:
    wanted, seen = type(draft).__name__, type(source).__name__
    if wanted != seen:
        raise ValueError(
            f"`init_from` is of class {seen}, but the draft to train of {wanted}: give both the same `draft_attention` "
            "and `method`."
        )

    # shapes can be equal while these differ, and the same weights then compute something else
    ours, theirs = ({**d.config.as_arguments(), "vocab_size": d.config.vocab_size} for d in (draft, source))
    for name in ours:
        if name not in draft.config.free_in_warm_start and ours[name] != theirs[name]:
            raise ValueError(
                f"`init_from` was trained with `{name}` {theirs[name]}, but the draft to train has {ours[name]}: make "
                "them equal, or train from the start."
            )

    prints = draft.config.tokenizer_fingerprint, source.config.tokenizer_fingerprint
    if None not in prints and prints[0] != prints[1]:
        raise ValueError(
            f"`init_from` was made with another tokenizer (fingerprint {prints[1]}, this one has {prints[0]}), so the "
            "rows of its head stand for other tokens: train from the start."
        )

    shapes, given = ({n: list(x.shape) for n, x in d.state_dict().items()} for d in (draft, source))
    wrong = [f"{n} is {given.get(n)} instead of {shapes[n]}" for n in shapes if given.get(n) != shapes[n]]
    wrong = [text for text in wrong if text.split(" ", 1)[0] not in _OF_VOCABULARY]
    if wrong:
        raise ValueError(
            f"`init_from` does not fit the draft to train: {'; '.join(wrong[:4])}. Start from a draft of the same "
            "widths, heads and taps, or from none."
        )
