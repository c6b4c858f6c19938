"""Train an EAGLE draft for a target model.

    python scripts/train_eagle.py --config training_args/smollm2-135m-eagle3.yaml [--any_field value ...]
    torchrun --nproc-per-node 8 scripts/train_eagle.py --config ...
    accelerate launch --config_file training_args/accelerate/ddp.yaml scripts/train_eagle.py --config ...

The YAML file holds `argument: value` lines; the command line overrides it. What is left in `--output_dir` is the
folder that vLLM and SGLang load. An interrupted run goes on with `--resume_from_checkpoint last`. Whether a run fits
its devices is told without weights by `--dry_run --world_size 8 --device_memory_gb 80`.

Besides the arguments below, every argument of `transformers.TrainingArguments` is taken (`--help_all` lists them):
--output_dir, --learning_rate, --num_train_epochs, --max_steps, --per_device_train_batch_size, --bf16, --save_steps,
--report_to, --push_to_hub.
"""

import logging
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

from hf_eagle.arguments import (
    AdapterArguments,
    DataArguments,
    DraftArguments,
    DryRunArguments,
    EagleArguments,
    TargetArguments,
    refuse_other_methods,
)
from hf_eagle.parser import EagleArgumentParser
from hf_eagle.targets.latent import LATENT_SIZES, has_latent_attention


logger = logging.getLogger("hf_eagle")
OURS = (TargetArguments, DraftArguments, AdapterArguments, DataArguments, DryRunArguments)
# what a draft's shape is made of
FIXED = ("tap_ids", "draft_vocab_size", "fc_norm", "norm_output", *LATENT_SIZES)


def parse(args: list[str] | None = None, description: str = __doc__):
    """The six argument groups; `--help` is answered without loading torch."""
    args = sys.argv[1:] if args is None else args
    if "--help_all" in args:
        args = ["--help"]
    elif "--help" in args or "-h" in args:
        return EagleArgumentParser((*OURS, EagleArguments), description=description).parse_args_and_config(["--help"])
    from hf_eagle.training_arguments import EagleTrainingArguments

    return EagleArgumentParser((*OURS, EagleTrainingArguments), description=description).parse_args_and_config(args)


