"""Benchmark training from a feature store against training that asks the target, both through the Trainer."""

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..data.collators import EagleDataCollator
from ..data.conversations import build_dataset
from ..data.records import load_records
from ..store.cache import FeatureCache, fill, open_cache
from ..targets.loading import load_tokenizer
from ..targets.target import FrozenTarget
from . import chats


# blocks of chats, on which both ways take turns
_BLOCKS = 10


def measure(args, device: torch.device) -> dict:
    """Run an epoch over `args.num_chats` chats each way, alternating after every tenth of them.

    The store is evicted from memory before each of its turns, so it is read from the disk. The cost of reading is the
    time of the reading thread, plus the time a step waits and converts.
    """
    tokenizer = load_tokenizer(args.target)
    target = FrozenTarget.from_pretrained(args.target, dtype=getattr(torch, args.dtype), device=device)
    everything = build_dataset(load_records([args.data]), tokenizer, args.length)
    data = everything.select(torch.randperm(len(everything))[: args.num_chats].tolist())

    draft = chats.draft_for(target, everything, tokenizer, args).to(device)
    target.tap_ids = draft.config.tap_ids
    size = -(-len(data) // _BLOCKS)
    blocks = [data.select(range(i, min(i + size, len(data)))) for i in range(0, len(data), size)]

    with tempfile.TemporaryDirectory(dir=args.store_dir) as folder:

        def cache(write=False):
            settings = {"tap_ids": target.tap_ids, "max_length": args.length, "dtype": args.store_dtype}
            return open_cache(folder, target, tokenizer, [data], **settings, write=write)

        writing = cache(write=True)
        begun = time.perf_counter()
        tokens = fill(writing, target, [data], EagleDataCollator.of(tokenizer), 8)
        filling = time.perf_counter() - begun
        stored_bytes = sum(p.stat().st_size for p in Path(folder).iterdir())

        epoch = partial(chats.trainer_epoch, draft, target, tokenizer=tokenizer, args=args)
        total = _take_turns(blocks, epoch, lambda: _ReadingClock(cache(), target), Path(folder))

    return {
        "seconds": {way: {"seconds": total[way]} for way in ("live", "stored")},
        "supervised_rows_per_second": chats.supervised_rows(data) / total["stored"],
        "epoch_live_vs_stored": total["live"] / total["stored"],
        "reading_share": total["reading"] / total["stored"],
        "store_bytes_per_token": stored_bytes / tokens,
        "store_bytes": stored_bytes,
        "fill_seconds": filling,
        "chats": len(data),
        "tokens": tokens,
    }


def _take_turns(
    blocks: list, epoch: Callable[..., dict[str, float]], new_clock: Callable[[], "_ReadingClock"], folder: Path
) -> dict[str, float]:
    """Seconds of all blocks of chats: `live`, `stored`, and `reading`, which is a part of `stored`.

    Args:
        blocks: the chats, in blocks.
        epoch: trains on a block, with `features` if given.
        new_clock: opens the store again.
        folder: the store's folder.
    """
    total = {"live": 0.0, "stored": 0.0, "reading": 0.0}
    for number, block in enumerate([blocks[0], *blocks]):  # the first once more, to warm up
        _evict(folder)
        clock = new_clock()
        seconds = {
            "live": epoch(data=block)["seconds"],
            "stored": epoch(data=block, feature_cache=clock)["seconds"],
            "reading": clock.seconds,
        }
        if number:
            total = {name: value + seconds[name] for name, value in total.items()}
    return total


class _ReadingClock(FeatureCache):
    """Measure the seconds of reading: in its thread, and in the step that waits for it and converts."""

    def __init__(self, cache: FeatureCache, target: FrozenTarget):
        super().__init__(cache.store, target)
        self.seconds, gather = 0.0, cache.store.gather

        def timed(*arguments):
            begun = time.perf_counter()
            features = gather(*arguments)
            self.seconds += time.perf_counter() - begun
            return features

        self.store.gather = timed

    def __call__(self, inputs, run_target):
        begun = time.perf_counter()
        seen = super().__call__(inputs, run_target)
        self.seconds += time.perf_counter() - begun
        return seen


def _evict(folder: Path) -> None:
    """Ask the system to drop the files from its page cache."""
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
