"""Adapters of PEFT that a target may be: the base model that they end at, and merging them into it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from ..door.reading import read_part, reading


# what peft computes with, of an adapter's config; peft accepts a text as a number until it fails later
_ADAPTER_FIELDS = {
    **dict.fromkeys(("base_model_name_or_path?", "revision?", "peft_type?", "task_type?"), str | None),
    **dict.fromkeys(("lora_alpha?", "lora_dropout?"), float | None),
    "r?": int | None,
    "target_modules?": str | list[str] | None,
    **dict.fromkeys(("rank_pattern?", "alpha_pattern?"), dict[str, float] | None),
}


def is_adapter(name_or_path: str, revision: str = "main") -> bool:
    """Return whether a target is a PEFT adapter rather than a whole model."""
    with reading("target", name_or_path):
        return find_adapter_config_file(str(name_or_path), revision=revision) is not None


def to_the_base(name_or_path: str, revision: str, argument: str = "target") -> tuple[list[tuple[str, str]], str, str]:
    """The adapters from the named one down (none for a whole model), and the base that the last one names.

    Raises:
        ValueError: for an adapter that names no base, or that comes round to one before it.
    """
    adapters, seen = [], set()
    while True:
        with as_base(argument, adapters, name_or_path):
            adapter = _adapter_config(name_or_path, revision, argument)

        if adapter is None:
            return adapters, name_or_path, revision

        # chains of adapters may come round to one that was seen, and would never end
        place = Path(name_or_path).resolve() if Path(name_or_path).is_dir() else (str(name_or_path), revision)
        if place in seen:
            raise ValueError(
                f"`{argument}` {adapters[0][0]} is an adapter that ends at no base model, since {adapters[-1][0]} "
                f"names {name_or_path} again: correct `base_model_name_or_path` in its adapter_config.json."
            )

        seen.add(place)
        adapters.append((name_or_path, revision))
        name_or_path, revision = _base_of(name_or_path, adapter, argument), adapter.get("revision") or "main"


@contextmanager
def as_base(argument: str, adapters: list[tuple[str, str]], base: str) -> Iterator[None]:
    """Make an error about a base name the adapter that asks for it, the last of these."""
    try:
        yield
    except (OSError, ValueError) as problem:
        if not adapters:
            raise

        kind = OSError if isinstance(problem, OSError) else ValueError
        raise kind(
            f"`{argument}` {adapters[-1][0]} is an adapter on {base}, which cannot be loaded "
            f"({str(problem).rstrip('.')}): correct `base_model_name_or_path` in its adapter_config.json."
        ) from problem


def _adapter_config(name_or_path: str, revision: str, argument: str) -> dict | None:
    """The config of an adapter, `None` for anything else; `ValueError` if the folder holds both kinds."""
    with reading(argument, name_or_path):
        file = find_adapter_config_file(str(name_or_path), revision=revision)
        if file is None:
            return None

        whole = [*Path(file).parent.glob("model*.safetensors"), *Path(file).parent.glob("pytorch_model*.bin")]
        if whole:
            raise ValueError(
                f"`{argument}` {name_or_path} holds both a whole model ({whole[0].name}) and an adapter "
                "(adapter_config.json): keep only the one you mean in the folder."
            )

    return read_part(argument, name_or_path, file, _ADAPTER_FIELDS)


def _base_of(name_or_path: str, adapter: dict, argument: str) -> str:
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"`{argument}` {name_or_path} is an adapter whose adapter_config.json names no `base_model_name_or_path`: "
            "write the base model there."
        )
    return base


def merged(model: PreTrainedModel, adapter: str, revision: str, argument: str) -> PreTrainedModel:
    """A base model with an adapter merged in, `ValueError` if that does not work."""
    try:  # a published draft decodes without peft, and transformers requires every import that is outside a `try`
        from peft import PeftModel
    except ImportError as problem:
        raise ValueError(f"`{argument}` {adapter} is an adapter, which needs peft: `pip install peft`.") from problem

    with reading(argument, adapter), warnings.catch_warnings():
        # weights that the file does not have would stay as they were drawn
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            adapted = PeftModel.from_pretrained(model, adapter, revision=revision)
        except (RuntimeError, UserWarning, ValueError) as problem:
            raise ValueError(
                f"The adapter `{argument}` {adapter} does not fit its base {model.name_or_path}: "
                f"{' '.join(str(problem).split())[:300]}"
            ) from problem

    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.peft_type.value
        raise ValueError(
            f"The adapter `{argument}` {adapter} is of type {kind}, which is no change of weights and cannot be "
            "merged: use the base as target, or a LoRA."
        )
    return adapted.merge_and_unload(safe_merge=True)  # refuses NaN