def main() -> None:
    target_args, draft_args, adapter_args, data_args, dry_args, args = parse()

    from transformers import set_seed

    from hf_eagle.callbacks import AcceptanceLengthCallback
    from hf_eagle.checkpoints import refuse_other_run, resolve_resume
    from hf_eagle.data.vision_collator import DataCollatorForVisionEagle
    from hf_eagle.distributed import leave
    from hf_eagle.drafts.build import draft_class_of
    from hf_eagle.evaluation.prompts import load_prompts
    from hf_eagle.targets.architectures import check_length
    from hf_eagle.targets.sharding import loading_arguments
    from hf_eagle.trainer import EagleTrainer

    logging.basicConfig(level=logging.INFO if args.should_log else logging.ERROR, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    set_seed(args.seed)
    # what can be refused is refused before anything is loaded
    refuse_other_methods(draft_args.draft_method, target_args, draft_args, args)
    if dry_args.dry_run:
        return print_dry_run(target_args, draft_args, data_args, dry_args, args)
    resume = resolve_resume(args.output_dir, args.resume_from_checkpoint)
    if resume is None and args.resume_from_checkpoint is None:
        refuse_other_run(args.output_dir, args.overwrite)
    if data_args.streaming:
        refuse_with_streaming(draft_args, args, resume)
    if draft_args.init_from is not None:
        draft_class_of(draft_args.init_from)
    elif adapter_args.use_peft:
        raise ValueError("`use_peft` trains an adapter on a draft that is there already: name it with `init_from`.")
    if adapter_args.use_peft and Path(draft_args.init_from).resolve() == Path(args.output_dir).resolve():
        raise ValueError(
            f"`output_dir` {args.output_dir} is the draft that `init_from` names, which the adapter is added to "
            "whenever training goes on: choose another folder."
        )
    hub = {"trust_remote_code": target_args.trust_remote_code, "revision": target_args.target_revision}
    loading_arguments(target_args.target, gguf_file=target_args.gguf_file, **target_args.sharding, **hub)
    prompts = data_args.acceptance_prompts and load_prompts(
        data_args.acceptance_prompts, limit=data_args.acceptance_num_prompts
    )

    tokenizer, processor = tokenizer_of(target_args), processor_of(target_args)
    train, held_out = conversations(tokenizer, data_args, args, processor)

    target = load_target(target_args)
    check_length(target.config, data_args.max_length)
    # an adapter's base is the draft that its training began with, on resuming too
    existing = draft_args.init_from if adapter_args.use_peft else resume
    draft = draft_for(target, tokenizer, train, target_args, draft_args, existing)
    features = data_args.feature_store and stored_features(
        target, draft.config.tap_ids, tokenizer, train, held_out, data_args, keep_target=bool(prompts)
    )
    trainer = EagleTrainer(
        model=draft,
        args=args,
        target=target,
        features=features,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=DataCollatorForVisionEagle(processor) if "media" in (train.column_names or ()) else None,
        peft_config=adapter_args.peft_config(),
    )
    if adapter_args.use_peft:
        logger.info("The adapter has %d parameters to train.", trainer.model.get_nb_trainable_parameters()[0])
    if prompts:
        method = "tree" if draft_args.method == "eagle2" else "chain"
        measured = AcceptanceLengthCallback(
            trainer, tokenizer, prompts, every_steps=data_args.acceptance_steps, method=method
        )
        trainer.add_callback(measured)
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    leave_results(trainer, result)
    leave()


def print_dry_run(target_args, draft_args, data_args, dry_args, args) -> None:
    """What every rank of the run would hold, and whether it fits."""
    from hf_eagle.drafts.build import DRAFT_CLASSES
    from hf_eagle.dry_run import dry_run, read_target_config, shapes_of
    from hf_eagle.targets.architectures import check_length

    hub = (target_args.target_revision, target_args.trust_remote_code)
    target_config = read_target_config(target_args.target, *hub)
    check_length(target_config, data_args.max_length)
    config = config_of_draft(target_config, target_args, draft_args)
    steps = args.ttt_steps or DRAFT_CLASSES[config.architectures[0]].default_ttt_steps
    run = dry_run(target_config, config, shapes_of(target_config, target_args, data_args, dry_args, args, steps))
    print(run.describe())
    warning = run.warning(dry_args.device_memory_gb)
    if warning is not None:
        logger.warning("%s", warning)


def tokenizer_of(target_args):
    """The target's tokenizer."""
    from hf_eagle.targets.loading import load_tokenizer

    return load_tokenizer(
        target_args.target,
        revision=target_args.target_revision,
        trust_remote_code=target_args.trust_remote_code,
        **({"gguf_file": target_args.gguf_file} if target_args.gguf_file else {}),
    )


def processor_of(target_args):
    """The processor of a target that takes images, `None` for any other."""
    from hf_eagle.targets.loading import load_processor, takes_media

    options = {"revision": target_args.target_revision, "trust_remote_code": target_args.trust_remote_code}
    if target_args.gguf_file or not takes_media(target_args.target, **options):
        return None
    return load_processor(target_args.target, **options)


def load_target(target_args):
    """The frozen target that the arguments name."""
    from hf_eagle.targets.target import FrozenTarget

    target = FrozenTarget.from_pretrained(
        target_args.target,
        dtype=target_args.target_dtype,
        gguf_file=target_args.gguf_file,
        attn_implementation=target_args.attn_implementation,
        tap_method=target_args.tap_method,
        trust_remote_code=target_args.trust_remote_code,
        revision=target_args.target_revision,
        **target_args.sharding,
    )
    return target.compile() if target_args.compile_target else target


def stored_features(target, tap_ids, tokenizer, train, held_out, data_args, keep_target: bool):
    """The run's feature store; a target of which only the head is needed then loses the rest, unless it is kept."""
    from hf_eagle.feature_cache import open_cache
    from hf_eagle.targets.stored import drop_layers

    write = data_args.cache_mode == "first_epoch"
    cache = open_cache(
        data_args.feature_store,
        target,
        tokenizer,
        [data for data in (train, held_out) if data],
        tap_ids=tap_ids,
        max_length=data_args.max_length,
        dtype=data_args.store_dtype,
        write=write,
    )
    if not write and not keep_target:
        drop_layers(target)
    return cache


def leave_results(trainer, result) -> None:
    """The draft, what was measured, and pictures of it, in `output_dir`."""
    from hf_eagle.evaluation.plots import plot_acceptance_history, plot_training

    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    if trainer.is_world_process_zero():
        output_dir = Path(trainer.args.output_dir)
        plot_training(trainer.state.log_history, output_dir / "training.png")
        plot_acceptance_history(trainer.state.log_history, output_dir / "acceptance_history.png")
        logger.info("The draft is in %s: vLLM and SGLang load that folder as it is.", trainer.args.output_dir)


def conversations(tokenizer, data_args, args, processor=None):
    """Tokenised data to train on and to hold out (or `None`), packed when asked for, or a stream.

    Chats with images or videos are read with `processor`, where the target has one.
    """
    from hf_eagle.data.conversations import MaskOptions, build_dataset, build_stream
    from hf_eagle.data.packing import pack_dataset
    from hf_eagle.data.records import load_records
    from hf_eagle.data.vision_dataset import build_vision_dataset, holds_media

    options = MaskOptions(data_args.last_turn_only, data_args.train_on_thoughts, data_args.train_on_tool_calls)
    template = {"options": options, "template_kwargs": data_args.template_kwargs}

    def build(sources, weights=None, streaming=False):
        form = data_args.dataset_format
        records = load_records(sources, dataset_format=form, weights=weights, streaming=streaming, seed=args.seed)
        if processor is not None and holds_media(records):
            skip = data_args.skip_bad_media
            return build_vision_dataset(records, processor, data_args.max_length, skip_bad_media=skip, **template)
        if streaming:
            records = records.shuffle(seed=args.seed, buffer_size=1000)
            return build_stream(records, tokenizer, data_args.max_length, **template)
        return build_dataset(records, tokenizer, data_args.max_length, data_args.preprocessing_workers, **template)

    with args.main_process_first(desc="tokenising"):
        train = build(data_args.train_data, data_args.data_weights, data_args.streaming)
        held_out = data_args.eval_data and build(data_args.eval_data)
        if not held_out and data_args.eval_share > 0:
            parts = train.train_test_split(test_size=data_args.eval_share, seed=args.seed)
            train, held_out = parts["train"], parts["test"]
        if data_args.packing:
            train, held_out = (data and pack_dataset(data, data_args.max_length) for data in (train, held_out))
    if data_args.packing and args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        # a recipe for padded batches stays usable
        logger.info("Packed rows are equally long: not `%s` but random sampling.", args.train_sampling_strategy)
        args.train_sampling_strategy = "random"
    return train, held_out


def refuse_with_streaming(draft_args, args, resume) -> None:
    """`ValueError` for what needs the whole data at hand."""
    if args.max_steps <= 0:
        raise ValueError("`streaming` data have no length: say with `max_steps` how long to train.")
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"`train_sampling_strategy` is {args.train_sampling_strategy}, which needs every conversation's length: "
            "set it to random, or leave out `streaming`."
        )
    if draft_args.draft_vocab_size is not None and resume is None:
        raise ValueError(
            f"`draft_vocab_size` is {draft_args.draft_vocab_size}, but tokens of `streaming` data cannot be counted "
            "first: leave it out and prune the draft afterwards (scripts/prune_draft.py), or leave out `streaming`."
        )


