"""Make the parts of a run from its arguments: data, draft, stored features; `target_of_run` makes the target's."""

import logging
import math

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import IterableDataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin, set_seed

from ..arguments.groups import DataArguments, DraftArguments, TargetArguments
from ..arguments.training import EagleTrainingArguments
from ..data.conversations import MaskOptions, build_dataset, build_stream
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
from ..regions import compile_regions
from ..store.cache import FeatureCache, open_cache
from ..store.fingerprints import drop_layers
from ..targets.config_fields import read_field
from ..targets.room import config_before_loading
from ..targets.target import FrozenTarget
from .served import only_reads
from .stalls import watched


logger = logging.getLogger(__name__)


def check_draft_shape(target_args: TargetArguments, draft_args: DraftArguments) -> None:
    """`ValueError` for taps, a `draft_rope_scaling` or a mask token that the draft cannot have, or an MLP of unknown
    width, as far as the target's config shows."""
    config = config_before_loading(target_args.target, **target_args.source)
    if config is None:
        return

    if draft_args.draft_intermediate_size is None:
        mlp_width(config)
    config_of_draft(config, target_args, draft_args)


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
