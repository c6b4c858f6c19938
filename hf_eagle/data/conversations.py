"""Conversations to the token ids and loss masks that a draft is trained on."""

import logging

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher

from .loss_mask import ConversationEncoder
from .mask_check import check_loss_mask, show_mask
from .records import load_records, read_record, to_messages


__all__ = ["build_dataset", "encode_conversation", "load_records", "to_messages"]

logger = logging.getLogger(__name__)

_CHECKED = 16  # conversations whose mask is compared with the second method
_KEPT, _CUT, _CUT_TO_NOTHING, _UNANSWERED = range(4)
_ROWS = Features({"input_ids": List(Value("int32")), "loss_mask": List(Value("int8")), "outcome": Value("int8")})
_FORMAT = 1  # part of the cache's key: a change of what is written must raise it


def encode_conversation(
    messages: list[dict], tokenizer, max_length: int | None = None, finish_reason: list[str] | None = None
) -> dict[str, list[int]]:
    """One conversation's `input_ids` and `loss_mask`, lists of equal length.

    Args:
        messages: `[{"role": ..., "content": ...}]`, as `to_messages` returns them.
        tokenizer: with a chat template.
        max_length: longer conversations are cut here.
        finish_reason: why each answer ended; see `ConversationEncoder.encode`.

    Example:
        >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> encode_conversation(messages, tokenizer)["loss_mask"]

    Raises a `ValueError` when the conversation is empty or the template refuses it.
    """
    if not messages:
        raise ValueError("`messages` is empty; a conversation needs at least one message.")
    ids, mask = ConversationEncoder(tokenizer).encode([messages], [finish_reason])[0]
    return {"input_ids": ids[:max_length], "loss_mask": mask[:max_length]}


def build_dataset(records, tokenizer, max_length: int = 2048, num_proc: int | None = None) -> Dataset:
    """Tokenised conversations with their loss masks, columns `input_ids` and `loss_mask`; cached by `datasets`.

    Conversations longer than `max_length` tokens are cut there; those left without a supervised token are dropped;
    both are counted in one warning. The mask of a sample of the conversations is checked by a second method.

    Args:
        records (`datasets.Dataset` or list of dict): chat records of any form that `to_messages` reads.
        tokenizer: with a chat template.
        max_length (`int`, *optional*, defaults to 2048): in tokens.
        num_proc (`int`, *optional*): processes that tokenise.

    Raises:
        `ValueError`: a record is malformed (its index is named), the template marks no answer or marks it wrongly, or
        no conversation has a supervised token.
    """
    if max_length < 1:
        raise ValueError(f"`max_length` must be at least 1 token, got {max_length}.")
    if not len(records):
        raise ValueError("`records` is empty; there is nothing to train on.")
    if not isinstance(records, Dataset):
        read = [read_record(record, index) for index, record in enumerate(records)]
        records = Dataset.from_list([{"messages": m, "finish_reason": reason} for m, reason in read])

    encoder = ConversationEncoder(tokenizer)
    sample = np.unique(np.linspace(0, len(records) - 1, _CHECKED).astype(int)).tolist()
    check_loss_mask(encoder, [read_record(records[index], index)[0] for index in sample], sample)

    encoded = records.map(
        _encode_batch,
        batched=True,
        with_indices=True,
        remove_columns=records.column_names,
        features=_ROWS,
        num_proc=num_proc,
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length},
        new_fingerprint=_fingerprint(records, tokenizer, max_length),
        desc="tokenising",
    )
    outcome = encoded.with_format("numpy")["outcome"][:]
    kept = np.flatnonzero(outcome <= _CUT)
    _report(encoded, outcome, max_length)
    if not len(kept):
        ids, mask = encoder.encode([read_record(records[0], 0)[0]])[0]
        raise ValueError(
            "No conversation has a supervised token: `records` hold no answer, or `max_length` cuts every one. "
            f"Record 0 is {show_mask(encoder, ids, mask)!r}"
        )
    encoded = encoded.remove_columns("outcome")
    return encoded if len(kept) == len(encoded) else encoded.select(kept)


def _encode_batch(batch: dict[str, list], indices: list[int], tokenizer, max_length: int) -> dict[str, list]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    read = [read_record(row, index) for row, index in zip(rows, indices, strict=True)]
    encoded = ConversationEncoder(tokenizer).encode([m for m, _ in read], [reasons for _, reasons in read], indices)
    result = {"input_ids": [], "loss_mask": [], "outcome": []}
    for ids, mask in encoded:
        if any(mask[:max_length]):
            outcome = _CUT if len(ids) > max_length else _KEPT
        else:
            outcome, ids, mask = _CUT_TO_NOTHING if any(mask) else _UNANSWERED, [], []
        result["input_ids"].append(ids[:max_length])
        result["loss_mask"].append(mask[:max_length])
        result["outcome"].append(outcome)
    return result


def _fingerprint(records: Dataset, tokenizer, max_length: int) -> str:
    """Key of the cache. A tokenizer's own hash changes when it is first used, so what defines it is hashed."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return Hasher.hash([_FORMAT, records._fingerprint, vocabulary, tokenizer.chat_template, max_length])


def _report(encoded: Dataset, outcome: np.ndarray, max_length: int) -> None:
    cut, nothing, unanswered = (int((outcome == kind).sum()) for kind in (_CUT, _CUT_TO_NOTHING, _UNANSWERED))
    if cut or nothing or unanswered:
        logger.warning(
            "%d of %d conversations are longer than `max_length`=%d tokens and were cut; %d of those kept no answer "
            "and were dropped, as were %d without any answer.",
            cut + nothing,
            len(outcome),
            max_length,
            nothing,
            unanswered,
        )
    # the whole table: dropped conversations are empty rows in it
    tokens = sum(len(pc.list_flatten(chunk)) for chunk in encoded.data.column("input_ids").chunks)
    supervised = sum(pc.sum(pc.list_flatten(c)).as_py() or 0 for c in encoded.data.column("loss_mask").chunks)
    logger.info(
        "%d conversations, %d tokens, %.1f%% of them supervised",
        len(outcome) - nothing - unanswered,
        tokens,
        100 * supervised / max(tokens, 1),
    )
