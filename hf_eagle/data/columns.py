"""Check and read the columns of rows and batches, once, on the CPU, before a batch is planned."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch


IGNORED = -100  # losses of torch skip it
COLUMNS = "`input_ids`, a list of token ids, and `loss_mask`, 1 on each token of an answer and 0 on all others"


def check_data(**datasets: Any) -> None:
    """Refuse data that cannot become batches, as far as their column names show.

    Args:
        datasets: by the name of their argument; a dict of several is allowed.

    Raises:
        ValueError: naming the column that is missing.
    """
    for argument, given in datasets.items():
        for data in given.values() if isinstance(given, dict) else [given]:
            names = getattr(data, "column_names", None)
            lack = lacks(names) if isinstance(names, list) else None
            if lack:
                raise ValueError(
                    f"`{argument}` has {lack}: give it {COLUMNS} (`build_dataset` makes both of conversations)."
                )


def read_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a row as a collator takes it: without padding, and with a mask of zeros and ones.

    Args:
        row: `input_ids` and `loss_mask`, where -100 is not supervised. `labels` may replace the mask: -100 on tokens
            that are not supervised, else the token's id. `attention_mask`, if given, is 0 on padding, which is cut off.
        where: name of the row in errors: `"row 3 of the batch"`.

    Returns:
        The row, with `input_ids` and `loss_mask` as int64 `(length,)`.

    Raises:
        ValueError: if the row is not a mapping, a column is missing, values are not whole numbers, columns differ in
            length, mask or labels have invalid values or disagree, or there is padding between tokens.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where.capitalize()} is {shown(row)}: each row must be a dict of {COLUMNS}.")
    if lack := lacks(row):
        raise ValueError(f"{where.capitalize()} has {lack}: give it {COLUMNS}.")

    names = ["input_ids", *_mask_columns(row)]
    if row.get("attention_mask") is not None:
        names.append("attention_mask")
    columns = {name: _whole_numbers(row, name, where) for name in names}

    ids = columns["input_ids"]
    for name, values in columns.items():
        _check_length(values, ids, name, where)

    present = columns["attention_mask"] != 0 if "attention_mask" in columns else None
    mask = _read_mask(columns, present, where)

    if present is not None:
        place = _tokens_of(present, where)
        ids, mask = ids[place], mask[place]

    return {**row, "input_ids": ids, "loss_mask": mask}


def read_batch(batch: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return a batch in the form that planning needs: ids of the vocabulary, and a mask of zeros and ones.

    Args:
        batch: batch of any collator, on the CPU: `input_ids` and `loss_mask` or `labels`, `(batch, length)`, as in
            [`read_row`]. Padding, by `attention_mask` or `documents`, may hold any id and gets one of the vocabulary.
            A batch of nothing but padding gets a token, see [`with_a_token`].
        vocab_size: size of the target's vocabulary.

    Raises:
        ValueError: if a column is missing, columns differ in shape, mask or labels have invalid values or disagree, or
            a token is not in the vocabulary.
    """
    if lack := lacks(batch, word=""):
        raise ValueError(f"The batch has {lack}: its collator must give {COLUMNS}.")

    columns = {name: batch[name] for name in ("input_ids", *_mask_columns(batch))}
    ids = columns["input_ids"]
    for name, values in columns.items():
        if not isinstance(values, torch.Tensor) or values.dim() != 2:
            raise ValueError(f"`{name}` of the batch must be a tensor (batch, length), got {shown(values)}.")
        if values.shape != ids.shape:
            raise ValueError(
                f"`{name}` of the batch has the shape {tuple(values.shape)}, but `input_ids` has {tuple(ids.shape)}: "
                "its collator must give one value per token."
            )

    padding = _padding(batch)
    read = {**batch, "loss_mask": _read_mask(columns, ~padding, "the batch")}
    read.pop("labels", None)  # a target would compute a loss from them

    beyond = (ids < 0) | (ids >= vocab_size)
    if beyond.any():
        _check_tokens(ids, beyond & ~padding, vocab_size)
        read["input_ids"] = ids.masked_fill(beyond, 0)
    return with_a_token(read)


