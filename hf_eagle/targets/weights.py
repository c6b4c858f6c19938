"""Check the files of a model: sizes fit its config and no tensor is missing, which would be drawn at random."""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..door.reading import local_folder, read_header, read_part, reading
from .config_fields import largest_field


INDEX = "model.safetensors.index.json"
_SHOWN = 4  # names in an error
# no way of storing weights, such as eight values packed in one, explains a factor above this
_FAR = 16
_VOCABULARY = 1_000_000  # tokens: models have fewer. The limit where no weight shows how many
_DEPTHS = ("num_hidden_layers", "depth")
_WIDTHS = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size", "draft_vocab_size", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts"),
)
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
# buffers that every model computes by itself, though some write them too
_COMPUTED = re.compile(r"(inv_freq|position_ids|(cos|sin)_cached|attn\.(masked_)?bias)$")
# what the files of a quantised model may leave out: scales of activations, and offsets that are zero
_OF_QUANTISED = re.compile(r"((input|output|activation|[qkv])_scale|zero_point|g_idx|qzeros|weight_shape)$")


# ---- before a model is built ----


def stored_shapes(argument: str, path: str | Path, revision: str = "main") -> dict[str, tuple[int, ...]]:
    """Shapes by name of the tensors of a folder or Hub id, from the headers of its safetensors.

    Returns:
        Empty for weights in another format, and for those not downloaded yet.

    Raises:
        ValueError: for a file that is broken or truncated.
    """
    shapes = {}
    for file in _stored_files(argument, path, revision):
        try:
            shapes |= read_header(file)
        except ValueError as problem:
            raise ValueError(
                f"`{argument}` {path} cannot be read: {file.name} {problem}: download or write it anew."
            ) from problem

    return shapes


def _stored_files(argument: str, path: str | Path, revision: str = "main") -> list[Path]:
    """The safetensors of a folder or Hub id that are on this machine."""
    folder = local_folder(path, revision)
    if folder is None:
        return []

    files = [folder / "model.safetensors"]
    if not files[0].is_file() and (folder / INDEX).is_file():
        held = read_part(argument, path, folder / INDEX, {"weight_map": dict[str, str]})["weight_map"]
        files = [folder / name for name in sorted(set(held.values()))]
    return [file for file in files if file.is_file()]


def check_stored_dtypes(argument: str, path: str | Path, revision: str = "main") -> None:
    """Refuse weights that are stored as integers: loading turns them into floats, rounded to zero or one long before.

    Only headers are read. Not for quantised models, whose codes are integers.

    Raises:
        ValueError: names the first tensors.
    """
    wrong = {}
    for file in _stored_files(argument, path, revision):
        with safe_open(file, "pt") as tensors:
            dtypes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}
        wrong |= {name: dtype for name, dtype in dtypes.items() if _is_weight(name) and dtype[0] in "IU"}
    _refuse_integers(argument, path, wrong)