def config_of_draft(target_config, target_args, draft_args, **fields):
    """The config of the draft that the arguments describe."""
    from hf_eagle.drafts.build import draft_config
    from hf_eagle.drafts.configuration_eagle import Eagle1Config
    from hf_eagle.targets.architectures import describe_taps

    if draft_args.draft_method == "eagle1":
        return Eagle1Config.from_target(target_config, **fields)
    config = draft_config(
        target_config,
        draft_args.draft_attention,
        draft_args.latent_sizes,
        draft_args.draft_rope,
        draft_vocab_size=draft_args.draft_vocab_size,
        tap_ids=target_args.tap_ids,
        fc_norm=draft_args.fc_norm,
        norm_output=draft_args.norm_output,
        **fields,
    )
    logger.info("%s", describe_taps(target_config, config.tap_ids))
    return config


def draft_for(target, tokenizer, train, target_args, draft_args, existing):
    """The draft to train: the one in the folder `existing` with its vocabulary mapping, or a new one for these data."""
    import torch

    from hf_eagle.drafts.build import load_draft, new_draft
    from hf_eagle.drafts.vocabulary import VocabularyMapping, count_supervised_tokens, tokenizer_fingerprint
    from hf_eagle.drafts.warm_start import start_from

    config = config_of_draft(
        target.config, target_args, draft_args, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer)
    )
    if existing is not None:
        draft = load_draft(existing, target, dtype=torch.float32)
        pairs = {name: (getattr(config, name, None), getattr(draft.config, name, None)) for name in FIXED}
        ropes = tuple("1d" if c.mrope_section is None else "mrope" for c in (config, draft.config))
        kinds = {
            "draft_rope": ropes,
            "method": (draft_args.draft_method, draft.method),
            "draft_attention": tuple("mla" if has_latent_attention(c) else "llama" for c in (config, draft.config)),
        }
        for name, (asked, found) in {**kinds, **pairs}.items():
            if asked != found:
                raise ValueError(
                    f"`{name}` is {asked} but {existing} was trained with {found}: keep it, or start a new draft in "
                    "another `output_dir`."
                )
        draft.set_attn_implementation(draft_args.draft_attn_implementation)
        return draft

    mapping = None
    if config.draft_vocab_size < config.vocab_size:
        counts = count_supervised_tokens(train, config.vocab_size)
        mapping = VocabularyMapping.from_counts(counts, config.draft_vocab_size, tokenizer.all_special_ids)
        logger.info(
            "Draft vocabulary: %d of %d tokens, %.2f%% of the supervised tokens.",
            config.draft_vocab_size,
            config.vocab_size,
            100 * mapping.coverage,
        )
    head = target.head_weight() if draft_args.draft_init == "target" else None
    draft = new_draft(config, target.embedding_weight(), mapping, head, draft_args.draft_attn_implementation)
    if draft_args.init_from is not None:
        carried = start_from(draft, load_draft(draft_args.init_from, dtype=torch.float32))
        logger.info(
            "Started from %s, with %d of its tokens among the draft's %d.",
            draft_args.init_from,
            carried,
            config.draft_vocab_size,
        )
    return draft


if __name__ == "__main__":
    try:
        main()
    except (ArithmeticError, OSError, ValueError) as problem:
        raise SystemExit(f"error: {problem}") from problem
