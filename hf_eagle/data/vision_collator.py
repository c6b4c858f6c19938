"""Batches of conversations with images and videos."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from .collators import EagleDataCollator
from .frames import NoDecoder
from .media import KINDS, as_inputs, from_text


@dataclass
class DataCollatorForVisionEagle:
    """Pads rows of `build_vision_dataset` and makes the pixels of their media, all of a batch together.

    Args:
        processor:
            The processor that the data were made with.
        padding_side (`str`, *optional*, defaults to `"right"`):
            `"right"` or `"left"`.
        pad_to_multiple_of (`int`, *optional*):
            Round the length up to a multiple of this.

    Returns what [`EagleDataCollator`] does and, if a row has media, what the processor makes of them: `pixel_values`,
    `image_grid_thw`, `pixel_values_videos`, `video_grid_thw`, `second_per_grid_ts`; and `mm_token_type_ids` (batch,
    length), 1 on tokens of images and 2 on those of videos.

    Raises a `ValueError` if a row's media no longer fit its tokens, or cannot be loaded: they could when the data were
    made, and a row must not vanish from a batch.
    """

    processor: Any
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id
        pad = 0 if pad is None else pad
        self.tokens_only = EagleDataCollator(pad, self.padding_side, self.pad_to_multiple_of)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        if any("document_lengths" in row for row in rows):
            raise ValueError(
                "`packing` puts conversations side by side, which those with media cannot be: leave it out."
            )

        batch = self.tokens_only(rows)
        media: dict[str, list] = {kind: [] for kind in KINDS}
        for row in rows:
            try:
                loaded = from_text(row.get("media") or "[]", self.processor)
            except NoDecoder:
                raise
            except Exception as problem:  # whatever a decoder of media raises
                raise ValueError(f"A medium of {row['media'][:200]} cannot be loaded any more: {problem}") from problem
            for kind in KINDS:
                media[kind] += loaded[kind]

        if not any(media.values()):
            return batch

        made = self.processor(**as_inputs(media), return_tensors="pt")
        types = torch.tensor(self.processor.create_mm_token_type_ids(batch["input_ids"].tolist()))
        batch["mm_token_type_ids"] = types.masked_fill(batch["attention_mask"] == 0, 0)
        self._check(batch["mm_token_type_ids"], made, rows)
        return batch | {name: torch.as_tensor(x) for name, x in made.items()}

    def _check(self, types: torch.Tensor, made: dict, rows: list[dict]) -> None:
        for number, kind in enumerate(KINDS, 1):
            grids = made.get(f"{kind}_grid_thw")
            if grids is None:
                continue

            merge = getattr(self.processor, f"{kind}_processor").merge_size
            tokens, wanted = int((types == number).sum()), int((grids.prod(-1) // merge**2).sum())
            if tokens != wanted:
                raise ValueError(
                    f"The {kind}s of a batch are {wanted} tokens large, but its rows were made for {tokens}: a file "
                    f"among {', '.join(row['media'][:80] for row in rows if row.get('media'))} has changed, or the "
                    "processor has; make the data again."
                )
