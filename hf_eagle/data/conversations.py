"""Conversations to the token ids and loss masks that a draft is trained on."""

import logging
import os
import time
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher

from .caching import caching
from .carrying import carry_all, record_of
from .encoding import BAD, CUT, CUT_TO_NOTHING, UNANSWERED, Encoders, check_sample, encode_records
from .loss_mask import ConversationEncoder, MaskOptions
from .mask_check import show_mask
from .messages import read_record, read_tools, to_messages
from .records import load_records
from .token_stream import build_stream


__all__ = ["MaskOptions", "build_dataset", "build_stream", "encode_conversation", "load_records", "to_messages"]

logger = logging.getLogger(__name__)

_CHECKED = 16  # conversations whose mask is compared with a second method's
_COUNTED = {"outcome": Value("int8"), "blank": Value("int32")}  # reported, and not given to training
_ROWS = Features({"input_ids": List(Value("int32")), "loss_mask": List(Value("int8")), **_COUNTED})
_FORMAT = 5  # part of the cache's key: raise it with each change of what is written


def encode_conversation(
    messages: list[dict],
    tokenizer,
    max_length: int | None = None,
    finish_reason: list[str] | None = None,
    tools: list[dict] | None = None,
    options: MaskOptions | None = None,
    template_kwargs: dict | None = None,
) -> dict[str, list[int]]:
    """The `input_ids` and `loss_mask` of one conversation, lists of equal length.

    Args:
        messages: `[{"role": ..., "content": ...}]`, as `to_messages` returns them.
        tokenizer: with a chat template.
        max_length: longer conversations are cut here.
        finish_reason: why each answer ended; see `ConversationEncoder.encode`.
        tools: JSON schemas of the tools on offer, which the template writes out.
        options: which parts of the answers are supervised; by default all.
        template_kwargs: further arguments of the template, such as `{"enable_thinking": False}`.

    Example:
        >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> encode_conversation(messages, tokenizer)["loss_mask"]

    Raises a `ValueError` if the conversation is empty or the template refuses it.
    """
    if not messages:
        raise ValueError("`messages` is empty; a conversation needs at least one message.")

    encoder = ConversationEncoder(tokenizer, options, template_kwargs)
    ids, mask = encoder.encode([messages], [finish_reason], tools=[tools])[0]
    return {"input_ids": ids[:max_length], "loss_mask": mask[:max_length]}


@caching()
def build_dataset(
    records,
    tokenizer,
    max_length: int = 2048,
    num_proc: int | None = None,
    options: MaskOptions | None = None,
    template_kwargs: dict | None = None,
    skip_bad_records: bool = False,
) -> Dataset:
    """Tokenised conversations with their loss masks, columns `input_ids` and `loss_mask`.

    Cached by `datasets`: a result is read back as long as the records, the tokenizer, its template and the arguments
    below are the same. Conversations longer than `max_length` tokens are cut there; those left without a supervised
    token are dropped. Warnings count both, and also answers that are empty or white space only, which are not
    supervised. A second method checks the masks of a sample of the conversations.

    Args:
        records (`datasets.Dataset` or list of dict): chat records of any form that `to_messages` reads.
        tokenizer: with a chat template.
        max_length (`int`, *optional*, defaults to 2048): in tokens.
        num_proc (`int`, *optional*): processes that tokenise.
        options (`MaskOptions`, *optional*): which parts of the answers are supervised; by default all.
        template_kwargs (`dict`, *optional*): further arguments of the template, such as `{"enable_thinking": False}`.
        skip_bad_records (`bool`, *optional*, defaults to `False`): leave out, and count, records that cannot be read
            or rendered, instead of stopping.

    Raises:
        `ValueError`: a record is malformed (its file or index is named), the template marks no answer or marks it
        wrongly, or no conversation has a supervised token.
    """
    if max_length < 1:
        raise ValueError(f"`max_length` must be at least 1 token, got {max_length}.")
    if not len(records):
        raise ValueError("`records` is empty; there is nothing to train on.")

    records = records.with_format(None) if isinstance(records, Dataset) else carry_all(records)
    encoder = ConversationEncoder(tokenizer, options, template_kwargs)

    indices = np.unique(np.linspace(0, len(records) - 1, _CHECKED).astype(int)).tolist()
    check_sample([record_of(records[index]) for index in indices], indices, encoder, skip_bad_records)

    started = time.time()
    encoded = records.map(
        _encode_batch,
        batched=True,
        with_indices=True,
        remove_columns=records.column_names,
        features=_ROWS,
        num_proc=num_proc,
        fn_kwargs={
            "encoders": Encoders(tokenizer, options, template_kwargs),
            "max_length": max_length,
            "skip": skip_bad_records,
        },
        new_fingerprint=_fingerprint(records, encoder, max_length, skip_bad_records),
        desc="tokenising",
    )

    outcome = encoded.with_format("numpy")["outcome"][:]
    kept = np.flatnonzero(outcome <= CUT)
    _report_bad(records, outcome, encoder)
    _report(encoded, outcome, max_length, None if _from_cache(encoded, started) else time.time() - started)

    if not len(kept):
        index = int(np.argmin(outcome == BAD))
        record = record_of(records[index])
        ids, mask = encoder.encode([read_record(record, index)[0]], tools=[read_tools(record, index)])[0]
        raise ValueError(
            "No conversation has a supervised token: `records` hold no answer, or `max_length` cuts every one. "
            f"Record {index} is {show_mask(encoder, ids, mask)!r}"
        )

    encoded = encoded.remove_columns(list(_COUNTED))
    return encoded if len(kept) == len(encoded) else encoded.select(kept)


