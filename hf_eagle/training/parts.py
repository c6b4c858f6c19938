"""Make the parts of a run from its arguments: tokenizer, data, target, draft, stored features."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import IterableDataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin, set_seed

from ..arguments.groups import DataArguments, DraftArguments, TargetArguments
from ..arguments.training import EagleTrainingArguments
from ..data.conversations import MaskOptions, build_dataset, build_stream
from ..data.media import limit_media
from ..data.packing import pack_dataset
from ..data.reads import what_is_read
from ..data.records import load_records
from ..data.streaming import RankStream
from ..data.token_stream import ShuffledRecords
from ..data.vision_dataset import build_vision_dataset, holds_media
from ..door.inputs import naming
from ..drafts.build import load_draft, new_draft
from ..drafts.configuration_base import DraftConfig, mlp_width
from ..drafts.modeling_base import EaglePreTrainedModel
from ..drafts.rope import scaled_rope
from ..drafts.vocabulary import (
    VocabularyMapping,
    count_supervised_tokens,
    count_unseen,
    frequent_ids,
    tokenizer_fingerprint,
    told_filled,
)
from ..drafts.warm_start import start_from
from ..evaluation.prompts import Prompt
from ..evaluation.prompts import holds_media as prompt_holds_media
from ..regions import compile_regions
from ..store.cache import FeatureCache, open_cache
from ..store.fingerprints import drop_layers
from ..targets.architectures import check_length
from ..targets.config_fields import read_field
from ..targets.loading import (
    files_of_processor,
    is_adapter,
    load_processor,
    load_tokenizer,
    takes_media,
    why_only_text,
)
from ..targets.merged_folder import save_merged
from ..targets.room import config_before_loading
from ..targets.shard_layout import loading_arguments
from ..targets.target import FrozenTarget
from .memory import LESS_OF_TARGET, explained
from .served import only_reads, served_target
from .stalls import watched


logger = logging.getLogger(__name__)


def check_lengths(target_args: TargetArguments, data_args: DataArguments) -> None:
    """`ValueError` for a `max_length` at which the target's output changes, as far as its config shows."""
    # the target's number of positions is no limit: conversations may be shorter than `max_length`
    config = config_before_loading(target_args.target, **target_args.source)
    if config is not None:
        check_length(config, data_args.max_length)


def check_draft_shape(target_args: TargetArguments, draft_args: DraftArguments) -> None:
    """`ValueError` for taps, a `draft_rope_scaling` or a mask token that the draft cannot have, or an MLP of unknown
    width, as far as the target's config shows."""
    config = config_before_loading(target_args.target, **target_args.source)
    if config is None:
        return

    if draft_args.draft_intermediate_size is None:
        mlp_width(config)
    config_of_draft(config, target_args, draft_args)


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
    return "media" in (data.column_names or ()) or any(map(prompt_holds_media, prompts or ()))


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


