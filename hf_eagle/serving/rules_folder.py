"""What every reader of a draft folder relies on, whichever server it is: sizes, vocabulary, spellings, values."""

from collections.abc import Iterator

import torch

from .draft_folder import DraftFolder, Finding


READER = "Every reader"
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def size_findings(folder: DraftFolder) -> list[Finding]:
    """Sizes without which nothing else can be judged."""
    missing = [name for name in SIZES if not isinstance(folder.config.get(name), int)]
    return [Finding(READER, f"`{name}` is missing in config.json.", "write it") for name in missing]


def findings(folder: DraftFolder, values: bool = True) -> list[Finding]:
    """What is wrong with the folder itself.

    Args:
        folder: the draft.
        values: read all tensors, to find what is not a number; without it, only `d2t` and `t2d` are read.
    """
    rules = [_spellings, _dtypes, _leftovers, _vocabulary]
    if values:
        rules.append(_numbers)
    return [finding for rule in rules for finding in rule(folder)]


def _spellings(folder) -> Iterator[Finding]:
    """transformers 5 reads `rope_parameters`; older readers know `rope_theta` and `rope_scaling` alone."""
    config, old = folder.config, {"rope_theta", "rope_scaling"} & folder.config.keys()
    new = config.get("rope_parameters")
    if not new and "rope_theta" in old:
        yield Finding(
            READER,
            "RoPE is written in the old spelling alone, `rope_theta` and `rope_scaling`.",
            "write `rope_parameters` too",
        )
    if new and "rope_theta" not in old:
        yield Finding(
            READER,
            "RoPE is written in the new spelling alone, `rope_parameters`: older readers take base 10000 in silence.",
            "write `rope_theta` and `rope_scaling` too",
        )
    if new and "rope_theta" in old and (rope_of(config, "new") != rope_of(config, "old")):
        yield Finding(
            READER,
            f"the two spellings of RoPE disagree: `rope_parameters` {new}, `rope_theta` {config['rope_theta']}, "
            f"`rope_scaling` {config.get('rope_scaling')}.",
            "write in both what the draft was trained with",
        )


def rope_of(config: dict, spelling: str) -> tuple[float | None, dict]:
    """Base and scaling as the `new` or the `old` spelling gives them; no scaling is `{}`."""
    new = config.get("rope_parameters") or {}
    theta, scaling = config.get("rope_theta"), config.get("rope_scaling")
    if spelling == "new":
        theta, scaling = new.get("rope_theta"), {k: v for k, v in new.items() if k != "rope_theta"}
    scaling = {("rope_type" if k == "type" else k): v for k, v in (scaling or {}).items()}
    return theta, {} if scaling.get("rope_type", "default") == "default" else scaling


def _dtypes(folder) -> Iterator[Finding]:
    held = sorted({DTYPES[dtype] for dtype in folder.dtypes.values() if dtype in DTYPES})
    if len(held) > 1:
        yield Finding(READER, f"the tensors are of several dtypes, {', '.join(held)}.", "save them in one")
    said = [folder.config.get(name) for name in ("dtype", "torch_dtype")]
    if None in said:
        missing = "`dtype`" if said[0] is None else "`torch_dtype`"
        yield Finding(
            READER,
            f"{missing} is missing: readers of that spelling take a dtype of their own.",
            "write `dtype` and `torch_dtype`, both the tensors'",
        )
    for dtype in sorted({dtype for dtype in said if dtype is not None}):
        if held and held != [dtype]:
            yield Finding(
                READER,
                f"config.json says {dtype}, the tensors are {' and '.join(held)}.",
                "write the tensors' dtype as `dtype` and `torch_dtype`",
            )


def _leftovers(folder) -> Iterator[Finding]:
    if folder.config.get("use_cache") is False:
        yield Finding(
            READER,
            "`use_cache` is false, left behind by training: who heeds it decodes without a cache.",
            "leave the field out",
        )


def _vocabulary(folder) -> Iterator[Finding]:
    if folder.kind == "eagle1" or "d2t" not in folder.shapes:
        if "t2d" in folder.shapes and folder.kind != "eagle1":
            yield Finding(READER, "there is a `t2d` without a `d2t`.", "remove it, or restore `d2t`")
        return
    if not folder.dtypes["d2t"].startswith("I"):
        yield Finding(READER, f"`d2t` is of dtype {folder.dtypes['d2t']}.", "store int64 offsets")
        return
    d2t = folder.tensor("d2t").long()
    t2d = folder.tensor("t2d").bool() if "t2d" in folder.shapes else None
    vocab = folder.config["vocab_size"]
    ids, tail = d2t + torch.arange(d2t.numel()), "`j + d2t[j]` must be the target's id of draft id j"
    if looks_absolute(d2t, t2d, vocab):
        yield Finding(
            READER,
            f"`d2t` holds ids of the target where offsets are read: {tail}.",
            "subtract 0, 1, 2, ... from it",
        )
        return
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        yield Finding(
            READER, f"`d2t` points outside the {vocab} tokens of the target: {tail}.", "restore the mapping of training"
        )
    elif ids.unique().numel() != ids.numel():
        yield Finding(READER, f"`d2t` names a token twice: {tail}.", "restore the mapping of training")
    elif not (ids[1:] > ids[:-1]).all():
        yield Finding(
            "hf_eagle",
            "`d2t` is not in the order of the target's ids, on which pruning and warm starts rely.",
            "sort it, and the rows of `lm_head.weight` with it",
        )
    if t2d is None:
        yield Finding("hf_eagle", "`t2d` is missing beside `d2t`.", "mark in it the tokens that `d2t` names")
    elif t2d.numel() != vocab or not torch.equal(t2d.nonzero()[:, 0], ids.sort().values):
        yield Finding(
            "hf_eagle",
            f"`t2d` disagrees with `d2t`: it marks {int(t2d.sum())} of {t2d.numel()} tokens, not those that `d2t` "
            f"names ({ids.numel()} of {vocab}).",
            "mark in it the tokens that `d2t` names",
        )


def looks_absolute(d2t: torch.Tensor, t2d: torch.Tensor | None, vocab: int) -> bool:
    """Whether `d2t` holds target ids rather than offsets: they are the marked ones, or offsets could not be so."""
    if d2t.numel() == 0 or d2t.unique().numel() != d2t.numel() or not 0 <= int(d2t.min()) <= int(d2t.max()) < vocab:
        return False
    if t2d is not None and int(t2d.sum()) == d2t.numel():
        marked = t2d.nonzero()[:, 0]
        offsets = (d2t + torch.arange(d2t.numel())).sort().values
        return torch.equal(marked, d2t.sort().values) and not torch.equal(marked, offsets)
    return int((d2t + torch.arange(d2t.numel())).max()) >= vocab


def _numbers(folder) -> Iterator[Finding]:
    wrong, nonzero = [], False
    for name, dtype in folder.dtypes.items():
        if dtype not in DTYPES:
            continue
        tensor = folder.tensor(name)
        if not torch.isfinite(tensor).all():
            wrong.append(name)
        nonzero |= name == "fc.bias" and bool(tensor.any())
    for name in wrong:
        yield Finding(READER, f"`{name}` holds NaN or infinity.", "train again from a checkpoint without")
    if nonzero and folder.kind == "eagle1":
        yield Finding(
            READER,
            "`fc.bias` is not zero: vLLM drops it and SGLang adds it, so the two run different drafts.",
            "train the draft without a bias",
        )
