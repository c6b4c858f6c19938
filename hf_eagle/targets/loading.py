"""Load a target's weights and its tokenizer, also if it is a PEFT adapter on a base model."""

import inspect
import logging
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
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
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import cached_file

from ..door.config_numbers import check_config_numbers
from ..door.environment import how_to_install
from ..door.reading import read_part, reading
from .adapters import as_base, merged, to_the_base
from .media_inputs import why_not_shown
from .weights import check_sizes, check_stored_dtypes, load_whole, stored_shapes


logger = logging.getLogger(__name__)

_OPTIONAL = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
_OF_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_IDS = int | list[int] | None
_GENERATION_FIELDS = dict.fromkeys(("bos_token_id?", "eos_token_id?", "pad_token_id?"), _IDS)


def auto_class(config: PreTrainedConfig, media: bool = False) -> type:
    """The Auto class of a target: the usual one, or `AutoModelForImageTextToText` if a config has no other.

    Args:
        config: the target's.
        media: whether it is to be shown media. Without, of some models only the text part is loaded (Qwen3.5, Llama 4).
    """
    takes = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    with_media = takes and (media or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING)
    return AutoModelForImageTextToText if with_media else AutoModelForCausalLM


def load_config(
    name_or_path: str, revision: str = "main", trust_remote_code: bool = False, argument: str = "target"
) -> PreTrainedConfig:
    """The config of a model, from a folder or the Hub; weights are not needed.

    Args:
        argument: that named the model.

    Raises:
        OSError: if there is no such model.
        ValueError: if its config.json is not accepted.
    """
    with reading(argument, name_or_path, "config.json"):
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    try:
        text = config.get_text_config()
    except ValueError as problem:  # Musicgen has an encoder's and a decoder's
        raise ValueError(
            f"`{argument}` {name_or_path} is a {config.model_type}, which has several text configs, so it is not known "
            "which model generates text: use another target."
        ) from problem
    check_config_numbers(argument, name_or_path, text.to_dict(), may_be_null=True)
    return config


def takes_media(name_or_path: str, revision: str = "main", **options: Any) -> bool:
    """Return whether a target has a form that takes images; arguments as in [`load_tokenizer`]."""
    if options.get("gguf_file"):
        return False
    return type(_config_of_base(name_or_path, revision, **options)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def why_only_text(name_or_path: str, revision: str = "main", **options: Any) -> str | None:
    """Why a target that takes images is shown none here, `None` if it is; arguments as in [`load_tokenizer`]."""
    return why_not_shown(_config_of_base(name_or_path, revision, **options))


def _config_of_base(name_or_path: str, revision: str, trust_remote_code: bool = False, **_: Any) -> PreTrainedConfig:
    _, name, revision = to_the_base(name_or_path, revision)
    return load_config(name, revision, bool(trust_remote_code))


def load_causal_lm(
    name_or_path: str, revision: str = "main", argument: str = "target", media: bool = False, **options: Any
) -> PreTrainedModel:
    """Load a causal language model, which may take images too; an adapter is merged into its base.

    Args:
        name_or_path: folder or Hub id of a model, or of a PEFT adapter, which names its base.
        revision: of the model or adapter on the Hub; an adapter's config may name one of the base.
        argument: that named the model.
        media: whether it is to be shown images or videos.
        options: as for `AutoModelForCausalLM.from_pretrained`. `dtype` is the merged model's.

    Raises:
        ValueError: for files that cannot be read, a model of another kind, incomplete weights, and an
            adapter that does not fit its base or cannot be merged.
        OSError: if there is no such model, or no base.
    """
    if options.get("gguf_file"):
        return _whole_model(name_or_path, revision, argument, media, options)

    adapters, base, base_revision = to_the_base(name_or_path, revision, argument)
    if not adapters:
        return _whole_model(base, base_revision, argument, media, options)

    with as_base(argument, adapters, base):
        model = _whole_model(base, base_revision, argument, media, options)

    for adapter, its_revision in reversed(adapters):
        model = merged(model, adapter, its_revision, argument)
        logger.info("The %s is %s with the adapter %s merged in.", argument, model.name_or_path, adapter)
        # cards and regenerated answers read the target's name from the model; the base's would be wrong
        model.name_or_path = model.config.name_or_path = str(adapter)

    return model


def _whole_model(
    name_or_path: str, revision: str, argument: str, media: bool, options: dict[str, Any]
) -> PreTrainedModel:
    if options.get("gguf_file"):
        with reading(argument, name_or_path, options["gguf_file"]):
            return load_whole(AutoModelForCausalLM, name_or_path, argument, revision=revision, **options)

    config = load_config(name_or_path, revision, bool(options.get("trust_remote_code")), argument)
    check_kind(argument, name_or_path, config)

    with reading(argument, name_or_path):
        _check_generation_config(argument, name_or_path, revision)
        check_sizes(argument, name_or_path, config, stored_shapes(argument, name_or_path, revision))
        if getattr(config, "quantization_config", None) is None:
            check_stored_dtypes(argument, name_or_path, revision)
        return load_whole(auto_class(config, media), name_or_path, argument, revision=revision, **options)


def check_kind(argument: str, name_or_path: str, config: PreTrainedConfig) -> None:
    """Raise `ValueError` for a model that does not generate token by token."""
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    # `AutoModelForCausalLM` loads these too, though they attend to later tokens
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", True) is False

    if masked or not (known or getattr(config, "auto_map", None)):
        raise ValueError(
            f"`{argument}` {name_or_path} is no causal language model, its `model_type` is {config.model_type}: name "
            "one that generates text."
        )


def _check_generation_config(argument: str, name_or_path: str, revision: str) -> None:
    """Raise `ValueError` for a generation_config.json that transformers would ignore: it says what ends an answer."""
    file = cached_file(str(name_or_path), "generation_config.json", revision=revision, **_OPTIONAL)
    if file is not None:
        read_part(argument, name_or_path, file, _GENERATION_FIELDS)


def load_tokenizer(
    name_or_path: str, revision: str = "main", argument: str = "target", **options: Any
) -> PreTrainedTokenizerBase:
    """A target's tokenizer; its base's if it is an adapter without one.

    Args:
        name_or_path, revision, argument: as in [`load_causal_lm`].
        options: as for `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError, OSError: if it cannot be read.
    """
    if not options.get("gguf_file"):
        adapters, base, base_revision = to_the_base(name_or_path, revision, argument)
        for adapter, its_revision in adapters:
            with reading(argument, adapter):
                own = cached_file(str(adapter), "tokenizer_config.json", revision=its_revision, **_OPTIONAL)
            if own is not None:
                base, base_revision = adapter, its_revision
                break
        name_or_path, revision = base, base_revision

    with reading(argument, name_or_path, options.get("gguf_file")):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, **options)
        # settings of a wrong type fail only once a text comes
        tokenizer("a")
    return tokenizer


