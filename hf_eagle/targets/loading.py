"""Load a target's weights and its tokenizer, also where the target is a PEFT adapter on a base model."""

import hashlib
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import cached_file, find_adapter_config_file


logger = logging.getLogger(__name__)


def auto_class(config: PreTrainedConfig) -> type:
    """The Auto class of a target: `AutoModelForImageTextToText` where a config has no other, or the usual one."""
    with_media = (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    )
    return AutoModelForImageTextToText if with_media else AutoModelForCausalLM


def takes_media(name_or_path: str, revision: str = "main", **options: Any) -> bool:
    """Whether a target is of `AutoModelForImageTextToText`; arguments as of [`load_tokenizer`]."""
    if options.get("gguf_file"):
        return False
    adapter = _adapter_config(name_or_path, revision)
    if adapter is not None:
        return takes_media(_base_of(name_or_path, adapter), adapter.get("revision") or "main", **options)
    config = AutoConfig.from_pretrained(name_or_path, revision=revision, **options)
    return auto_class(config) is AutoModelForImageTextToText


def load_causal_lm(name_or_path: str, revision: str = "main", **options: Any) -> PreTrainedModel:
    """A causal language model, which may take images too; of an adapter, its base with the adapter merged in.

    Args:
        name_or_path: folder or Hub id of a model, or of a PEFT adapter, which names its base itself.
        revision: of that on the Hub; an adapter's config may name one of the base.
        options: as for `AutoModelForCausalLM.from_pretrained`. `dtype` is the merged model's.

    Raises:
        ValueError: for an adapter that does not fit its base, or cannot be merged.
        OSError: if there is no such model, or no base.
    """
    adapter = None if options.get("gguf_file") else _adapter_config(name_or_path, revision)
    if adapter is None:
        if options.get("gguf_file"):
            return AutoModelForCausalLM.from_pretrained(name_or_path, revision=revision, **options)
        trust = bool(options.get("trust_remote_code"))
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust)
        return auto_class(config).from_pretrained(name_or_path, revision=revision, **options)
    base = _base_of(name_or_path, adapter)
    try:
        model = load_causal_lm(base, adapter.get("revision") or "main", **options)
    except OSError as problem:
        why = str(problem).splitlines()[0]
        raise OSError(
            f"`target` {name_or_path} is an adapter on {base}, which cannot be loaded ({why}): correct "
            "`base_model_name_or_path` in its adapter_config.json."
        ) from problem
    model = _merged(model, name_or_path, revision)
    # whoever asks which target this is must not hear the base's name
    model.name_or_path = model.config.name_or_path = str(name_or_path)
    logger.info("The target is %s with the adapter %s merged in.", base, name_or_path)
    return model


def load_tokenizer(name_or_path: str, revision: str = "main", **options: Any) -> PreTrainedTokenizerBase:
    """A target's tokenizer; of an adapter that brings none, its base's.

    Args:
        name_or_path, revision: as in [`load_causal_lm`].
        options: as for `AutoTokenizer.from_pretrained`.
    """
    adapter = None if options.get("gguf_file") else _adapter_config(name_or_path, revision)
    if adapter is not None:
        missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        if cached_file(str(name_or_path), "tokenizer_config.json", revision=revision, **missing) is None:
            return load_tokenizer(_base_of(name_or_path, adapter), adapter.get("revision") or "main", **options)
    return AutoTokenizer.from_pretrained(name_or_path, revision=revision, **options)


def load_processor(name_or_path: str, revision: str = "main", **options: Any) -> ProcessorMixin:
    """The processor of a target that takes images and videos.

    Without torchvision, which transformers' video processors need, it takes images alone, by PIL.

    Args:
        name_or_path, revision: as in [`load_causal_lm`].
        options: as for `AutoProcessor.from_pretrained`.

    Raises:
        ValueError: if the target has none.
    """
    try:
        return AutoProcessor.from_pretrained(name_or_path, revision=revision, **options)
    except ImportError as problem:
        if "orchvision" not in str(problem):
            raise
    config = AutoConfig.from_pretrained(name_or_path, revision=revision, **options)
    if type(config) not in PROCESSOR_MAPPING:
        raise ValueError(f"`target` {name_or_path} has no processor of images, but the data hold some.")
    logger.warning("There is no torchvision here: the processor of %s takes images, but no videos.", name_or_path)
    kind = PROCESSOR_MAPPING[type(config)]
    # transformers insists on a video processor of its own, which nothing can make here
    lenient = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *args: None})
    images = AutoImageProcessor.from_pretrained(name_or_path, revision=revision, **options)
    tokenizer = load_tokenizer(name_or_path, revision, **options)
    return lenient(images, tokenizer, _no_videos, chat_template=tokenizer.chat_template)


