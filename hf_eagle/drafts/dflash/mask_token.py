"""The mask token of a block draft, which stands in the slots to be filled.

The data must not hold it, and its row of the target's table must not be zero: the query of a zero embedding is zero in
the first layer, so the slot would attend to everything equally.
"""

import torch
from torch.utils.data import IterableDataset


def choose_mask_token(tokenizer, data, embeddings: torch.Tensor) -> tuple[int, str]:
    """A token to mask with, and why it was chosen.

    The first of these that the data do not hold and whose row is not zero: the tokenizer's mask token; the first row of
    the target's table that no token has; the special token with the highest id, other than the bos, eos, pad, unk, sep
    and cls tokens.

    Args:
        tokenizer: the target's.
        data: with a column `input_ids`; a stream cannot be searched beforehand, and is searched batch by batch.
        embeddings: `(vocab_size, hidden)`, the target's table.

    Raises:
        ValueError: if there is none.
    """
    vocab_size, known = len(embeddings), set(tokenizer.get_vocab().values())
    held = tokens_of(data, vocab_size)
    named = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk", "sep", "cls")}
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    unused = [number for number in range(vocab_size) if number not in known]
    embedded = embeddings.any(dim=-1).cpu()

    candidates = [
        (getattr(tokenizer, "mask_token_id", None), "the tokenizer's mask token"),
        *((number, "a row of the target's table without a token") for number in unused),
        *((number, "a special token") for number in sorted(special - named, reverse=True)),
    ]
    for number, why in candidates:
        if number is not None and number < vocab_size and not held[number] and embedded[number]:
            return number, why

    raise ValueError(
        "`mask_token_id` is unset, but the tokenizer's mask token, the rows of the target's table without a token, and "
        "the special tokens are missing, in the data, or zero in that table: set it to a token that the data lack."
    )


def tokens_of(data, vocab_size: int) -> torch.Tensor:
    """Which tokens the data hold, bool `(vocab_size,)`; all false for a stream, whose tokens are not known yet."""
    held = torch.zeros(vocab_size, dtype=torch.bool)
    if data is None or isinstance(data, IterableDataset):
        return held

    for batch in data.with_format("arrow").iter(batch_size=4096):
        ids = batch["input_ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype("int64")
        held[torch.from_numpy(ids).clamp_max(vocab_size - 1)] = True  # one beyond is refused where batches are read
    return held


def check_mask_token(mask_token_id: int, data, embeddings: torch.Tensor, keeps: bool = False) -> None:
    """`ValueError` if it is a token of the data, or its row of the table is zero.

    Args:
        mask_token_id: the token.
        data: as for [`choose_mask_token`].
        embeddings: `(vocab_size, hidden)`, the target's table.
        keeps: whether the draft is trained with it already, in this run or an earlier one; the error then says so.
    """
    if bool(tokens_of(data, mask_token_id + 2)[mask_token_id]):
        raise_for_mask_token(mask_token_id, keeps)
    if not bool(embeddings[mask_token_id].any()):
        raise ValueError(
            f"`mask_token_id` is {mask_token_id}, but its row of the target's table is zero, so that the slots to be "
            "filled would have no query in the first layer: set it to another token."
        )


def raise_for_mask_token(mask_token_id: int, keeps: bool = False) -> None:
    """Raise the `ValueError` of a mask token that is a token of the data; `keeps` as for [`check_mask_token`]."""
    cure = "set it to a token that they do not hold"
    if keeps:
        cure = "the draft is trained with it, so leave out the records that hold it, or train a new draft with another"
    raise ValueError(
        f"`mask_token_id` is {mask_token_id}, but the data hold that token, so that a draft could not tell it from a "
        f"slot to be filled: {cure}."
    )


def require_mask_token(mask_token_id: int | None) -> None:
    """`ValueError` if there is no mask token: nothing could stand in the slots to be filled."""
    if mask_token_id is None:
        raise ValueError(
            "`mask_token_id` of this DFlash draft is unset, so nothing can stand in the slots to be filled: set it, or "
            "let `fit_to_data` of the draft's config choose a token."
        )
