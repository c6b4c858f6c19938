"""The draft vocabulary: token counts -> `t2d`/`d2t` and back (`d2t` holds offsets, ids ascend: contract section 5)."""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase


@dataclass
class VocabularyMapping:
    """Which target tokens a draft can propose.

    Attributes:
        d2t: int64 `(draft_vocab_size,)`: the target id of draft id `j` is `j + d2t[j]`.
        t2d: bool `(vocab_size,)`: whether a target id is in the draft vocabulary.
        coverage: share of the counted tokens covered by the draft vocabulary, in `[0, 1]`.
    """

    d2t: torch.Tensor
    t2d: torch.Tensor
    coverage: float | None = None

    @classmethod
    def from_token_ids(cls, token_ids: torch.Tensor, vocab_size: int) -> "VocabularyMapping":
        """From the target ids to keep, in any order."""
        ids = torch.unique(token_ids.to(torch.long))  # sorted
        if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < vocab_size:
            raise ValueError(
                f"Token ids of the draft vocabulary must lie between 0 and {vocab_size - 1}, got "
                f"{int(ids[0])}..{int(ids[-1])}: the mapping was made with another tokenizer."
            )

        t2d = torch.zeros(vocab_size, dtype=torch.bool)
        t2d[ids] = True
        return cls(d2t=ids - torch.arange(len(ids)), t2d=t2d)

    @classmethod
    def from_counts(
        cls,
        counts: torch.Tensor,
        draft_vocab_size: int,
        special_ids: "Iterable[int]" = (),
        fill_ids: "Iterable[int]" = (),
    ) -> "VocabularyMapping":
        """The `draft_vocab_size` most frequent tokens, always with the special tokens.

        Args:
            counts: int `(vocab_size,)`, how often each token occurs among the supervised tokens.
            draft_vocab_size: how many tokens to keep; `vocab_size` keeps all.
            special_ids: kept whatever their count (end of turn, end of text, ...).
            fill_ids: added in this order if fewer different tokens were seen, see `frequent_ids`.

        Raises:
            ValueError: if the size does not fit the vocabulary, or exceeds the number of different tokens seen plus
                `fill_ids`: the rest would be an arbitrary choice.
        """
        vocab_size = counts.numel()
        check_draft_vocab_size(draft_vocab_size, vocab_size)

        special = torch.tensor(sorted({int(i) for i in special_ids if i is not None and 0 <= int(i) < vocab_size}))
        special = special.to(torch.long)

        wanted = counts.to(torch.float64)
        wanted[special] = float("inf")
        seen = int((wanted > 0).sum())

        fill = torch.tensor([int(i) for i in fill_ids if 0 <= int(i) < vocab_size], dtype=torch.long)
        fill = fill[wanted[fill] == 0]

        if draft_vocab_size > seen + len(fill) and draft_vocab_size != vocab_size:
            held = f"{seen} different tokens" + (f", and the tokenizer {len(fill)} others" if len(fill) else "")
            ways = "use more data" + ("" if len(fill) else ", fill it up with `fill_vocabulary`")
            raise ValueError(
                f"`draft_vocab_size` is {draft_vocab_size} but the supervised tokens hold only {held}: {ways}, or "
                f"`draft_vocab_size` of at most {seen + len(fill)}."
            )

        if draft_vocab_size < len(special):
            raise ValueError(
                f"`draft_vocab_size` is {draft_vocab_size}, less than the {len(special)} special tokens that it must "
                "hold: raise it."
            )

        wanted[fill] = torch.linspace(0.9, 0.1, len(fill), dtype=torch.float64)  # after all that was seen once

        # a stable sort gives ties to the lower id, so the same data give the same mapping everywhere
        kept = torch.sort(wanted, descending=True, stable=True).indices[:draft_vocab_size]
        mapping = cls.from_token_ids(kept, vocab_size)

        total = int(counts.sum())
        mapping.coverage = float(counts[mapping.t2d].sum()) / total if total else None
        return mapping


def check_draft_vocab_size(draft_vocab_size: int, vocab_size: int) -> None:
    """`ValueError` unless `1 <= draft_vocab_size <= vocab_size`."""
    if not 1 <= draft_vocab_size <= vocab_size:
        raise ValueError(
            f"`draft_vocab_size` must be between 1 and the target's vocabulary size {vocab_size}, got "
            f"{draft_vocab_size}."
        )


