"""Mend drafts with taps and their own head: EAGLE-3 with either attention."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from .. import mending
from ..draft_folder import Shape
from ..mending import Draft, rename
from ..rules_folder import looks_absolute
from ..rules_sglang import captured_ids
from .taps_vllm import TAPS


_NESTED = "eagle_config"


def steps(
    parameters: Sequence[Callable[[dict, int], Mapping[str, Shape]]],
    architectures: Sequence[str],
    model_types: Sequence[str],
) -> tuple[Callable[[Draft], None], ...]:
    """The steps of such a kind, in their order.

    Args:
        parameters: each server's parameters, from the config and the number of layers.
        architectures: what its config names.
        model_types: model types that are read as one; the first is written.
    """
    return (
        mending.names,
        _midlayer,
        _vocab_size,
        _vocabulary,
        partial(_surplus, parameters=parameters),
        partial(mending.classes, architectures=architectures, model_types=model_types),
        mending.layers_and_context,
        _head_and_features,
        _taps,
        mending.rope,
        mending.dtypes,
        mending.fields,
    )


def _surplus(draft: Draft, parameters: Sequence[Callable[[dict, int], Mapping[str, Shape]]]) -> None:
    wanted = {name for server in parameters for name in server(draft.config, draft.num_layers)}
    if "d2t" in draft.tensors:
        wanted |= {"d2t", "t2d"}
    mending.drop_surplus(draft, wanted)


def _midlayer(draft: Draft) -> None:
    """Name layer 0 as hf_eagle does."""
    rename(draft, lambda name: name.replace("layers.0.", "midlayer."), "layer 0 is named `midlayer`")


def _vocab_size(draft: Draft) -> None:
    """Set it by what the folder holds; the target's would hide that a draft belongs to another target."""
    tensors = draft.tensors
    if "t2d" in tensors:
        draft.write("vocab_size", len(tensors["t2d"]))
    elif "d2t" not in tensors and "lm_head.weight" in tensors:
        draft.write("vocab_size", len(tensors["lm_head.weight"]))


def _vocabulary(draft: Draft) -> None:
    """Sort offsets by target id, and the rows of the head with them."""
    tensors, vocab = draft.tensors, draft.config["vocab_size"]
    if "d2t" not in tensors or "lm_head.weight" not in tensors:
        return
    d2t, numbers = tensors["d2t"].long(), torch.arange(len(tensors["d2t"]))
    if looks_absolute(d2t, tensors.get("t2d"), vocab):
        d2t = d2t - numbers
        draft.done.append("`d2t` holds offsets now, it held ids")

    ids = d2t + numbers
    head = tensors["lm_head.weight"]
    sound = (
        len(ids) == len(head) and ids.unique().numel() == len(ids) and 0 <= int(ids.min()) and int(ids.max()) < vocab
    )
    if not sound:
        return

    order = ids.argsort()
    if not torch.equal(order, numbers):
        draft.done.append("`d2t` and the rows of `lm_head.weight` are in the order of the target's ids")
        tensors["lm_head.weight"], ids = head[order], ids[order]

    if len(ids) == vocab:
        draft.done.append("`d2t` was removed: the draft has the whole vocabulary")
        del tensors["d2t"]
        return

    t2d = torch.zeros(vocab, dtype=torch.bool)
    t2d[ids] = True
    if not torch.equal(t2d, tensors.get("t2d", ~t2d).bool()):
        draft.done.append("`t2d` marks the tokens that `d2t` names")
    tensors["d2t"], tensors["t2d"] = ids - numbers, t2d


def _head_and_features(draft: Draft) -> None:
    """Set sizes by the rows of the head, and by the columns of `fc`, which count the taps."""
    config, tensors = draft.config, draft.tensors
    if "lm_head.weight" in tensors:
        draft.write("draft_vocab_size", len(tensors["lm_head.weight"]))
    if any(name.startswith("fc_norm.") for name in tensors):
        draft.write("fc_norm", True)

    columns = tensors["fc.weight"].shape[-1]
    if config.get("target_hidden_size") is None and columns % config["hidden_size"] == 0:
        draft.write("target_hidden_size", config["hidden_size"])
    ids = config.get(TAPS) or (config.get(_NESTED) or {}).get(TAPS) or [2, 3, 4]
    if columns == len(ids) * (config.get("target_hidden_size") or 0):
        draft.write("num_aux_hidden_states", len(ids))


def _taps(draft: Draft) -> None:
    """Write both spellings of the taps. How SGLang counts depends on the target.

    If the spellings disagree, the trained one is known only if one of them is the target's default.
    """
    config, target = draft.config, draft.target
    if target is None:
        return

    default = [2, target.num_layers // 2, target.num_layers - 3]
    said = [list(ids) for ids in (config.get(TAPS), captured_ids(config, target)) if ids]
    if not said:
        said = [default] if config.get("num_aux_hidden_states", 3) == 3 else []

    entries = default if default in said else said[0] if said else None
    if entries is None or (entries != default and said != [entries] * len(said)):
        return
    if entries != sorted(set(entries)):
        return  # which columns of `fc` belong to which tap is not known

    # SGLang reads these ids as outputs for most targets, and as entries for some
    draft.write(TAPS, entries)
    for less in (1, 0):
        told = {**(config.get(_NESTED) or {}), "use_aux_hidden_state": True, TAPS: [i - less for i in entries]}
        if captured_ids({_NESTED: told}, target) == entries:
            draft.write(_NESTED, told)
            return