def conversations(
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    args: EagleTrainingArguments,
    processor: ProcessorMixin | None = None,
) -> tuple[Dataset | RankStream, Dataset | None]:
    """Tokenised data to train on and to hold out (or `None`), packed if asked for, or this rank's part of a stream.

    Chats with images or videos are read with `processor`, if the target has one.
    """
    options = MaskOptions(data_args.last_turn_only, data_args.train_on_thoughts, data_args.train_on_tool_calls)
    template = {"options": options, "template_kwargs": data_args.template_kwargs}
    template["skip_bad_records"] = data_args.skip_bad_records

    def build(argument, weights=None, streaming=False):
        form = {"dataset_format": data_args.dataset_format, "skip_bad_records": data_args.skip_bad_records}
        sources = getattr(data_args, argument)
        with naming(argument):
            try:
                records = load_records(sources, weights=weights, streaming=streaming, seed=args.seed, **form)
            except ValueError as problem:
                if not str(problem).startswith("`weights`"):
                    raise
                raise ValueError(str(problem).replace("`weights`", "`data_weights`", 1)) from problem

        if processor is not None and holds_media(records):
            skip = data_args.skip_bad_media
            media = {"skip_bad_media": skip, "media_root": data_args.media_root}
            return build_vision_dataset(records, processor, data_args.max_length, **media, **template)

        if streaming:
            records = ShuffledRecords(records, seed=args.seed)
            shared = {"rank": args.process_index, "world": args.world_size, "keep_places": True}
            stream = build_stream(records, tokenizer, data_args.max_length, **template, **shared)
            return RankStream(stream, reads=what_is_read(sources, weights))

        return build_dataset(records, tokenizer, data_args.max_length, data_args.preprocessing_workers, **template)

    with watched(args, "while the data are prepared"), args.main_process_first(desc="tokenising"):
        train = build("train_data", data_args.data_weights, data_args.streaming)
        held_out = data_args.eval_data and build("eval_data")
        if not held_out and data_args.eval_share > 0:
            if math.ceil(data_args.eval_share * len(train)) >= len(train):
                raise ValueError(
                    f"`eval_share` {data_args.eval_share:g} of {len(train)} conversations leaves none to train on: "
                    "lower it, or give more `train_data`."
                )
            parts = train.train_test_split(test_size=data_args.eval_share, seed=args.seed)
            train, held_out = parts["train"], parts["test"]
        if data_args.packing:
            train, held_out = (data and pack_dataset(data, data_args.max_length) for data in (train, held_out))

    if data_args.packing and args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        # so that a recipe for padded batches still works
        logger.info("Packed rows are equally long, so random sampling replaces `%s`.", args.train_sampling_strategy)
        args.train_sampling_strategy = "random"
    return train, held_out


def config_of_draft(
    target_config: PreTrainedConfig, target_args: TargetArguments, draft_args: DraftArguments, **fields
) -> DraftConfig:
    """The config of the draft that the arguments describe."""
    options = {**vars(draft_args), "latent_sizes": draft_args.latent_sizes, "tap_ids": target_args.tap_ids}

    if draft_args.rope_scaling is not None:
        text = target_config.get_text_config()
        positions = read_field(text, "max_position_embeddings")
        fields["rope_parameters"] = scaled_rope(text, draft_args.rope_scaling, positions)
    if draft_args.draft_intermediate_size is not None:
        fields["intermediate_size"] = draft_args.draft_intermediate_size
    return draft_args.kind.part("configuration").config_for(target_config, options, **fields)


def draft_for(
    target: FrozenTarget,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset | RankStream,
    target_args: TargetArguments,
    draft_args: DraftArguments,
    existing: str | None,
    seed: int,
    held_out: Dataset | None = None,
) -> EaglePreTrainedModel:
    """The draft to train: the one in the folder `existing` with its vocabulary mapping, or a new one for these data."""
    data = read_in_a_run(train, held_out)
    compile_regions(draft_args.compile_draft)
    source = None
    if draft_args.init_from is not None and existing is None:
        source = load_draft(draft_args.init_from, dtype=torch.float32, argument="init_from")
    set_seed(seed)  # whatever loading drew: an adapter draws random numbers, the folder that it is merged to does not
    fingerprint = tokenizer_fingerprint(tokenizer)
    config = config_of_draft(target.config, target_args, draft_args, tokenizer_fingerprint=fingerprint)
    if existing is not None:
        return _existing_draft(target, config, draft_args, existing, tokenizer, data)

    held = None if source is None else source.config
    config.fit_to_data(tokenizer, data, target.embedding_weight(), held)

    mapping = None
    if config.draft_vocab_size < config.vocab_size:
        counts = count_supervised_tokens(train, config.vocab_size)
        fill = frequent_ids(tokenizer) if draft_args.fill_vocabulary else ()
        mapping = VocabularyMapping.from_counts(counts, config.draft_vocab_size, tokenizer.all_special_ids, fill)
        sizes = (config.draft_vocab_size, config.vocab_size, 100 * mapping.coverage)
        logger.info("Draft vocabulary: %d of %d tokens, %.2f%% of the supervised tokens.", *sizes)

        config.filled_tokens = count_unseen(mapping.t2d.nonzero()[:, 0], counts, tokenizer.all_special_ids) or None
        if config.filled_tokens:
            logger.info("%s", told_filled(config.filled_tokens))

    head = target.head_weight() if draft_args.draft_init == "target" else None
    draft = new_draft(config, target.embedding_weight(), mapping, head, draft_args.draft_attn_implementation)

    if source is not None:
        carried = start_from(draft, source)
        rows = f", with {carried} of its tokens among the draft's {config.draft_vocab_size}" if draft.own_head else ""
        logger.info("%s", f"Started from {draft_args.init_from}{rows}.")

    return draft