def check_tensors(argument: str, path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that are integers, NaN or infinite. Buffers that are no weights may be integers.

    Args:
        argument, path: that named the model.
        tensors: by name, as loaded.

    Raises:
        ValueError: names the first tensors.
    """
    weights = {name: x for name, x in tensors.items() if _is_weight(name)}
    kinds = {name: str(x.dtype).removeprefix("torch.") for name, x in weights.items() if not x.is_floating_point()}
    _refuse_integers(argument, path, kinds)

    broken = sorted(name for name, x in weights.items() if not all_numbers(x))
    if broken:
        raise ValueError(
            f"`{argument}` {path} holds NaN or infinity in {len(broken)} of its {len(weights)} weights "
            f"({listed(broken)}): restore its weights, or name another checkpoint."
        )


def _is_weight(name: str) -> bool:
    return name.endswith((".weight", ".bias"))


def _refuse_integers(argument: str, path: str | Path, dtypes: Mapping[str, str]) -> None:
    if dtypes:
        kinds = " and ".join(sorted({dtype.lower() for dtype in dtypes.values()}))
        raise ValueError(
            f"`{argument}` {path} holds {len(dtypes)} weights that are whole numbers of type {kinds} "
            f"({listed(sorted(dtypes))}): restore its weights, in float32 or bfloat16 for instance."
        )


def all_numbers(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite; for a sharded tensor, of this rank's part."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not tensor.numel():
        return True

    # `aminmax` keeps a NaN, and needs no tensor of the size of the weights
    return all(math.isfinite(x) for x in torch.stack(tensor.detach().aminmax()).tolist())


def check_sizes(argument: str, path: str | Path, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a config that is not that of the weights, before building it takes hours or all memory.

    Loading the weights finds smaller differences.

    Args:
        argument, path: that named the model, for the error.
        config: of the model, with the fields as attributes.
        shapes: of the stored tensors; with none, nothing is checked.

    Raises:
        ValueError: names the field, and what the weights show.
    """
    if not shapes:
        return

    numbers = {int(part) for name in shapes for part in name.split(".") if part.isdecimal()}
    depth, width = 1 + max(numbers, default=0), max((max(shape, default=1) for shape in shapes.values()), default=1)
    limits = dict.fromkeys(_DEPTHS, depth) | dict.fromkeys(_WIDTHS, max(width, depth))

    embeddings = [s for name, s in shapes.items() if name.endswith(_EMBEDDINGS) and ".layers." not in name]
    if len(embeddings) == 1 and len(embeddings[0]) == 2:
        limits |= dict(zip(("vocab_size", "hidden_size"), embeddings[0], strict=True))
    elif not any(name.endswith("lm_head.weight") for name in shapes):
        # no tensor has a row a token, as in a draft that borrows the target's tables
        limits |= dict.fromkeys(("vocab_size", "draft_vocab_size"), _VOCABULARY)

    for part in _parts(config):
        for field, shown in limits.items():
            told = largest_field(part, field)
            if isinstance(told, int) and told > _FAR * shown:
                known = "models have at most" if shown == _VOCABULARY else "its weights show"
                raise ValueError(
                    f"`{argument}` {path}: `{field}` in its config.json is {told:,}, but {known} {shown:,}: restore "
                    "the config.json that they were saved with."
                )


def _parts(config: Any) -> Iterator[Any]:
    """A config and those inside it, for instance of a vision tower."""
    yield config
    for name in getattr(config, "sub_configs", None) or ():
        if getattr(config, name, None) is not None:
            yield from _parts(getattr(config, name))


# ---- while and after it is loaded ----


def load_whole(auto_class: type, name_or_path: str, argument: str = "target", **options: Any) -> PreTrainedModel:
    """Run `auto_class.from_pretrained`, and refuse weights that are not complete.

    transformers fills what is missing with random numbers and only warns.

    Args:
        auto_class: with `from_pretrained`.
        name_or_path, options: for `from_pretrained`. With a `distributed_config`, all ranks must call, and all refuse
            if one of them misses something in its share.
        argument: that named the model.

    Raises:
        ValueError: with the first names and the count of tensors that are missing or of another shape.
    """
    if options.get("distributed_config") is None:
        return _load_whole(auto_class, name_or_path, argument, options)

    model = wrong = None
    try:
        with reading(argument, name_or_path):
            model = _load_whole(auto_class, name_or_path, argument, options)
    except (OSError, ValueError) as problem:
        if not dist.is_initialized():
            raise
        wrong = str(problem)

    # share the errors: a rank that raised alone would leave the others waiting
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, wrong)
    wrong = next((text for text in of_ranks if text is not None), None)
    if wrong is not None:
        raise ValueError(wrong)
    return model


def _load_whole(auto_class: type, name_or_path: str, argument: str, options: dict[str, Any]) -> PreTrainedModel:
    options = options | {"output_loading_info": True, "ignore_mismatched_sizes": True}  # report them all at once

    with report_if_sound() as reports:
        try:
            model, info = auto_class.from_pretrained(name_or_path, **options)
        except RuntimeError as problem:
            names = re.findall(r"^(\S+)\s*\|\s*CONVERSION", "\n".join(reports), re.MULTILINE)
            if not names:
                raise
            raise ValueError(
                f"`{argument}` {name_or_path} holds tensors that do not fit together as its config.json says "
                f"({listed(names)}): restore its weights."
            ) from problem
        refuse_random(model, info, argument, name_or_path)
    return model


def refuse_random(model: PreTrainedModel, info: Mapping[str, Any], argument: str, path: str | Path) -> None:
    """Raise `ValueError` if a model was loaded without some of its tensors.

    Args:
        info: of `from_pretrained(..., output_loading_info=True)`; transformers has left out what is tied.
    """
    buffers = {name for name, _ in model.named_buffers()}
    quantised = getattr(model, "hf_quantizer", None) is not None
    missing = sorted(
        name
        for name in info["missing_keys"]
        if not (name in buffers and _COMPUTED.search(name)) and not (quantised and _OF_QUANTISED.search(name))
    )

    kind, total = type(model).__name__, len(model.state_dict())
    wrong = []
    if missing and len(info["missing_keys"]) == total:
        wrong.append(f"holds no tensor with a name that a {kind} knows, such as {missing[0]}")
    elif missing:
        wrong.append(f"lacks {len(missing)} of the {total} tensors of a {kind} ({listed(missing)})")

    if info["mismatched_keys"]:
        other = [f"{name} is {list(s)} instead of {list(w)}" for name, s, w in sorted(info["mismatched_keys"], key=str)]
        wrong.append(f"holds {len(other)} tensors of other shapes than its config.json says ({listed(other)})")

    if wrong:
        raise ValueError(
            f"`{argument}` {path} {', and '.join(wrong)}, where random numbers would be taken: restore its weights, or "
            "the config.json that they were saved with."
        )


@contextmanager
def report_if_sound() -> Iterator[list[str]]:
    """Hold back what transformers logs of tensors while it loads, and log it only if the block raises nothing.

    Yields the reports.
    """
    logger, held, texts = logging.getLogger("transformers.modeling_utils"), [], []

    def keep(record: logging.LogRecord) -> bool:
        if "LOAD REPORT" not in str(record.msg):
            return True
        held.append(record)
        texts.append(record.getMessage())
        return False

    logger.addFilter(keep)
    try:
        yield texts
    finally:
        logger.removeFilter(keep)

    for record in held:
        logger.handle(record)


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
