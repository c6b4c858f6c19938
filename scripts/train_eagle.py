"""Train an EAGLE draft for a target model.

    python scripts/train_eagle.py --config training_args/smollm2-135m-eagle3.yaml [--any_field value ...]
    torchrun --nproc-per-node 8 scripts/train_eagle.py --config ...
    accelerate launch --config_file training_args/accelerate/ddp.yaml scripts/train_eagle.py --config ...

The YAML file holds `argument: value` lines; the command line overrides it. The result in `--output_dir` is a folder
that vLLM and SGLang load. `--resume_from_checkpoint last` continues an interrupted run, and leaves a finished one as it
is. With `--dry_run --launch_config fsdp2 --device_memory_gb 80` a run only reports whether it fits into the memory of
the devices that this launch config starts it on. It reads no weights and needs no launcher.

Besides the arguments below, you can give every argument of `transformers.TrainingArguments` (`--help_all` lists them):
--output_dir, --learning_rate, --num_train_epochs, --max_steps, --per_device_train_batch_size, --bf16, --save_steps,
--report_to, --push_to_hub.
"""

import logging
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.door.environment import tell_traps
from hf_eagle.door.inputs import naming
from hf_eagle.door.logs import show_log
from hf_eagle.door.printer import run_verb
from hf_eagle.door.writing import writing
from hf_eagle.training.run_arguments import RunArguments


logger = logging.getLogger("hf_eagle")


def door(argv: list[str] | None = None) -> RunArguments:
    """Return the run, after checking every path."""
    run = RunArguments.parse(argv, description=__doc__)
    run.refuse_other_methods()
    run.check_paths()
    return run


def main() -> None:
    run = door()

    from huggingface_hub.utils import disable_progress_bars
    from transformers import set_seed

    from hf_eagle.evaluation.prompts import load_prompts
    from hf_eagle.training.alone import writing_alone
    from hf_eagle.training.distributed import leave
    from hf_eagle.training.resuming import was_written_to_the_end
    from hf_eagle.training.stalls import watched

    data_args, args = run.data, run.training
    # one rank of a machine speaks for all
    show_log(logging.INFO if args.should_log else logging.ERROR)
    if args.should_log:
        tell_traps()
    if args.disable_tqdm:
        disable_progress_bars()  # of uploads too
    set_seed(args.seed)
    if run.dry_run.dry_run:
        return print_dry_run(run)

    # whatever can be refused is refused before anything is loaded
    resume = run.refuse_before_loading()
    with naming("acceptance_prompts"):
        prompts = data_args.acceptance_prompts and load_prompts(
            data_args.acceptance_prompts,
            limit=data_args.acceptance_num_prompts,
            skip_bad_records=data_args.skip_bad_records,
        )

    with writing_alone("output_dir", args.output_dir, args.process_index):
        with watched(args, "while the run is made ready"):
            trainer = build_trainer(run, resume, prompts)
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        with watched(args, "while the results are written"):
            if trainer.nothing_to_do and was_written_to_the_end(args.output_dir, trainer.state.global_step):
                logger.info("%s is left as it is.", args.output_dir)
            else:
                with writing("output_dir", args.output_dir):
                    leave_results(trainer, result)
            leave()