def load_processor(
    name_or_path: str, revision: str = "main", argument: str = "target", **options: Any
) -> ProcessorMixin:
    """The processor of a target that takes images and videos.

    Without torchvision, which transformers' video processors need, it takes only images, with PIL.

    Args:
        name_or_path, revision, argument: as in [`load_causal_lm`].
        options: as for `AutoProcessor.from_pretrained`.

    Raises:
        ValueError: if the target has none, or one that cannot be read.
    """
    name_or_path, revision, _ = _place_of_processor(name_or_path, revision, argument)

    with reading(argument, name_or_path):
        try:
            return AutoProcessor.from_pretrained(name_or_path, revision=revision, **options)
        except (ImportError, ValueError) as problem:
            if "orchvision" not in str(problem):
                raise
        return _processor_of_images(name_or_path, revision, argument, **options)


def files_of_processor(name_or_path: str, revision: str = "main") -> list[Path]:
    """The files of a target's processor, of its base's if it is an adapter without one; empty if there is none."""
    return _place_of_processor(name_or_path, revision)[2]


def _place_of_processor(name_or_path: str, revision: str, argument: str = "target") -> tuple[str, str, list[Path]]:
    """Name and revision of the adapter or base that has a processor, and its files; the base if none has."""
    adapters, base, base_revision = to_the_base(name_or_path, revision, argument)
    for source, its_revision in (*adapters, (base, base_revision)):
        found = [cached_file(str(source), name, revision=its_revision, **_OPTIONAL) for name in _OF_PROCESSORS]
        if any(found):
            return source, its_revision, [Path(file) for file in found if file is not None]

    return base, base_revision, []


def _processor_of_images(name_or_path: str, revision: str, argument: str, **options: Any) -> ProcessorMixin:
    config = AutoConfig.from_pretrained(name_or_path, revision=revision, **options)
    if type(config) not in PROCESSOR_MAPPING:
        raise ValueError(f"`{argument}` {name_or_path} has no processor of images, but the data hold some.")
    kind = PROCESSOR_MAPPING[type(config)]

    try:
        # transformers insists on its own class of video processor, which needs torchvision
        lenient = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *args: None})
        parts = {
            "video_processor": lambda: _no_videos,
            "tokenizer": lambda: load_tokenizer(name_or_path, revision, argument, **options),
            "image_processor": lambda: AutoImageProcessor.from_pretrained(name_or_path, revision=revision, **options),
            "feature_extractor": lambda: AutoFeatureExtractor.from_pretrained(
                name_or_path, revision=revision, **options
            ),
        }
        made = {name: parts[name]() for name in lenient.get_attributes()}
    except (ImportError, ValueError) as problem:
        if "orchvision" not in str(problem):
            raise
        # that of images needs it too (Mistral 3, Llama 4)
        raise ImportError(
            f"The processor of {name_or_path} needs torchvision: {how_to_install('torchvision')}."
        ) from problem

    logger.warning("There is no torchvision here: the processor of %s takes images, but no videos.", name_or_path)
    described, _ = lenient.get_processor_dict(name_or_path, revision=revision)
    described = {"chat_template": made["tokenizer"].chat_template, **described}
    taken = inspect.signature(kind.__init__).parameters.keys() - made.keys()
    return lenient(**made, **{name: x for name, x in described.items() if name in taken})


def _no_videos(*args, **kwargs):
    raise ImportError(
        "The data hold a video, for which transformers' video processors need torchvision: "
        f"{how_to_install('torchvision')}, and PyAV (`pip install av`), which decodes files."
    )