def with_a_token(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the batch. If it is nothing but padding, its rows begin with an unsupervised token instead.

    So a batch of empty rows is a step without a supervised row, and models never run on an empty input.

    Args:
        batch: `input_ids`, `loss_mask` and a collator's other columns, each `(batch, length)`; the length may be 0.
    """
    shape, padding = batch["input_ids"].shape, _padding(batch)
    if not padding.all():
        return batch

    grid = {name: x for name, x in batch.items() if isinstance(x, torch.Tensor) and x.shape == shape}
    if shape[1] == 0:
        grid = {name: x.new_zeros(shape[0], 1) for name, x in grid.items()}

    first = {"attention_mask": 1, "documents": 0, "position_ids": 0}
    for name in grid.keys() & first.keys():
        grid[name] = grid[name].clone()
        grid[name][:, 0] = first[name]
    return {**batch, **grid, "loss_mask": torch.zeros_like(grid["loss_mask"])}


def lacks(names: Iterable[str], word: str = "column ") -> str | None:
    """Describe the missing column, in words that continue "has"; `None` if none is missing."""
    names = list(names)
    if not names:
        return "no columns"

    missing = "input_ids" if "input_ids" not in names else "loss_mask"
    if missing in names or (missing == "loss_mask" and "labels" in names):
        return None
    return f"no {word}`{missing}`, only {', '.join(f'`{name}`' for name in names)}"


def _mask_columns(given: Mapping[str, Any]) -> list[str]:
    """Return the columns that hold the supervision, without one that is `None` if the other is given."""
    names = [name for name in ("loss_mask", "labels") if name in given]
    return [name for name in names if given[name] is not None] or names[:1]


def shown(value: Any) -> str:
    """Describe a value and its type, briefly enough for an error."""
    if isinstance(value, torch.Tensor):
        return f"one of shape {tuple(value.shape)}"
    if value is None:
        return "None"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"


def _whole_numbers(row: Mapping[str, Any], name: str, where: str) -> torch.Tensor:
    """Return a column of a row, int64 `(length,)`."""
    try:
        values = torch.as_tensor(row[name])
    except (TypeError, ValueError, RuntimeError):
        values = None

    whole = values is not None and values.dim() == 1 and not values.is_complex()
    if not whole or (values.is_floating_point() and not torch.equal(values, values.round())):
        raise ValueError(f"`{name}` of {where} must be a list of whole numbers, one per token, got {shown(row[name])}.")
    return values.long()


def _read_mask(columns: Mapping[str, torch.Tensor], present: torch.Tensor | None, where: str) -> torch.Tensor:
    """Zeros and ones, from `loss_mask`, `labels`, or both of a row or a batch.

    Args:
        columns: `loss_mask`, `labels` or both, and `input_ids`, of the same shape.
        present: bool, false on padding, whose labels are not compared; `None` without padding.
        where: names the row or the batch in errors.
    """
    ids, labels = columns["input_ids"], columns.get("labels")
    if labels is not None:
        wrong = _first((labels != IGNORED) & (labels != ids), present)
        if wrong is not None:
            raise ValueError(
                f"`labels` of {_named(wrong, ids, where)} holds {labels[wrong].item()} at position {wrong[-1]}, where "
                f"`input_ids` holds {ids[wrong].item()}: labels must be {IGNORED} or the token's id, not shifted; "
                "give a mask of zeros and ones as `loss_mask`."
            )
        by_labels = (labels != IGNORED).long()
        if "loss_mask" not in columns:
            return by_labels

    mask = _of_loss_mask(columns["loss_mask"], where)
    apart = None if labels is None else _first(mask != by_labels, present)
    if apart is not None:
        raise ValueError(
            f"`labels` and `loss_mask` of {_named(apart, ids, where)} disagree at position {apart[-1]}, where `labels` "
            f"holds {labels[apart].item()} and `loss_mask` holds {columns['loss_mask'][apart].item()}: leave out one "
            "of them."
        )
    return mask


def _first(found: torch.Tensor, present: torch.Tensor | None) -> tuple[int, ...] | None:
    """Return the first true position outside of padding: `(position,)` of a row, `(row, position)` of a batch."""
    found = found if present is None else found & present
    return tuple(found.nonzero()[0].tolist()) if found.any() else None


def _named(found: tuple[int, ...], ids: torch.Tensor, where: str) -> str:
    """Describe the row of a position, with its first tokens, since rows of a batch are shuffled."""
    *row, _ = found
    where = f"row {row[0]} of {where}" if row else where
    return f"{where}, which begins with {', '.join(map(str, ids[tuple(row)][:5].tolist()))},"


def _of_loss_mask(values: torch.Tensor, where: str) -> torch.Tensor:
    """Return the zeros and ones of a `loss_mask`, where -100 counts as zero."""
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
        raise ValueError(
            f"`{name}` of {where} has {len(values)} values for {len(ids)} `input_ids`: give one value per token."
        )


def _tokens_of(present: torch.Tensor, where: str) -> slice:
    """Return the slice of a padded row that holds its tokens."""
    places = present.nonzero()[:, 0].tolist()
    if not places:
        return slice(0, 0)
    if places[-1] - places[0] + 1 != len(places):
        raise ValueError(
            f"`attention_mask` of {where} is 0 between tokens: only padding before or after all tokens can be left out."
        )
    return slice(places[0], places[-1] + 1)


def _padding(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return a bool tensor `(batch, length)`, true on padding."""
    padding = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    mask, documents = batch.get("attention_mask"), batch.get("documents")
    if isinstance(mask, torch.Tensor) and mask.shape == padding.shape:
        padding |= mask == 0
    return padding if documents is None else padding | (documents < 0)


def _check_tokens(ids: torch.Tensor, beyond: torch.Tensor, vocab_size: int) -> None:
    found = _first(beyond, None)
    if found is None:
        return
    raise ValueError(
        f"`input_ids` of {_named(found, ids, 'the batch')} holds the id {ids[found].item()} at position {found[-1]}, "
        f"but the target's vocabulary has the ids 0 to {vocab_size - 1}: tokenise the data with the target's tokenizer."
    )
