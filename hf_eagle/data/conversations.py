"""Conversations to the token ids and loss masks that a draft is trained on."""

import json
import logging
import os
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher

from .loss_mask import ConversationEncoder, MaskOptions
from .mask_check import check_loss_mask, show_mask
from .messages import read_record, read_tools, to_messages
from .records import load_records


__all__ = ["MaskOptions", "build_dataset", "build_stream", "encode_conversation", "load_records", "to_messages"]

logger = logging.getLogger(__name__)

_CHECKED = 16  # conversations whose mask is compared with the second method
_KEPT, _CUT, _CUT_TO_NOTHING, _UNANSWERED = range(4)
_ROWS = Features({"input_ids": List(Value("int32")), "loss_mask": List(Value("int8")), "outcome": Value("int8")})
_FORMAT = 2  # part of the cache's key: a change of what is written must raise it


def encode_conversation(
    messages: list[dict],
    tokenizer,
    max_length: int | None = None,
    finish_reason: list[str] | None = None,
    tools: list[dict] | None = None,
    options: MaskOptions | None = None,
    template_kwargs: dict | None = None,
) -> dict[str, list[int]]:
    """One conversation's `input_ids` and `loss_mask`, lists of equal length.

    Args:
        messages: `[{"role": ..., "content": ...}]`, as `to_messages` returns them.
        tokenizer: with a chat template.
        max_length: longer conversations are cut here.
        finish_reason: why each answer ended; see `ConversationEncoder.encode`.
        tools: JSON schemas of the tools on offer, which the template writes out.
        options: which parts of the answers are supervised; by default all.
        template_kwargs: what else the template is given, such as `{"enable_thinking": False}`.

    Example:
        >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> encode_conversation(messages, tokenizer)["loss_mask"]

    Raises a `ValueError` when the conversation is empty or the template refuses it.
    """
    if not messages:
        raise ValueError("`messages` is empty; a conversation needs at least one message.")
    encoder = ConversationEncoder(tokenizer, options, template_kwargs)
    ids, mask = encoder.encode([messages], [finish_reason], tools=[tools])[0]
    return {"input_ids": ids[:max_length], "loss_mask": mask[:max_length]}


def build_dataset(
    records,
    tokenizer,
    max_length: int = 2048,
    num_proc: int | None = None,
    options: MaskOptions | None = None,
    template_kwargs: dict | None = None,
) -> Dataset:
    """Tokenised conversations with their loss masks, columns `input_ids` and `loss_mask`.

    Cached by `datasets`: what was tokenised once is read back as long as the records, the tokenizer, its template and
    the arguments below are the same. Conversations longer than `max_length` tokens are cut there; those left without a
    supervised token are dropped; both are counted in one warning. The mask of a sample of the conversations is checked
    by a second method.

    Args:
        records (`datasets.Dataset` or list of dict): chat records of any form that `to_messages` reads.
        tokenizer: with a chat template.
        max_length (`int`, *optional*, defaults to 2048): in tokens.
        num_proc (`int`, *optional*): processes that tokenise.
        options (`MaskOptions`, *optional*): which parts of the answers are supervised; by default all.
        template_kwargs (`dict`, *optional*): what else the template is given, such as `{"enable_thinking": False}`.

    Raises:
        `ValueError`: a record is malformed (its index is named), the template marks no answer or marks it wrongly, or
        no conversation has a supervised token.
    """
    if max_length < 1:
        raise ValueError(f"`max_length` must be at least 1 token, got {max_length}.")
    if not len(records):
        raise ValueError("`records` is empty; there is nothing to train on.")
    if not isinstance(records, Dataset):
        read = [(*read_record(record, index), read_tools(record, index)) for index, record in enumerate(records)]
        # as texts, because Arrow gives all objects of a column the same keys
        rows = [{"messages": json.dumps(m), "finish_reason": r, "tools": t and json.dumps(t)} for m, r, t in read]
        records = Dataset.from_list(rows)

    encoder = ConversationEncoder(tokenizer, options, template_kwargs)
    indices = np.unique(np.linspace(0, len(records) - 1, _CHECKED).astype(int)).tolist()
    _check_sample(encoder, [records[index] for index in indices], indices)

    started = time.time()
    encoded = records.map(
        _encode_batch,
        batched=True,
        with_indices=True,
        remove_columns=records.column_names,
        features=_ROWS,
        num_proc=num_proc,
        fn_kwargs={"encoder": _Encoders(tokenizer, options, template_kwargs), "max_length": max_length},
        new_fingerprint=_fingerprint(records, encoder, max_length),
        desc="tokenising",
    )
    outcome = encoded.with_format("numpy")["outcome"][:]
    kept = np.flatnonzero(outcome <= _CUT)
    _report(encoded, outcome, max_length, None if _from_cache(encoded, started) else time.time() - started)
    if not len(kept):
        ids, mask = encoder.encode([read_record(records[0], 0)[0]], tools=[read_tools(records[0], 0)])[0]
        raise ValueError(
            "No conversation has a supervised token: `records` hold no answer, or `max_length` cuts every one. "
            f"Record 0 is {show_mask(encoder, ids, mask)!r}"
        )
    encoded = encoded.remove_columns("outcome")
    return encoded if len(kept) == len(encoded) else encoded.select(kept)