def _existing_draft(
    target: FrozenTarget, config: DraftConfig, draft_args: DraftArguments, existing: str, tokenizer, data
) -> EaglePreTrainedModel:
    """The draft in a folder; `ValueError` if the arguments, which `config` follows from, describe another."""
    argument = "init_from" if existing == draft_args.init_from else "resume_from_checkpoint"
    draft = load_draft(existing, target, dtype=torch.float32, argument=argument)
    config.fit_to_data(tokenizer, data, target.embedding_weight(), held=draft.config)
    _check_same_shape(draft.config, config, existing)

    if draft_args.rope_scaling is not None and draft.config.rope_parameters != config.rope_parameters:
        raise ValueError(
            f"`draft_rope_scaling` makes RoPE {config.rope_parameters}, but {existing} was trained with "
            f"{draft.config.rope_parameters}: leave it out, or start a new draft in another `output_dir`."
        )

    take_window(draft.config, config)
    width = draft_args.draft_intermediate_size
    if width not in (None, draft.config.intermediate_size):
        raise ValueError(
            f"`draft_intermediate_size` is {width}, but {existing} was trained with "
            f"{draft.config.intermediate_size}: leave it out, or start a new draft in another `output_dir`."
        )

    draft.set_attn_implementation(draft_args.draft_attn_implementation)
    return draft


def read_in_a_run(train: Dataset | RankStream, held_out: Dataset | None) -> Dataset | RankStream:
    """All that batches are made of: evaluations read the same draft, hours later."""
    if not held_out or isinstance(train, IterableDataset):
        return train
    return concatenate_datasets([data.select_columns("input_ids") for data in (train, held_out)])


def take_window(held: DraftConfig, asked: DraftConfig) -> None:
    """Write the window that servers need into a draft of an earlier version, whose weights are the same."""
    for name in ("layer_types", "sliding_window"):
        if getattr(asked, name, None) is not None:
            setattr(held, name, getattr(asked, name))


def _check_same_shape(held: DraftConfig, asked: DraftConfig, folder: str) -> None:
    """`ValueError` if the arguments describe another draft than the one in the folder."""
    wanted, found = asked.as_arguments(), held.as_arguments()
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"`{name}` is {_as_given(name, wanted, asked)} but {folder} was trained with "
                f"{_as_given(name, found, held)}: keep it, or start a new draft in another `output_dir`."
            )


def _as_given(name: str, values: dict, config: DraftConfig) -> str:
    """Return a value of a draft's shape as its argument says it: the whole vocabulary is `none`."""
    whole = name == "draft_vocab_size" and values.get(name) == config.vocab_size
    return f"none (all {config.vocab_size} tokens)" if whole else str(values.get(name))


def feature_cache(
    target: FrozenTarget,
    tap_ids: list[int] | None,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    held_out: Dataset | None,
    data_args: DataArguments,
    keep_target: bool,
    processor: ProcessorMixin | None = None,
) -> FeatureCache:
    """The run's feature store; drop the target's layers if only its head is still needed, unless it is kept."""
    write = not only_reads(data_args)
    cache = open_cache(
        data_args.feature_store,
        target,
        tokenizer,
        [data for data in (train, held_out) if data],
        tap_ids=tap_ids,
        max_length=data_args.max_length,
        dtype=data_args.store_dtype,
        write=write,
        processor=processor,
    )

    if not write and not keep_target:
        drop_layers(target)
    return cache
