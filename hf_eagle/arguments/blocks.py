"""Arguments of drafts that propose a block at once; only kinds that list them take them. No torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from .bounds import Bounds, Count, Positive, Whole
from .parser import argument as _arg


@dataclass
class BlockDraftArguments:
    """The shape of a block draft."""

    draft_num_layers: Annotated[int, Bounds(least=1, most=64)] = _arg(
        1, "DFlash: layers of the draft. With two or more, vLLM's CPU build needs `share_k_norm`."
    )
    block_size: Annotated[int, Bounds(least=2, most=65)] = _arg(
        8, "DFlash: slots of a block, the newest token and those proposed behind it: serve with one token less."
    )
    mask_token_id: Whole | None = _arg(
        None,
        "DFlash: token in the slots to be filled, which the data must not hold. Unset: the tokenizer's mask token, "
        "else the first row of the target's table that no token has, else a special token.",
    )
    share_k_norm: bool = _arg(
        False, "DFlash: one norm of the keys for all layers, written for each: then vLLM's CPU build runs it exactly."
    )
    served_form: Literal["servers", "transformers"] = _arg(
        "servers",
        "DFlash: form of the folder. Both servers load either; `transformers` is also what its own "
        "`generate(assistant_model=...)` loads.",
    )


@dataclass
class BlockTrainingArguments:
    """How a block draft is trained."""

    num_anchors: Count = _arg(512, "DFlash: blocks trained of a conversation in an epoch, at most; drawn anew in each.")
    slot_decay: Positive = _arg(
        4.0,
        "DFlash: the loss weights slot k with `exp(-(k - 1) / slot_decay)`; 4 is for blocks of 7 or 8, 7 for 16.",
    )
    dpace_alpha: Annotated[float, Bounds(least=0, most=1)] = _arg(
        0.5,
        "DFlash, `dpace`: the least probability to be right that a slot is given, when slots are weighted.",
    )
