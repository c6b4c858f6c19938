"""What the columns of rows and of batches mean: checked once, on the CPU, before a batch is planned."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch


IGNORED = -100  # what losses of torch pass over
_COLUMNS = "`input_ids`, a list of token ids, and `loss_mask`, 1 on each token of an answer and 0 on all others"


def check_data(**datasets: Any) -> None:
    """Refuse data that cannot become batches, as far as their column names tell.

    Args:
        datasets: by the name of the argument that they came in; several by name where there are.

    Raises:
        ValueError: naming the column that is missing.
    """
    for argument, given in datasets.items():
        for data in given.values() if isinstance(given, dict) else [given]:
            names = getattr(data, "column_names", None)
            missing = _missing(names) if isinstance(names, list) else None
            if missing:
                raise ValueError(
                    f"`{argument}` has no column `{missing}`, only {_listed(names)}: give it {_COLUMNS} "
                    "(`build_dataset` makes both of conversations)."
                )


def read_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row as a collator takes it: without padding, and its mask of zeros and ones.

    Args:
        row: `input_ids` and `loss_mask`, where -100 is not supervised; `labels` may stand for the mask, -100 where
            nothing is supervised. `attention_mask`, where there is one, is 0 on padding, which is cut off.
        where: the row is, for messages: `"row 3 of the batch"`.

    Returns:
        The row, with `input_ids` and `loss_mask` as int64 `(length,)`.

    Raises:
        ValueError: for a missing column, values that are no whole numbers, columns of different lengths, a mask of
            other values, or padding between tokens.
    """
    missing = _missing(row)
    if missing:
        raise ValueError(f"{where.capitalize()} has no column `{missing}`, only {_listed(row)}: give it {_COLUMNS}.")
    ids = _whole_numbers(row, "input_ids", where)
    name = "loss_mask" if "loss_mask" in row else "labels"
    mask = _as_mask(_whole_numbers(row, name, where), name, where)
    _check_length(mask, ids, name, where)
    if row.get("attention_mask") is not None:
        present = _whole_numbers(row, "attention_mask", where)
        _check_length(present, ids, "attention_mask", where)
        place = _tokens_of(present != 0, where)
        ids, mask = ids[place], mask[place]
    return {**row, "input_ids": ids, "loss_mask": mask}


def read_batch(batch: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """A batch as it is planned, whoever collated it: ids of the vocabulary, and a mask of zeros and ones.

    Args:
        batch: `input_ids` and `loss_mask` or `labels`, `(batch, length)`, on the CPU, as in [`read_row`]; padding, by
            `attention_mask` or `documents`, may hold any id and gets one of the vocabulary.
        vocab_size: of the target.

    Raises:
        ValueError: for a missing column, a mask of other values, or a token beyond the vocabulary.
    """
    missing = _missing(batch)
    if missing:
        raise ValueError(f"The batch has no `{missing}`, only {_listed(batch)}: its collator must give {_COLUMNS}.")
    name = "loss_mask" if "loss_mask" in batch else "labels"
    for column in ("input_ids", name):
        if not isinstance(batch[column], torch.Tensor) or batch[column].dim() != 2:
            raise ValueError(f"`{column}` of the batch must be a tensor (batch, length), got {_shown(batch[column])}.")
    read = {**batch, "loss_mask": _as_mask(batch[name], name, "the batch")}
    read.pop("labels", None)  # a target would make a loss of them

    ids = batch["input_ids"]
    beyond = (ids < 0) | (ids >= vocab_size)
    if beyond.any():
        _check_tokens(ids, beyond & ~_padding(batch), vocab_size)
        read["input_ids"] = ids.masked_fill(beyond, 0)
    return read


def _missing(names: Iterable[str]) -> str | None:
    if "input_ids" not in names:
        return "input_ids"
    return None if "loss_mask" in names or "labels" in names else "loss_mask"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none at all"


def _shown(value: Any) -> str:
    """A value with its type, short enough for a message."""
    if isinstance(value, torch.Tensor):
        return f"one of shape {tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"


def _whole_numbers(row: Mapping[str, Any], name: str, where: str) -> torch.Tensor:
    """A column of a row, int64 `(length,)`."""
    try:
        values = torch.as_tensor(row[name])
    except (TypeError, ValueError, RuntimeError):
        values = None
    whole = values is not None and values.dim() == 1 and not values.is_complex()
    if not whole or (values.is_floating_point() and not torch.equal(values, values.round())):
        raise ValueError(f"`{name}` of {where} must be a list of whole numbers, one a token, got {_shown(row[name])}.")
    return values.long()


def _as_mask(values: torch.Tensor, name: str, where: str) -> torch.Tensor:
    """Zeros and ones of a `loss_mask`, in which -100 is a zero, or of `labels`, in which all else is a one."""
    if name == "labels":
        return (values != IGNORED).long()
    wrong = (values != 0) & (values != 1)
    if not wrong.any():
        return values
    found = values[wrong & (values != IGNORED)]
    if found.numel():
        raise ValueError(
            f"`loss_mask` of {where} holds {found[0].item()}: it must be 1 on each token of an answer, and 0 or "
            f"{IGNORED} on all others."
        )
    return values.masked_fill(wrong, 0)


def _check_length(values: torch.Tensor, ids: torch.Tensor, name: str, where: str) -> None:
    if len(values) != len(ids):
        raise ValueError(f"`{name}` of {where} has {len(values)} values for {len(ids)} `input_ids`: give one a token.")


def _tokens_of(present: torch.Tensor, where: str) -> slice:
    """Where the tokens of a padded row are."""
    places = present.nonzero()[:, 0].tolist()
    if not places:
        return slice(0, 0)
    if places[-1] - places[0] + 1 != len(places):
        raise ValueError(
            f"`attention_mask` of {where} is 0 between tokens: only padding in front of them or behind them can be "
            "left out."
        )
    return slice(places[0], places[-1] + 1)


def _padding(batch: Mapping[str, Any]) -> torch.Tensor:
    """Bool `(batch, length)`."""
    padding = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    mask, documents = batch.get("attention_mask"), batch.get("documents")
    if isinstance(mask, torch.Tensor) and mask.shape == padding.shape:
        padding |= mask == 0
    return padding if documents is None else padding | (documents < 0)


def _check_tokens(ids: torch.Tensor, beyond: torch.Tensor, vocab_size: int) -> None:
    if not beyond.any():
        return
    row, place = beyond.nonzero()[0].tolist()
    begins = ", ".join(map(str, ids[row, :5].tolist()))
    raise ValueError(
        f"`input_ids` of row {row} of the batch, which begins with {begins}, holds the id {ids[row, place].item()} at "
        f"place {place}, but the target's vocabulary has the ids 0 to {vocab_size - 1}: tokenise the data with the "
        "target's tokenizer."
    )
