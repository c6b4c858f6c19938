"""Batches of conversations."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass
class EagleDataCollator:
    """Pads rows of `build_dataset` to one length.

    Args:
        pad_token_id (`int`):
            Fills `input_ids`; any id of the target's vocabulary serves, since it is masked.
        padding_side (`str`, *optional*, defaults to `"right"`):
            `"right"` or `"left"`.
        pad_to_multiple_of (`int`, *optional*):
            Round the length up to a multiple of this.

    Returns `input_ids`, `attention_mask` (1 on tokens, 0 on padding) and `loss_mask` (1 on the assistant's tokens),
    each (batch, length) and `torch.long`.
    """

    pad_token_id: int
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None

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
        length = max(len(row["input_ids"]) for row in rows)
        multiple = self.pad_to_multiple_of or 1
        shape = (len(rows), -(-length // multiple) * multiple)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "loss_mask": torch.zeros(shape, dtype=torch.long),
        }
        for n, row in enumerate(rows):
            size = len(row["input_ids"])
            place = slice(0, size) if self.padding_side == "right" else slice(shape[1] - size, shape[1])
            batch["input_ids"][n, place] = torch.as_tensor(row["input_ids"])
            batch["attention_mask"][n, place] = 1
            batch["loss_mask"][n, place] = torch.as_tensor(row["loss_mask"])
        return batch