def build_stream(
    records: IterableDataset,
    tokenizer,
    max_length: int = 2048,
    options: MaskOptions | None = None,
    template_kwargs: dict | None = None,
    rank: int = 0,
    world: int = 1,
) -> IterableDataset:
    """As `build_dataset`, but conversations are read and tokenised while they are trained on.

    Nothing is cached or counted. The first conversations' masks are checked at once. Of `world` ranks, which read the
    same records in the same order, each tokenises every `world`-th one: files may be few, and are of any size.
    """
    sample = list(islice(records, _CHECKED))
    _check_sample(ConversationEncoder(tokenizer, options, template_kwargs), sample, list(range(len(sample))))
    if world > 1:
        records = records.filter(
            lambda _, indices: [index % world == rank for index in indices], with_indices=True, batched=True
        )
    encoder = _Encoders(tokenizer, options, template_kwargs)
    rows = records.map(
        _encode_batch,
        batched=True,
        batch_size=64,
        with_indices=True,
        remove_columns=list(sample[0]),
        features=_ROWS,
        fn_kwargs={"encoder": encoder, "max_length": max_length},
    )
    return rows.filter(lambda outcome: outcome <= _CUT, input_columns="outcome").remove_columns("outcome")


class _Encoders:
    """A `ConversationEncoder` that each process makes when it first needs it."""

    def __init__(self, *args):
        self.args, self.made = args, None

    def __getstate__(self):
        return {"args": self.args, "made": None}

    def __call__(self) -> ConversationEncoder:
        self.made = self.made or ConversationEncoder(*self.args)
        return self.made


def _check_sample(encoder: ConversationEncoder, records: list[dict], indices: list[int]) -> None:
    """Compares the masks of a few records with the second method, and tells what the template leaves out."""
    conversations = [read_record(record, index)[0] for record, index in zip(records, indices, strict=True)]
    tools = [read_tools(record, index) for record, index in zip(records, indices, strict=True)]
    check_loss_mask(encoder, conversations, indices, tools)
    messages = [message for conversation in conversations for message in conversation]
    if any("reasoning_content" in message for message in messages) and not encoder.renderer.thought_names:
        logger.warning("The chat template of `tokenizer` writes no thoughts: those in the records are left out.")
    if any("tool_calls" in message for message in messages) and not encoder.renderer.writes_calls:
        logger.warning("The chat template of `tokenizer` writes no tool calls: they become JSON in the answers' text.")


def _encode_batch(batch: dict[str, list], indices: list[int], encoder: _Encoders, max_length: int) -> dict[str, list]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    read = [read_record(row, index) for row, index in zip(rows, indices, strict=True)]
    tools = [read_tools(row, index) for row, index in zip(rows, indices, strict=True)]
    encoded = encoder().encode([m for m, _ in read], [reasons for _, reasons in read], indices, tools)
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


def _fingerprint(records: Dataset, encoder: ConversationEncoder, max_length: int) -> str:
    """Key of the cache. A tokenizer's own hash changes when it is first used, so what defines it is hashed."""
    tokenizer, renderer = encoder.tokenizer, encoder.renderer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    specials = [str(tokenizer.special_tokens_map), renderer.template, renderer.template_kwargs, repr(encoder.options)]
    return Hasher.hash([_FORMAT, records._fingerprint, vocabulary, *specials, max_length])


def _from_cache(encoded: Dataset, started: float) -> bool:
    files = [file["filename"] for file in encoded.cache_files]
    return bool(files) and all(os.path.getmtime(file) < started for file in files)


def _report(encoded: Dataset, outcome: np.ndarray, max_length: int, seconds: float | None) -> None:
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
        len(outcome) - nothing - unanswered,
        tokens,
        100 * supervised / max(tokens, 1),
    )
