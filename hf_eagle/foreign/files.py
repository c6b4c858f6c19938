"""Read the config and tensors of a draft that others made, without running any of their code."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from ..door.reading import read_part, reading


# in search order; an index names the files that hold the tensors
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_INDEX = {"weight_map": dict[str, str]}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
_HEADS = ("lm_head.weight",)


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the content of `config.json` of a folder or Hub id.

    Raises:
        ValueError: if it is not a JSON object.
        OSError: if there is no such folder or Hub id.
    """
    with reading("draft", path):
        file = cached_file(str(path), "config.json")

    if file is None:
        raise ValueError(f"`draft` {path} is not a draft, it holds no config.json: name the folder of a draft.")
    return read_part("draft", path, file, {})


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a draft by name, on the CPU, as they are stored.

    Args:
        path: folder or Hub id with safetensors or `pytorch_model.bin`, in one file or several.

    Raises:
        ValueError: if there are no weights, they cannot be read, or a pickle holds more than tensors.
    """
    tensors = {}
    with reading("draft", path):
        for file in _weight_files(path, "draft"):
            tensors |= _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    return tensors


def has_tokenizer(path: str | Path, argument: str) -> bool:
    """Whether a tokenizer lies next to the weights; from a config alone, `AutoTokenizer` would make an empty one."""
    with reading(argument, path):
        return any(cached_file(str(path), name, _raise_exceptions_for_missing_entries=False) for name in _TOKENIZER)


def read_target_embedding(target: str | Path) -> torch.Tensor | None:
    """Return the target's input embedding `(vocab_size, hidden)`; `None` if its safetensors are not on this machine.

    It reads only this tensor of the target, and downloads nothing.
    """
    return _read_table(target, _EMBEDDINGS)


def read_target_head(target: str | Path) -> torch.Tensor | None:
    """As `read_target_embedding`, for the head, which may be tied to the embedding."""
    head = _read_table(target, _HEADS)
    return read_target_embedding(target) if head is None else head


def _read_table(target: str | Path, endings: tuple[str, ...]) -> torch.Tensor | None:
    try:
        files = _weight_files(target, "target", local_files_only=True)
    except (OSError, ValueError):  # loading the target will report the problem
        return None

    with reading("target", target):
        for file in files:
            if file.suffix != ".safetensors" or not file.is_file():
                continue
            with safe_open(file, "pt") as weights:
                # layers for multi-token prediction have embeddings too
                names = [name for name in weights.keys() if name.endswith(endings) and ".layers." not in name]
                if len(names) == 1:
                    return weights.get_tensor(names[0])
    return None


def _weight_files(path: str | Path, argument: str, **options: Any) -> list[Path]:
    for name in _WEIGHTS:
        file = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False, **options)
        if file is None:
            continue
        if not name.endswith(".index.json"):
            return [Path(file)]

        parts = sorted(set(read_part(argument, path, file, _INDEX)["weight_map"].values()))
        found = [cached_file(str(path), p, _raise_exceptions_for_missing_entries=False, **options) for p in parts]
        return [Path(part) for part in found if part is not None]
    raise ValueError(f"`{argument}` {path} holds no weights: looked for {', '.join(_WEIGHTS)}.")


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as weights:
        return {name: weights.get_tensor(name) for name in weights.keys()}


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as problem:
        reason = str(problem).strip().split("\n")[0]
        raise ValueError(
            f"{file} holds more than tensors, or is damaged, and is not run: {reason} If you trust its source, save "
            "its tensors as model.safetensors there."
        ) from problem

    if not isinstance(held, dict) or not all(isinstance(x, torch.Tensor) for x in held.values()):
        raise ValueError(f"{file} must hold tensors by name, and nothing else.")
    return held
