"""Check what every reader of a draft folder relies on, whichever server it is: sizes, vocabulary, spellings, values.

Each rule takes a folder and yields what is wrong with it. `kinds/` says which rules apply to a kind of draft.
"""

from collections.abc import Callable, Iterable, Iterator

import torch

from .draft_folder import DraftFolder, Finding, named


READER = "Every reader"
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_WEIGHTS = (".weight", ".bias")
_TABLES = ("embed_tokens.weight", "wte.weight")
_OFFSETS = "`j + d2t[j]` must be the target's id of draft id j"


def other_model(folder: DraftFolder) -> list[Finding]:
    """Return whether the folder holds a whole model under no draft's name: its own table of tokens, and no `fc`.

    No other rule means anything then. Drafts under a wrong name have the `fc` that every kind has.
    """
    names = [str(name) for name in folder.config.get("architectures") or []]
    drafted = any("eagle" in name.lower() or "draft" in name.lower() for name in names)
    has_table = any(name.endswith(_TABLES) for name in folder.shapes)
    has_fc = any(name.split(".")[-2:-1] == ["fc"] for name in folder.shapes)

    if drafted or has_fc or not has_table:
        return []
    text = f"this is not a draft: its `architectures` are {names}, and it has no tensor `fc`."
    return [Finding(READER, text, "name the folder of a draft, and this one as `target` if it is the target")]


def speculators(folder: DraftFolder, converted: Iterable[Callable[[DraftFolder], Iterable[Finding]]]) -> list[Finding]:
    """Return whether the folder is in the form of vLLM's speculators, and what vLLM's conversion makes of it.

    No other rule means anything then: sizes are not where they look.
    """
    if "transformer_layer_config" not in folder.config:
        return []
    text = "the config is in the form of vLLM's speculators: vLLM converts it, and SGLang and hf_eagle do not read it."
    found = [Finding(READER, text, "write a folder that all of them read with `hf-eagle import`")]
    return found + [finding for rule in converted for finding in rule(folder)]


def size_findings(folder: DraftFolder) -> list[Finding]:
    """Sizes that every other rule needs."""
    found = []
    for name in SIZES:
        size = folder.config.get(name)
        if size is None:
            found.append(Finding(READER, f"`{name}` is missing in config.json.", "write it"))
        elif not isinstance(size, int) or isinstance(size, bool) or size < 1:
            text = f"`{name}` in config.json is {size!r}, and must be a whole number of at least 1."
            found.append(Finding(READER, text, "write what it was trained with"))
    return found