def _no_videos(*args, **kwargs):
    raise ValueError("The data hold a video, which transformers' video processors need torchvision for: install it.")


def save_merged(name_or_path: str, folder: str | Path, revision: str = "main", **options: Any) -> None:
    """Merge an adapter into its base and save that, with the tokenizer, for those who must read it in parts.

    A folder that this adapter was merged into before is left as it is; one of another adapter is refused.

    Args:
        name_or_path, revision, options: as in [`load_causal_lm`].
        folder: made, in one piece: an interrupted call leaves none.

    Raises:
        FileExistsError: if the folder holds something else.
    """
    folder, whose = Path(folder), _adapter_fingerprint(name_or_path, revision)
    label = folder / "merged_from.json"
    if label.is_file() and json.loads(label.read_text())["adapter_sha256"] == whose:
        return
    if folder.exists():
        raise FileExistsError(f"{folder} is in the way of merging `target` {name_or_path}: delete it, or move it away.")
    part = folder.with_name(f".{folder.name}-part")
    shutil.rmtree(part, ignore_errors=True)
    load_causal_lm(name_or_path, revision, **options).save_pretrained(part)
    tokenizer_options = {key: options[key] for key in ("trust_remote_code",) if key in options}
    load_tokenizer(name_or_path, revision, **tokenizer_options).save_pretrained(part)
    (part / label.name).write_text(json.dumps({"adapter": str(name_or_path), "adapter_sha256": whose}) + "\n")
    part.rename(folder)


def _adapter_fingerprint(name_or_path: str, revision: str) -> str:
    """SHA-256 of an adapter's config and weights."""
    digest = hashlib.sha256(Path(find_adapter_config_file(str(name_or_path), revision=revision)).read_bytes())
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        file = cached_file(str(name_or_path), name, revision=revision, **missing)
        if file is not None:
            digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def is_adapter(name_or_path: str, revision: str = "main") -> bool:
    """Whether a target is a PEFT adapter and not a whole model."""
    return find_adapter_config_file(str(name_or_path), revision=revision) is not None


def _adapter_config(name_or_path: str, revision: str) -> dict | None:
    """The config of an adapter, `None` for anything else; `ValueError` where it cannot be told which is meant."""
    file = find_adapter_config_file(str(name_or_path), revision=revision)
    if file is None:
        return None
    whole = [*Path(file).parent.glob("model*.safetensors"), *Path(file).parent.glob("pytorch_model*.bin")]
    if whole:
        raise ValueError(
            f"`target` {name_or_path} holds both a whole model ({whole[0].name}) and an adapter (adapter_config.json): "
            "leave in the folder the one that is meant."
        )
    return json.loads(Path(file).read_text(encoding="utf-8"))


def _base_of(name_or_path: str, adapter: dict) -> str:
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"`target` {name_or_path} is an adapter whose adapter_config.json names no `base_model_name_or_path`: "
            "write the base model there."
        )
    return base


def _merged(model: PreTrainedModel, adapter: str, revision: str) -> PreTrainedModel:
    """A base model with an adapter merged in, `ValueError` where that does not work."""
    try:  # who decodes with a published draft may have no peft, and transformers looks for what is imported elsewhere
        from peft import PeftModel
    except ImportError as problem:
        raise ValueError(f"`target` {adapter} is an adapter, which needs peft: `pip install peft`.") from problem

    with warnings.catch_warnings():
        # weights that the file does not have would stay as they were drawn
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            adapted = PeftModel.from_pretrained(model, adapter, revision=revision)
        except (RuntimeError, UserWarning, ValueError) as problem:
            raise ValueError(
                f"The adapter `target` {adapter} does not fit its base {model.name_or_path}: "
                f"{' '.join(str(problem).split())[:300]}"
            ) from problem
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.peft_type.value
        raise ValueError(
            f"The adapter `target` {adapter} is of type {kind}, which is no change of weights and cannot be merged: "
            "use the base as target, or a LoRA."
        )
    return adapted.merge_and_unload(safe_merge=True)  # refuses NaN
