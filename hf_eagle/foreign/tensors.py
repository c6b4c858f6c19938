"""Convert the tensors of a foreign draft into ours: names, biases, the order of the draft vocabulary, embeddings."""

from collections.abc import Mapping
from typing import Any

import torch

from ..drafts.misfits import misfits
from ..drafts.vocabulary import VocabularyMapping, draft_token_ids
from .forms import Form


# most projects' name of the only layer; some of our drafts use a different name
_LAYER = "layers.0."
_SERVED = (torch.float32, torch.bfloat16, torch.float16)


def renamed(
    form: Form, layer: str, tensors: dict[str, torch.Tensor], several_layers: bool = False
) -> dict[str, torch.Tensor]:
    """Rename tensors to our names. Keeps `embed_tokens.weight`, drops copies that only training needs.

    Args:
        form: the draft's form.
        layer: prefix of the first layer's tensor names in our drafts of its kind, with a dot at the end.
        tensors: tensors by the form's names.
        several_layers: whether servers run more than one layer of such a draft.

    Raises:
        ValueError: if there are several layers, or a tensor is quantised.
    """
    found = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(form.prefix)
        if name in form.own_copies or name.endswith("rotary_emb.inv_freq"):
            continue  # RoPE's frequencies follow from the config
        start = next((start for start in form.names if name.startswith(start)), "")
        name = form.names.get(start, "") + name.removeprefix(start)
        if name.startswith(_LAYER):
            name = layer + name.removeprefix(_LAYER)
        found[name] = tensor

    more = sorted({name.split(".")[1] for name in found if name.startswith("layers.")} - {"0"}, key=int)
    if more and not several_layers:
        raise ValueError(
            f"`num_hidden_layers` of this draft is {len(more) + 1}: vLLM and SGLang run a second layer differently, so "
            "only drafts with one layer are imported."
        )

    if "mask_hidden" in found:
        raise ValueError(
            "`mask_hidden` shows `parallel_drafting`: such a draft proposes all tokens in one forward pass."
        )

    for name, tensor in found.items():
        if name not in ("d2t", "t2d") and tensor.dtype not in _SERVED:
            raise ValueError(
                f"`{name}` is stored as {str(tensor.dtype).removeprefix('torch.')}: a quantised draft cannot be "
                "imported, use the draft that it was made from."
            )
    return found


def weights_dtype(tensors: dict[str, torch.Tensor]) -> torch.dtype:
    """Return the narrowest dtype that holds all tensors without rounding, whatever the config says."""
    dtype = None
    for name, tensor in tensors.items():
        if name not in ("d2t", "t2d", "embed_tokens.weight"):
            dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)

    return dtype


def drop_biases(tensors: dict[str, torch.Tensor], known: Mapping[str, str | None] | None = None) -> None:
    """Leave out biases that are zero, in place.

    Args:
        tensors: tensors by our names.
        known: name -> why this bias is refused if it is not zero; `None` drops it anyway.

    Raises:
        ValueError: names the flag of a bias that is not zero.
    """
    known = known or {}
    for name in [name for name in tensors if name.endswith(".bias")]:
        bias = tensors.pop(name)
        if not bias.any():
            continue

        flag = "attention_bias" if ".self_attn." in name else "mlp_bias" if ".mlp." in name else name
        why = known.get(name, f"`{flag}`: this draft holds a bias, `{name}`, which served drafts do not have.")
        if why is not None:
            raise ValueError(why)