def _encode_batch(
    batch: dict[str, list], indices: list[int], encoders: Encoders, max_length: int, skip: bool
) -> dict[str, list]:
    rows = [record_of(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    return encode_records(rows, indices, encoders(), max_length, skip)


def _fingerprint(records: Dataset, encoder: ConversationEncoder, max_length: int, skip: bool) -> str:
    """The cache's key. A tokenizer's own hash changes when it is first used, so its definition is hashed."""
    tokenizer, renderer = encoder.tokenizer, encoder.renderer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())

    specials = [str(tokenizer.special_tokens_map), renderer.template, renderer.template_kwargs, repr(encoder.options)]
    return Hasher.hash([_FORMAT, records._fingerprint, vocabulary, *specials, max_length, skip])


def _from_cache(encoded: Dataset, started: float) -> bool:
    files = [file["filename"] for file in encoded.cache_files]
    return bool(files) and all(os.path.getmtime(file) < started for file in files)


def _report_bad(records: Dataset, outcome: np.ndarray, encoder: ConversationEncoder) -> None:
    """Count the bad records that were left out; if all are bad, raise the error of the first."""
    bad = np.flatnonzero(outcome == BAD)
    if not len(bad):
        return
    first = int(bad[0])

    try:
        encode_records([record_of(records[first])], [first], encoder, max_length=1)
    except ValueError as problem:
        if len(bad) == len(outcome):
            raise
        logger.warning("%d of %d records are bad and were left out; the first: %s", len(bad), len(outcome), problem)


def _report(encoded: Dataset, outcome: np.ndarray, max_length: int, seconds: float | None) -> None:
    cut, nothing, unanswered = (int((outcome == kind).sum()) for kind in (CUT, CUT_TO_NOTHING, UNANSWERED))
    if cut or nothing:
        logger.warning(
            "%d of %d conversations are longer than `max_length`=%d tokens and were cut; %d of those kept no answer "
            "and were dropped.",
            *(cut + nothing, len(outcome), max_length, nothing),
        )
    if unanswered:
        logger.warning("%d of %d conversations have no answer and were dropped.", unanswered, len(outcome))

    blank = pc.sum(encoded.data.column("blank")).as_py()
    if blank:
        logger.warning("%d answers are empty or white space only, which is no answer: they are not supervised.", blank)

    # counts from the whole table: dropped conversations are empty rows in it
    tokens = sum(len(pc.list_flatten(chunk)) for chunk in encoded.data.column("input_ids").chunks)
    supervised = sum(pc.sum(pc.list_flatten(c)).as_py() or 0 for c in encoded.data.column("loss_mask").chunks)

    if seconds is not None:
        logger.info(
            "Tokenised in %.1f s: %.0f conversations/s, %.0f tokens/s",
            seconds,
            len(outcome) / seconds,
            tokens / seconds,
        )
    else:
        logger.info("Read back from the cache: %s", Path(encoded.cache_files[0]["filename"]).parent)
    logger.info(
        "%d conversations, %d tokens, %.1f%% of them supervised",
        int((outcome <= CUT).sum()),
        tokens,
        100 * supervised / max(tokens, 1),
    )