def spellings(folder: DraftFolder) -> Iterator[Finding]:
    """transformers 5 reads `rope_parameters`; older readers know only `rope_theta` and `rope_scaling`."""
    config, old = folder.config, {"rope_theta", "rope_scaling"} & folder.config.keys()
    new = config.get("rope_parameters")

    if not new and "rope_theta" in old:
        yield Finding(
            READER,
            "RoPE is written only in the old spelling, `rope_theta` and `rope_scaling`.",
            "write `rope_parameters` too",
        )
    if new and "rope_theta" not in old:
        yield Finding(
            READER,
            "RoPE is written only in the new spelling, `rope_parameters`: older readers silently use base 10000.",
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
    """Base and scaling of the `new` or the `old` spelling; `{}` means no scaling."""
    new = config.get("rope_parameters") or {}
    theta, scaling = config.get("rope_theta"), config.get("rope_scaling")
    if spelling == "new":
        theta, scaling = new.get("rope_theta"), {k: v for k, v in new.items() if k != "rope_theta"}

    scaling = {("rope_type" if k == "type" else k): v for k, v in (scaling or {}).items()}
    return theta, {} if scaling.get("rope_type", "default") == "default" else scaling


def dtypes(folder: DraftFolder) -> Iterator[Finding]:
    """One dtype for all tensors, a float, written in both spellings of the field."""
    whole = [name for name, dtype in folder.dtypes.items() if name.endswith(_WEIGHTS) and dtype[0] in "IU"]
    if whole:
        verb = "is" if len(whole) == 1 else "are"
        yield Finding(
            READER,
            f"{named(whole)} {verb} of type {folder.dtypes[whole[0]]}: readers treat them as rounded weights.",
            "restore the weights in a floating-point type",
        )

    held = sorted({DTYPES[dtype] for dtype in folder.dtypes.values() if dtype in DTYPES})
    if len(held) > 1:
        yield Finding(READER, f"the tensors are of several dtypes, {', '.join(held)}.", "save them in one")

    said = [folder.config.get(name) for name in ("dtype", "torch_dtype")]
    if None in said:
        missing = "`dtype`" if said[0] is None else "`torch_dtype`"
        yield Finding(
            READER,
            f"{missing} is missing: readers of that spelling use their own default dtype.",
            "write `dtype` and `torch_dtype`, both the tensors'",
        )
    for dtype in sorted({dtype for dtype in said if dtype is not None}):
        if held and held != [dtype]:
            yield Finding(
                READER,
                f"config.json says {dtype}, the tensors are {' and '.join(held)}.",
                "write the tensors' dtype as `dtype` and `torch_dtype`",
            )


def leftovers(folder: DraftFolder) -> Iterator[Finding]:
    """Fields that the trainer put into the config for its own use."""
    if folder.config.get("use_cache") is False:
        yield Finding(
            READER,
            "`use_cache` is false, left behind by training: readers that obey it decode without a cache.",
            "leave the field out",
        )


def vocabulary(folder: DraftFolder) -> Iterator[Finding]:
    """For a draft with its own vocabulary: `d2t` holds offsets in order, and `t2d` marks the same tokens."""
    if "d2t" not in folder.shapes:
        if "t2d" in folder.shapes:
            yield Finding(READER, "there is a `t2d` without a `d2t`.", "remove it, or restore `d2t`")
        return
    if not folder.dtypes["d2t"].startswith("I"):
        yield Finding(READER, f"`d2t` is of dtype {folder.dtypes['d2t']}.", "store int64 offsets")
        return

    d2t = folder.tensor("d2t").long()
    t2d = folder.tensor("t2d").bool() if "t2d" in folder.shapes else None
    vocab = folder.config["vocab_size"]
    if looks_absolute(d2t, t2d, vocab):
        yield Finding(
            READER,
            f"`d2t` holds target ids instead of offsets: {_OFFSETS}.",
            "subtract 0, 1, 2, ... from it",
        )
        return

    ids = d2t + torch.arange(d2t.numel())
    yield from _drafted(ids, vocab)
    yield from _marked(ids, t2d, vocab)


def _drafted(ids: torch.Tensor, vocab: int) -> Iterator[Finding]:
    """The target ids that `d2t` names must lie within the vocabulary, be unique, and be in order."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        yield Finding(
            READER,
            f"`d2t` points outside the {vocab} tokens of the target: {_OFFSETS}.",
            "restore the mapping of training",
        )
    elif ids.unique().numel() != ids.numel():
        yield Finding(READER, f"`d2t` names a token twice: {_OFFSETS}.", "restore the mapping of training")
    elif not (ids[1:] > ids[:-1]).all():
        yield Finding(
            "hf_eagle",
            "`d2t` is not in the order of the target's ids, on which pruning and warm starts rely.",
            "sort it, and the rows of `lm_head.weight` with it",
        )


def _marked(ids: torch.Tensor, t2d: torch.Tensor | None, vocab: int) -> Iterator[Finding]:
    """`t2d` must mark the tokens that `d2t` names."""
    if t2d is None:
        yield Finding("hf_eagle", "there is a `d2t` without a `t2d`.", "mark in `t2d` the tokens that `d2t` names")
    elif t2d.numel() != vocab or not torch.equal(t2d.nonzero()[:, 0], ids.sort().values):
        yield Finding(
            "hf_eagle",
            f"`t2d` disagrees with `d2t`: it marks {int(t2d.sum())} of {t2d.numel()} tokens, not those that `d2t` "
            f"names ({ids.numel()} of {vocab}).",
            "mark in it the tokens that `d2t` names",
        )


def looks_absolute(d2t: torch.Tensor, t2d: torch.Tensor | None, vocab: int) -> bool:
    """Return whether `d2t` holds target ids, not offsets: they equal the marked ids, or are too large to be offsets."""
    if d2t.numel() == 0 or d2t.unique().numel() != d2t.numel() or not 0 <= int(d2t.min()) <= int(d2t.max()) < vocab:
        return False
    if t2d is not None and int(t2d.sum()) == d2t.numel():
        marked = t2d.nonzero()[:, 0]
        offsets = (d2t + torch.arange(d2t.numel())).sort().values
        return torch.equal(marked, d2t.sort().values) and not torch.equal(marked, offsets)

    return int((d2t + torch.arange(d2t.numel())).max()) >= vocab


def numbers(folder: DraftFolder) -> Iterator[Finding]:
    """All weights are finite numbers. Reads every tensor."""
    for name, dtype in folder.dtypes.items():
        if dtype in DTYPES and not torch.isfinite(folder.tensor(name)).all():
            yield Finding(READER, f"`{name}` holds NaN or infinity.", "train again from a checkpoint without them")
