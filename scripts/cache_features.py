"""Compute the target's features of a recipe's data once, to train on them for many epochs without asking it again.

    python scripts/cache_features.py --config recipe.yaml --feature_store DIR [--any_field value ...]
    torchrun --nproc-per-node 8 scripts/cache_features.py --config recipe.yaml --feature_store DIR
    python scripts/train_eagle.py --config recipe.yaml --feature_store DIR

Takes the recipe and the arguments of scripts/train_eagle.py and stores exactly what training with them reads, held-out
data too. What it takes on the disk is said before anything is computed. An interrupted run goes on where it was.

`--store_dtype float8` halves the store. `per_device_train_batch_size` rows are computed together.
"""

import logging
import sys
import time
from pathlib import Path


sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import train_eagle  # noqa: E402


logger = logging.getLogger("hf_eagle")


def main() -> None:
    target_args, draft_args, _, data_args, _, args = train_eagle.parse(description=__doc__)
    if data_args.feature_store is None:
        raise ValueError("Name the folder that features are stored in: `--feature_store DIR`.")

    from transformers import set_seed

    from hf_eagle.arguments import refuse_other_methods
    from hf_eagle.data.collators import EagleDataCollator
    from hf_eagle.distributed import leave
    from hf_eagle.feature_cache import fill, open_cache

    logging.basicConfig(level=logging.INFO if args.should_log else logging.ERROR, format="%(message)s")
    set_seed(args.seed)
    refuse_other_methods(draft_args.draft_method, target_args, draft_args, args)
    tokenizer = train_eagle.tokenizer_of(target_args)
    datasets = [data for data in train_eagle.conversations(tokenizer, data_args, args) if data]
    target = train_eagle.load_target(target_args)
    target.tap_ids = train_eagle.config_of_draft(target.config, target_args, draft_args).tap_ids
    cache = open_cache(
        data_args.feature_store,
        target,
        tokenizer,
        datasets,
        tap_ids=target.tap_ids,
        max_length=data_args.max_length,
        dtype=data_args.store_dtype,
        write=True,
    )
    target.to(args.device)
    begun = time.perf_counter()
    collator = EagleDataCollator(0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    tokens = fill(cache, target, datasets, collator, args.per_device_train_batch_size)
    logger.info("%d tokens a second on this rank.", tokens / (time.perf_counter() - begun))
    logger.info("%s holds features of %d conversations.", data_args.feature_store, len(cache.store))
    leave()


if __name__ == "__main__":
    try:
        main()
    except (ArithmeticError, OSError, ValueError) as problem:
        raise SystemExit(f"error: {problem}") from problem
