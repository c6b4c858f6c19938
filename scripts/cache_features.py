"""Compute the target's features of a recipe's data once, to train for many epochs without running the target again.

    python scripts/cache_features.py --config recipe.yaml --feature_store DIR [--any_field value ...]
    torchrun --nproc-per-node 8 scripts/cache_features.py --config recipe.yaml --feature_store DIR
    python scripts/train_eagle.py --config recipe.yaml --feature_store DIR

Takes the recipe and the arguments of scripts/train_eagle.py, and stores exactly what training with them reads,
including held-out data. It prints the disk space that the features need before it computes anything. The same command
continues an interrupted run.

`--store_dtype float8` halves the space. `per_device_train_batch_size` rows are computed together.
"""

import logging
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.door.environment import tell_traps
from hf_eagle.door.logs import show_log
from hf_eagle.door.printer import going_on, run_verb
from hf_eagle.training.run_arguments import RunArguments


logger = logging.getLogger("hf_eagle")


def door(argv: list[str] | None = None) -> RunArguments:
    """Return the run, after checking every path."""
    run = RunArguments.parse(argv, description=__doc__)
    if run.data.feature_store is None:
        raise ValueError("`feature_store` is not set: name the folder with `--feature_store DIR`.")
    run.refuse_other_methods()
    run.refuse_missing_kernels()
    run.check_paths(writes_features=True)
    return run


def main() -> None:
    run = door()
    target_args, data_args, args = run.target, run.data, run.training

    from transformers import set_seed

    from hf_eagle.data.collators import EagleDataCollator
    from hf_eagle.store.cache import fill, open_cache
    from hf_eagle.training.distributed import leave
    from hf_eagle.training.parts import config_of_draft, conversations
    from hf_eagle.training.served import check_server
    from hf_eagle.training.target_of_run import (
        check_lengths,
        load_target,
        processor_of,
        shows_media,
        spreadable,
        tokenizer_of,
    )

    show_log(logging.INFO if args.should_log else logging.ERROR)
    if args.should_log:
        tell_traps()
    set_seed(args.seed)
    check_lengths(target_args, data_args)
    check_server(target_args, data_args, writes=True)
    target_args = spreadable(target_args, args)
    tokenizer, processor = tokenizer_of(target_args), processor_of(target_args, data_args)
    datasets = [data for data in conversations(tokenizer, data_args, args, processor) if data]
    target = load_target(target_args, media=any(map(shows_media, datasets)))
    target.tap_ids = config_of_draft(target.config, target_args, run.draft).tap_ids
    cache = open_cache(
        data_args.feature_store,
        target,
        tokenizer,
        datasets,
        tap_ids=target.tap_ids,
        max_length=data_args.max_length,
        dtype=data_args.store_dtype,
        write=True,
        processor=processor,
    )
    target.to(args.device)
    begun = time.perf_counter()
    collator = EagleDataCollator.of(processor or tokenizer)
    with going_on():
        tokens = fill(cache, target, datasets, collator, args.per_device_train_batch_size)
    logger.info("%d tokens per second on this rank.", tokens / (time.perf_counter() - begun))
    logger.info("%s holds features of %d conversations.", data_args.feature_store, len(cache.store))
    leave()


if __name__ == "__main__":
    run_verb(main)