def sort_vocabulary(tensors: dict[str, torch.Tensor], vocab_size: int) -> int:
    """Sort the draft vocabulary, and the head's rows with it, by target id, in place.

    `d2t` holds offsets in every form. ModelOpt and NeMo order tokens by frequency, and ModelOpt stores no `t2d`.

    Args:
        tensors: tensors with `lm_head.weight` `(draft_vocab_size, hidden)`, maybe `d2t` and `t2d`.
        vocab_size: size of the target's vocabulary.

    Returns:
        The number of draft tokens.

    Raises:
        ValueError: if `d2t` and `t2d` do not describe the rows of the head.
    """
    head, d2t, t2d = tensors.get("lm_head.weight"), tensors.pop("d2t", None), tensors.pop("t2d", None)
    if head is None:
        raise ValueError("`lm_head.weight` is missing in this draft: its head was not published with it.")

    size = head.shape[0]
    if size == vocab_size and (d2t is None or not d2t.any()):
        return size

    if d2t is None or d2t.shape != (size,):
        seen = "is missing" if d2t is None else f"has shape {list(d2t.shape)}"
        raise ValueError(f"`d2t` {seen}, but `lm_head.weight` has {size} rows for {vocab_size} target tokens.")

    ids, order = draft_token_ids(d2t.long()).sort()
    if ids[0] < 0 or ids[-1] >= vocab_size or bool((ids[1:] == ids[:-1]).any()):
        raise ValueError(
            "`d2t` must hold offsets: `j + d2t[j]` must be different target ids between 0 and "
            f"{vocab_size - 1}, but they are {int(ids[0])}..{int(ids[-1])}. Were absolute ids stored?"
        )

    mapping = VocabularyMapping.from_token_ids(ids, vocab_size)
    if t2d is not None and not torch.equal(t2d.bool(), mapping.t2d):
        raise ValueError(
            f"`t2d` of this draft marks {int(t2d.bool().sum())} tokens, which are not the {size} that `d2t` names: its "
            "vocabulary mapping was never set, or lost."
        )

    _check_rows(head, d2t)
    tensors["lm_head.weight"] = head[order]
    if size < vocab_size:
        tensors |= {"d2t": mapping.d2t, "t2d": mapping.t2d}
    return size


def _check_rows(head: torch.Tensor, d2t: torch.Tensor) -> None:
    """Refuse a head pruned as `head[d2t]`, as TorchSpec's converter does: neighbours with equal offsets share a row."""
    pairs = (d2t[1:] == d2t[:-1]).nonzero()[:, 0]
    same = (head[pairs] == head[pairs + 1]).all(-1)
    if len(pairs) and bool(same.all()):
        raise ValueError(
            "`lm_head.weight` holds one row for every run of neighbouring tokens: it was pruned by the offsets in "
            "`d2t` instead of by token ids, so its rows belong to other tokens. Convert the draft without pruning, "
            "and prune it here."
        )


def check_embedding(given: torch.Tensor, target: torch.Tensor) -> None:
    """Raise a `ValueError` if a draft's embeddings `(vocab_size, hidden)` are not its target's, up to rounding."""
    if given.shape != target.shape:
        raise ValueError(
            f"`embed_tokens` of this draft is {list(given.shape)} but the target's is {list(target.shape)}: the draft "
            "belongs to a different target."
        )

    wrong = 0
    for ours, theirs in zip(given.split(4096), target.split(4096), strict=True):  # all at once would take gigabytes
        wrong += int((~torch.isclose(ours.float(), theirs.float(), rtol=2**-7, atol=1e-5).all(-1)).sum())

    if wrong:
        raise ValueError(
            f"`embed_tokens` of this draft differs from the target's in {wrong} of {len(given)} tokens: it was "
            "trained, or is another target's, but servers run a draft with its target's embeddings."
        )


def check_head(given: torch.Tensor, target: torch.Tensor) -> None:
    """Raise a `ValueError` if a head in a draft's file is not its target's, `(vocab_size, hidden)`, up to rounding."""
    same = given.shape == target.shape
    if not same or not torch.allclose(given.float(), target.float(), rtol=2**-7, atol=1e-5):
        raise ValueError(
            "`lm_head.weight` lies in this draft's file and is not its target's: SGLang and transformers run such a "
            "draft with its target's head, so one with a head of its own cannot be imported."
        )


def check_taps(fc: torch.Tensor | None, width: int, tap_ids: list[int]) -> None:
    """Raise a `ValueError` if `fc` `(hidden, taps * width)` takes more or fewer taps than `tap_ids` names."""
    if tap_ids and fc is not None and fc.shape[-1] != width * len(tap_ids):
        raise ValueError(
            f"`fc.weight` of this draft takes {fc.shape[-1] / width:g} taps, but {len(tap_ids)} are known, {tap_ids}: "
            "give the entry ids that it was trained with as `tap_ids`."
        )


def check_names(tensors: dict[str, torch.Tensor], wanted: dict[str, Any]) -> None:
    """Raise a `ValueError` that names tensors that are missing, unexpected, or of a different shape from `wanted`."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    wanted = {name: list(shape) for name, shape in wanted.items()}
    wrong = [f"`{name}` {what}" for name, what in misfits(shapes, wanted)]
    if wrong:
        raise ValueError(
            f"`draft` does not hold the tensors of its form, with the sizes in its config: {'; '.join(wrong[:6])}"
            + (f"; and {len(wrong) - 6} more." if len(wrong) > 6 else ".")
        )