def check_mapping(d2t: torch.Tensor, t2d: torch.Tensor) -> None:
    """`ValueError` unless `d2t` (offsets) and `t2d` describe the same ascending set of target ids."""
    ids, t2d = draft_token_ids(d2t).cpu(), t2d.cpu()

    fits = bool((ids[1:] > ids[:-1]).all()) and bool((ids >= 0).all()) and bool((ids < t2d.numel()).all())
    if not fits or int(t2d.sum()) != ids.numel() or not bool(t2d[ids].all()):
        raise ValueError(
            "`d2t` and `t2d` of this draft do not fit each other: `j + d2t[j]` must be ascending target ids, exactly "
            f"those marked in `t2d` ({int(t2d.sum())} marked, {ids.numel()} draft ids). Were absolute ids stored, or "
            "were the buffers lost?"
        )


def draft_token_ids(d2t: torch.Tensor) -> torch.Tensor:
    """Target ids of draft ids `0..draft_vocab_size - 1`, shape `(draft_vocab_size,)`."""
    return d2t + torch.arange(d2t.numel(), device=d2t.device)


def count_supervised_tokens(dataset, vocab_size: int) -> torch.Tensor:
    """How often each target token is supervised, int64 `(vocab_size,)`.

    Args:
        dataset: with columns `input_ids` and `loss_mask`, read in Arrow batches.
        vocab_size: the target's.

    Raises:
        ValueError: for a token id outside the vocabulary: the data were tokenised with another tokenizer.
    """
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for batch in dataset.with_format("arrow").iter(batch_size=4096):
        ids, mask = (
            torch.from_numpy(batch[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype("int64"))
            for name in ("input_ids", "loss_mask")
        )
        ids = ids[mask > 0]  # -100 is not supervised

        if ids.numel() and int(ids.max()) >= vocab_size:
            raise ValueError(
                f"A record holds token id {int(ids.max())} but the target's vocabulary has {vocab_size} tokens: the "
                "data were tokenised with another tokenizer."
            )
        counts += torch.bincount(ids, minlength=vocab_size)
    return counts


def frequent_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """A tokenizer's ids, the most frequent in its training first, without special or added ones, to fill a vocabulary.

    They are in id order, which is how tokenizers are built: byte-pair encoding gives each merge the next id, the most
    frequent pair first, and WordPiece and Unigram list their pieces by frequency or score.
    """
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return sorted(set(tokenizer.get_vocab().values()) - added)


def count_unseen(token_ids: torch.Tensor, counts: torch.Tensor, special_ids: "Iterable[int]" = ()) -> int:
    """How many tokens of a draft vocabulary were never counted, so that it was filled up with them.

    Args:
        token_ids: target ids of the draft vocabulary.
        counts: int `(vocab_size,)`, how often each token occurred.
        special_ids: which the vocabulary holds anyway.
    """
    return len(set(token_ids[counts[token_ids] == 0].tolist()) - set(special_ids))


def told_filled(tokens: int | None) -> str | None:
    """A sentence about so many tokens that a draft vocabulary was filled up with; `None` if there are none."""
    if not tokens:
        return None
    return (
        f"{tokens:,} tokens of the draft vocabulary are not among the supervised ones: it was filled up with the "
        "tokenizer's most frequent (`fill_vocabulary`), the lowest ids first."
    )


def token_rows(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Rows of a table with one for each id of a tokenizer; more than its tokens if ids are skipped."""
    return max([len(tokenizer) - 1, *tokenizer.get_vocab().values()]) + 1


def coverage_by_size(
    counts: torch.Tensor, special_ids: "Iterable[int]" = (), largest: int | None = None, total: int | None = None
) -> dict[int, float]:
    """Share of all counted tokens that draft vocabularies of 4096, 8192, ... and `largest` tokens cover, by size.

    Args:
        counts: int `(vocab_size,)`, how often each token occurred.
        special_ids: which every one of them holds.
        largest: the last size; by default the whole vocabulary.
        total: the number of tokens to divide by; by default the sum of `counts`.
    """
    largest = largest or counts.numel()
    total = max(int(counts.sum()) if total is None else total, 1)

    order = counts.to(torch.float64)
    order[sorted({int(i) for i in special_ids if i is not None and 0 <= int(i) < counts.numel()})] = float("inf")
    reached = counts[torch.sort(order, descending=True, stable=True).indices].cumsum(0)

    sizes = [size for power in range(12, 40) if (size := 2**power) < largest]
    return {size: int(reached[size - 1]) / total for size in [*sizes, largest]}


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """16 hex digits that change if any token of the tokenizer gets another id."""
    vocab = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])).encode()
    return hashlib.sha256(vocab).hexdigest()[:16]
