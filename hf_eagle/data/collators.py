"""Batches of conversations, padded or packed, with the pixels of their media, and the document of each token."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .columns import read_row, with_a_token
from .frames import NoDecoder
from .media import KINDS, TYPES, from_text, kinds_of_tokens, shown


_OF_TEXT = ("input_ids", "attention_mask", *TYPES)  # of a processor's output, what is not about media


@dataclass
class EagleDataCollator:
    """Pads rows of `build_dataset`, or packed rows of `pack_dataset`, to one length; makes the pixels of their media.

    A row has `input_ids` and `loss_mask`, 1 on the assistant's tokens, 0 or -100 on all others; `labels` may stand for
    the mask: -100 where nothing is supervised, the token's own id elsewhere. Padding that a row's own `attention_mask`
    marks is left out. A row without a token is all padding; if a batch has no other rows, each gets one token that is
    not supervised.

    Args:
        pad_token_id (`int`):
            Fills `input_ids`; any id serves, since padding is masked.
        padding_side (`str`, *optional*, defaults to `"right"`):
            `"right"` or `"left"`.
        pad_to_multiple_of (`int`, *optional*):
            Round the length up to a multiple of this.
        processor (*optional*):
            The processor that rows of `build_vision_dataset` were made with.

    Returns `input_ids`, `attention_mask` (1 on tokens, 0 on padding) and `loss_mask` (1 on the assistant's tokens),
    each (batch, length) and `torch.long`. Packed rows, those with `document_lengths`, also give `documents` (0, 1, ...
    in each row, -1 on padding) and `position_ids`, which start again at 0 in every document. Rows with media also give
    what the processor makes of all media of the batch together, by the processor's names: `pixel_values`,
    `image_grid_thw` and others. If it says what tokens stand for, as `mm_token_type_ids` or `token_type_ids`, so does
    the batch: (batch, length), 1 on tokens of images and 2 on those of videos.

    Raises a `ValueError` if a column is missing or malformed, if only some of the rows are packed, if a row's documents
    do not fill it, or if its media no longer fit its tokens or cannot be loaded: they could when the data were made,
    and a row must not vanish from a batch.
    """

    pad_token_id: int
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None
    processor: Any = None

    @classmethod
    def of(cls, processing: Any, **options) -> "EagleDataCollator":
        """One that pads as a tokenizer or a processor says, and shows media to the latter."""
        tokenizer = getattr(processing, "tokenizer", processing)
        pad = getattr(tokenizer, "pad_token_id", None)
        return cls(0 if pad is None else pad, processor=None if tokenizer is processing else processing, **options)

    def __post_init__(self):
        if not isinstance(self.pad_token_id, int) or self.pad_token_id < 0:
            raise ValueError(
                f"`pad_token_id` must be a token id, got {self.pad_token_id}; when the tokenizer has none, take its "
                "`eos_token_id`."
            )
        if self.padding_side not in ("right", "left"):
            raise ValueError(f'`padding_side` must be "right" or "left", got {self.padding_side!r}.')
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"`pad_to_multiple_of` must be at least 1, got {self.pad_to_multiple_of}.")

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.tokens_only(rows)
        return batch if self.processor is None else batch | self._pixels(batch, rows)

    def tokens_only(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """The batch without what a processor makes of media, none of which is loaded."""
        rows = [read_row(row, f"row {number} of the batch") for number, row in enumerate(rows)]
        packed = ["document_lengths" in row for row in rows]
        if any(packed) and not all(packed):
            raise ValueError(
                f"{sum(packed)} of {len(rows)} rows of the batch have `document_lengths`: pack all data or none."
            )

        length = max([1, *(len(row["input_ids"]) for row in rows)])
        multiple = self.pad_to_multiple_of or 1
        shape = (len(rows), -(-length // multiple) * multiple)

        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "loss_mask": 0}
        if packed[0]:
            fill |= {"documents": -1, "position_ids": 0}

        batch = {name: torch.full(shape, value) for name, value in fill.items()}
        for n, row in enumerate(rows):
            size = len(row["input_ids"])
            place = slice(0, size) if self.padding_side == "right" else slice(shape[1] - size, shape[1])
            batch["input_ids"][n, place] = row["input_ids"]
            batch["attention_mask"][n, place] = 1
            batch["loss_mask"][n, place] = row["loss_mask"]
            if packed[0]:
                batch["documents"][n, place], batch["position_ids"][n, place] = _documents(row)
        return with_a_token(batch)

    def _pixels(self, batch: dict[str, torch.Tensor], rows: list[dict]) -> dict[str, torch.Tensor]:
        """What the processor makes of the rows' media, and the kind of each token; nothing for rows without media."""
        media: dict[str, list] = {kind: [] for kind in KINDS}
        places = ""
        for row in rows:
            try:
                loaded = from_text(row.get("media") or "[]", self.processor)
            except NoDecoder:
                raise
            except Exception as problem:  # whatever a decoder of media raises
                raise ValueError(f"A medium of {row['media'][:200]} cannot be loaded any more: {problem}") from problem
            for kind in KINDS:
                media[kind] += loaded[kind]
            # some models take images and videos in one tensor, in the order of their places
            for medium in json.loads(row.get("media") or "[]"):
                places += getattr(self.processor, f"{medium['type']}_token", None) or ""

        if not any(media.values()):
            return {}
        if "documents" in batch:
            raise ValueError(
                "`packing` puts conversations side by side, which those with media cannot be: leave it out."
            )

        made = shown(self.processor, [places], [media], return_tensors="pt")
        found = {name: torch.as_tensor(x) for name, x in made.items() if name not in _OF_TEXT}
        types, alone = (torch.tensor(kinds_of_tokens(self.processor, x["input_ids"].tolist())) for x in (batch, made))
        types = types.masked_fill(batch["attention_mask"] == 0, 0)
        self._check_sizes(types, alone, rows)
        return found | {name: types for name in TYPES if name in made}

    def _check_sizes(self, types: torch.Tensor, alone: torch.Tensor, rows: list[dict]) -> None:
        """Refuse media of other sizes than when their rows were made, by the kinds of tokens in the rows and alone."""
        for number, kind in enumerate(KINDS, 1):
            tokens, wanted = int((types == number).sum()), int((alone == number).sum())
            if tokens != wanted:
                raise ValueError(
                    f"The {kind}s of a batch are {wanted} tokens large, but its rows were made for {tokens}: a file "
                    f"among {', '.join(row['media'][:80] for row in rows if row.get('media'))} has changed, or the "
                    "processor has; make the data again."
                )


def _documents(row: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The document of each token of a packed row, and the token's position in it."""
    lengths = torch.as_tensor(row["document_lengths"], dtype=torch.long)  # an empty list would be floats
    size = len(row["input_ids"])

    if int(lengths.sum()) != size:
        raise ValueError(
            f"`document_lengths` {lengths.tolist()} add up to {int(lengths.sum())} tokens, but the row has {size}: "
            "pack with `pack_dataset`."
        )

    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return torch.arange(len(lengths)).repeat_interleave(lengths), torch.arange(size) - starts


def mark_padding(
    documents: torch.Tensor | None, attention_mask: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor:
    """Document ids `(batch, length)` of a batch, -1 on padding; one document per sequence if none are given.

    Args:
        documents: ids of packed documents.
        attention_mask: 0 on padding; `None` means no padding.
        like: `(batch, length)`.
    """
    documents = torch.zeros_like(like) if documents is None else documents
    return documents if attention_mask is None else documents.masked_fill(attention_mask == 0, -1)


def documents_of(batch: Mapping[str, Any]) -> torch.Tensor:
    """`(batch, length)` document ids of a collator's batch, negative on padding."""
    return mark_padding(batch.get("documents"), batch.get("attention_mask"), like=batch["loss_mask"])


def number_documents(documents: torch.Tensor) -> torch.Tensor:
    """Each token's document, numbered from 0 over the whole batch: `(batch, length)` ids -> `(batch * length,)`.

    A document is a run of one id in one sequence; a run of padding counts as one.
    """
    changes = torch.ones_like(documents, dtype=torch.bool)
    changes[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return changes.flatten().cumsum(0) - 1


def any_packed(documents: torch.Tensor) -> bool:
    """Whether a row of `(batch, length)` ids, negative on padding, holds more than one document."""
    padding = documents < 0
    last = documents.masked_fill(padding, -1).amax(1)
    first = documents.masked_fill(padding, documents.numel()).amin(1)
    return bool((last > first).any())


def told_to_target(batch: Mapping[str, Any], documents: torch.Tensor, packed: bool) -> dict[str, torch.Tensor]:
    """How to describe a batch's rows to a target: by documents if a row holds several, else by the mask.

    Args:
        batch: of a collator.
        documents: `(batch, length)`, negative on padding.
        packed: whether any row holds several.
    """
    if packed:
        return {"documents": documents}
    if "documents" in batch and batch.get("attention_mask") is None:
        return {"attention_mask": (documents >= 0).long()}
    return {}
