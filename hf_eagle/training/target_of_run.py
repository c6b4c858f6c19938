"""The target of a run, from its arguments: tokenizer, processor, and the frozen model itself."""

import logging
from dataclasses import replace
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..arguments.groups import DataArguments, TargetArguments
from ..arguments.training import EagleTrainingArguments
from ..data.media import limit_media
from ..data.streaming import RankStream
from ..evaluation.prompts import Prompt, holds_media
from ..targets.adapters import is_adapter
from ..targets.architectures import check_length
from ..targets.loading import files_of_processor, load_processor, load_tokenizer, takes_media, why_only_text
from ..targets.merged_folder import save_merged
from ..targets.room import config_before_loading
from ..targets.shard_layout import loading_arguments
from ..targets.target import FrozenTarget
from .memory import LESS_OF_TARGET, explained
from .served import served_target
from .stalls import watched


logger = logging.getLogger(__name__)


def check_lengths(target_args: TargetArguments, data_args: DataArguments) -> None:
    """`ValueError` for a `max_length` at which the target's output changes, as far as its config shows."""
    # the target's number of positions is no limit: conversations may be shorter than `max_length`
    config = config_before_loading(target_args.target, **target_args.source)
    if config is not None:
        check_length(config, data_args.max_length)


def tokenizer_of(target_args: TargetArguments) -> PreTrainedTokenizerBase:
    """The target's tokenizer."""
    return load_tokenizer(target_args.target, **target_args.source)


def processor_of(target_args: TargetArguments, data_args: DataArguments) -> ProcessorMixin | None:
    """The processor of a target that takes images, with the data's limits.

    `None`, with a warning, if the target has none, is shown no images here, or needs for it what is not installed.
    """
    options = {"revision": target_args.target_revision, "trust_remote_code": target_args.trust_remote_code}
    if target_args.gguf_file or not takes_media(target_args.target, **options):
        if data_args.media_limits:
            raise ValueError(
                f"`{next(iter(data_args.media_limits))}` is for a target that takes images, which {target_args.target} "
                "does not: leave it out."
            )
        return None

    if not files_of_processor(target_args.target, target_args.target_revision):
        logger.warning("The target takes images, but its folder has no processor for them: it gets only text.")
        return None

    why = why_only_text(target_args.target, **options)
    if why is not None:
        logger.warning("The target %s gets only text: %s.", target_args.target, why)
        return None

    try:
        processor = load_processor(target_args.target, **options)
    except ImportError as problem:  # data of text need none
        logger.warning("The target %s gets only text. %s", target_args.target, problem)
        return None
    limit_media(processor, **data_args.media_limits)
    return processor


def spreadable(target_args: TargetArguments, args: EagleTrainingArguments) -> TargetArguments:
    """Check that the target can be sharded as the arguments say; first merge an adapter, in `output_dir`.

    Returns:
        The arguments, or a copy of them that names the merged model.

    Raises:
        ValueError: as `sharding.loading_arguments`.
    """
    hub = {"trust_remote_code": target_args.trust_remote_code, "revision": target_args.target_revision}

    if target_args.target_sharding != "none" and is_adapter(target_args.target, target_args.target_revision):
        folder = Path(args.output_dir) / "merged-target"
        first = args.main_process_first(local=False, desc="merging the adapter")
        with watched(args, "while the adapter is merged"), first:
            if args.process_index == 0:
                save_merged(target_args.target, folder, dtype=target_args.target_dtype, **hub)
        target_args = replace(target_args, target=str(folder), target_revision="main")
        hub["revision"] = "main"

    loading_arguments(target_args.target, gguf_file=target_args.gguf_file, **target_args.sharding, **hub)
    return target_args


def shows_media(data: Dataset | RankStream, prompts: list[Prompt] | None = None) -> bool:
    """Whether a target is shown images or videos: in tokenised data, or in prompts that it decodes."""
    return "media" in (data.column_names or ()) or any(map(holds_media, prompts or ()))


def load_target(target_args: TargetArguments, media: bool = False, stored: bool = False) -> FrozenTarget:
    """The frozen target that the arguments name.

    Args:
        media: whether it is shown images or videos, so that the part that reads them is loaded too.
        stored: whether all of its features are in a store, so that no server is asked for them.
    """
    if target_args.target_url is not None:
        return served_target(target_args, stored)

    with explained("while the target was loaded", LESS_OF_TARGET):
        target = FrozenTarget.from_pretrained(
            target_args.target,
            dtype=target_args.target_dtype,
            gguf_file=target_args.gguf_file,
            attn_implementation=target_args.attn_implementation,
            tap_method=target_args.tap_method,
            trust_remote_code=target_args.trust_remote_code,
            revision=target_args.target_revision,
            media=media,
            **target_args.sharding,
        )
    return target.compile() if target_args.compile_target else target