def build_trainer(run: RunArguments, resume: Path | None, prompts: list | None):
    """Return the trainer of the run, with its target, its data and its draft.

    Args:
        run: the run.
        resume: the checkpoint to continue from, `None` for a new run.
        prompts: the prompts to decode while it trains, to measure the acceptance length.
    """
    from hf_eagle.data.collators import EagleDataCollator
    from hf_eagle.hub.run_facts import argument_facts
    from hf_eagle.targets.architectures import check_length
    from hf_eagle.training import parts, target_of_run
    from hf_eagle.training.served import check_server, only_reads
    from hf_eagle.training.stalls import watched
    from hf_eagle.training.trainer import EagleTrainer

    data_args, args = run.data, run.training
    target_of_run.check_lengths(run.target, data_args)
    parts.check_draft_shape(run.target, run.draft)
    check_server(run.target, data_args)
    target_args = target_of_run.spreadable(run.target, args)
    tokenizer, processor = target_of_run.tokenizer_of(target_args), target_of_run.processor_of(target_args, data_args)
    train, held_out = parts.conversations(tokenizer, data_args, args, processor)

    with watched(args, "while the target is loaded"):
        media = target_of_run.shows_media(train, prompts)
        target = target_of_run.load_target(target_args, media, stored=only_reads(data_args))
    check_length(target.config, data_args.max_length)

    # an adapter's base is the draft that its training began with, on resuming too
    existing = run.draft.init_from if run.adapter.use_peft else resume
    draft = parts.draft_for(target, tokenizer, train, target_args, run.draft, existing, args.seed, held_out)
    cache = data_args.feature_store and parts.feature_cache(
        target, draft.config.tap_ids, tokenizer, train, held_out, data_args, bool(prompts), processor
    )

    trainer = EagleTrainer(
        model=draft,
        args=args,
        target=target,
        feature_cache=cache,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=EagleDataCollator.of(processor) if target_of_run.shows_media(train) else None,
        peft_config=run.adapter.peft_config(),
    )
    if run.adapter.use_peft:
        logger.info("The adapter has %d parameters to train.", trainer.model.get_nb_trainable_parameters()[0])
    if trainer.is_world_process_zero():
        trainer.card_facts = argument_facts(run, train)
    if prompts:
        measure_acceptance(trainer, processor or tokenizer, prompts, run)
    return trainer


def print_dry_run(run: RunArguments) -> None:
    """Print how much memory every rank of the run would need, and whether that fits."""
    from hf_eagle.benchmark.dry_run import dry_run, read_target_config, shapes_of
    from hf_eagle.targets.architectures import check_length
    from hf_eagle.training.parts import config_of_draft

    target_args, data_args, dry_args, args = run.target, run.data, run.dry_run, run.training
    target_config = read_target_config(target_args.target, target_args.target_revision, target_args.trust_remote_code)
    check_length(target_config, data_args.max_length)
    config = config_of_draft(target_config, target_args, run.draft)
    steps = run.draft.kind.part("training").training_for(args, config).steps

    report = dry_run(target_config, config, shapes_of(target_config, target_args, data_args, dry_args, args, steps))
    if args.process_index == 0:
        print(report.describe())
    warning = report.warning(dry_args.device_memory_gb)
    if warning is not None:
        logger.warning("%s", warning)


def measure_acceptance(trainer, tokenizer, prompts, run: RunArguments) -> None:
    """Have the trainer decode these prompts while it trains."""
    from hf_eagle.training.acceptance import AcceptanceLengthCallback

    method = run.draft.kind.methods[run.draft.method]
    how = {"every_steps": run.data.acceptance_steps, "template_kwargs": run.data.template_kwargs}
    trainer.add_callback(AcceptanceLengthCallback(trainer, tokenizer, prompts, method=method, **how))


def leave_results(trainer, result) -> None:
    """Write the draft, the measurements, and plots of them into `output_dir`."""
    from hf_eagle.evaluation.plots import plot_acceptance_history, plot_training
    from hf_eagle.serving.check import serves

    trainer.save_model()
    if result.metrics:
        trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    if trainer.is_world_process_zero():
        output_dir = Path(trainer.args.output_dir)
        plot_training(trainer.state.log_history, output_dir / "training.png")
        plot_acceptance_history(trainer.state.log_history, output_dir / "acceptance_history.png")
        trainer.create_model_card()
        served = serves(trainer.accelerator.unwrap_model(trainer.model).kind.name)
        told = ": vLLM and SGLang load that folder as it is." if served else "."
        logger.info("The draft is in %s%s", trainer.args.output_dir, told)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.save_state()  # last: a run that is continued looks there whether everything else is done


if __name__ == "__main__":
    try:
        run_verb(main)
    except SystemExit as end:
        distributed = sys.modules.get("hf_eagle.training.distributed")  # not there if nothing was begun
        if distributed is not None:
            distributed.leave(end.code)
        raise
