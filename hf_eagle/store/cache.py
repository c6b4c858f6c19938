"""Use stored features instead of running the target: fill a store, check it against a run, read it in training."""

import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

from ..data.collators import any_packed, documents_of, told_to_target
from ..data.columns import read_batch
from ..data.media import processor_fingerprint
from ..drafts.vocabulary import tokenizer_fingerprint
from ..targets.features import HeadSummary
from ..targets.media_inputs import has_mrope
from ..targets.target import FrozenTarget, TargetFeatures
from .batches import StoredFeaturesCollator
from .dtypes import decode, encode
from .feature_store import SETTINGS, FeatureStore, FeatureWriter, StoreLock
from .fingerprints import target_fingerprints
from .layout import StoreLayout, conversations_of


logger = logging.getLogger(__name__)

_SPARE_BYTES = 2**26  # left free on the disk
# the settings that features depend on, as errors name them
_SETTINGS = {
    "target_config": "a `target` of configuration",
    "target_dtype": "`target_dtype`",
    "target_weights": "a `target` with weights of fingerprint",
    "tokenizer": "a tokenizer of fingerprint",
    "chat_template": "a chat template of fingerprint",
    "processor": "a processor (of data with media) of fingerprint",
    "max_length": "`max_length`",
    "tap_ids": "`tap_ids`",
    "dtype": "`store_dtype`",
    "hidden": "hidden size",
}


class FeatureCache(TrainerCallback):
    """The features of one run's data in a store; [`EagleTrainer`] takes it as `feature_cache`.

    Args:
        store ([`FeatureStore`]): the opened store.
        target ([`FrozenTarget`]): the target of these features.
        writer ([`FeatureWriter`], *optional*): stores missing features; without it, a missing feature is an error.

    Example:
        >>> cache = open_cache(folder, target, tokenizer, [chats], tap_ids=draft.config.tap_ids, max_length=2048)
        >>> trainer = EagleTrainer(draft, args, target, train_dataset=chats, feature_cache=cache)
    """

    def __init__(self, store: FeatureStore, target: FrozenTarget, writer: FeatureWriter | None = None):
        self.store, self.writer, self.target = store, writer, target

    def collator(self, collator) -> StoredFeaturesCollator:
        """Wrap a collator: its batches stay the same, and carry their stored features."""
        return StoredFeaturesCollator(collator, self.store)

    def __call__(self, inputs: dict, run_target: Callable[[], TargetFeatures]) -> TargetFeatures:
        """Return a batch's stored features; if some are missing, run the target and store its features.

        Args:
            inputs: the collator's batch.
            run_target: runs the target on the batch.

        Raises:
            ValueError: if features are missing and there is no writer.
        """
        stored = inputs["stored"]
        features, device = stored.wait(), inputs["input_ids"].device
        if self._anywhere(features is None, device):
            seen = self.compute(stored.conversations, run_target)
            features = seen if features is None else features
        found = {
            name: decode({part: x.to(device, non_blocking=True) for part, x in parts.items()}, self.target.dtype)
            for name, parts in features.items()
            if name in ("taps", "last_hidden")
        }

        plain = {
            name: parts["values"].to(device, non_blocking=True) for name, parts in features.items() if name not in found
        }
        head_summary = None
        if "top" in plain:
            head_summary = HeadSummary(plain["top"].long()[..., 0], plain["log_partition"][..., 0])

        positions = plain["positions"].long().permute(2, 0, 1) if "positions" in plain else None
        return TargetFeatures(
            taps=found.get("taps"), last_hidden=found["last_hidden"], position_ids=positions, head_summary=head_summary
        )

    def _anywhere(self, missing: bool, device: torch.device) -> bool:
        """Whether any rank must run the target. Then all do so at once, since the target may be sharded over them."""
        if self.writer is None or PartialState().num_processes == 1:
            return missing
        return bool(reduce(torch.tensor(float(missing), device=device), reduction="sum"))

    def compute(self, conversations: list, run_target: Callable[[], TargetFeatures]) -> dict:
        """Run the target on a batch and store the missing features. Return features as the store will return them."""
        if self.writer is None:
            raise ValueError(f"`feature_store` {self.store.folder} lacks a conversation of this batch.")

        features = self.encoded(run_target(), conversations)
        for row, start, conversation in conversations:
            place = slice(start, start + len(conversation.input_ids))
            own = {name: {part: x[row, place] for part, x in parts.items()} for name, parts in features.items()}
            self.writer.add(conversation, own)
        return features

    def encoded(self, seen: TargetFeatures, conversations: list) -> dict:
        """Return the target's features of a batch, encoded for the store, on the batch's grid. Call on all ranks."""
        layout = self.store.layout
        features = {"last_hidden": encode(seen.last_hidden, layout.dtype, layout.hidden)}
        if layout.taps:
            features["taps"] = encode(seen.taps, layout.dtype, layout.hidden)
            features |= self._head_summary(seen.last_hidden, conversations)
        if layout.axes:
            features["positions"] = {"values": _positions(seen, conversations)}
        return features

    def _head_summary(self, last_hidden: torch.Tensor, conversations: list) -> dict:
        """Return the whole head's results at the positions that the store keeps, `(batch, length, 1)`, else zeros."""
        shape = last_hidden.shape[:2]
        indices = [row * shape[1] + start + self.store.layout.places(c) for row, start, c in conversations]
        indices = torch.from_numpy(np.concatenate(indices)).to(last_hidden.device)
        head_summary = self.target.head_summary(last_hidden.flatten(0, 1)[indices])

        def on_grid(x: torch.Tensor) -> dict:
            return {"values": x.new_zeros(shape.numel()).index_copy_(0, indices, x).view(*shape, 1)}

        return {"top": on_grid(head_summary.top.int()), "log_partition": on_grid(head_summary.log_partition)}

    def sync(self) -> None:
        """Write waiting conversations, and read those that other ranks wrote. Call it on all ranks at once."""
        if self.writer is None:
            return
        self.writer.flush()
        state = PartialState()
        state.wait_for_everyone()
        self.store.refresh()
        if state.is_main_process:
            self.store.write_index()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.sync()

    def on_evaluate(self, args, state, control, **kwargs):
        self.sync()

    def on_train_end(self, args, state, control, **kwargs):
        self.sync()

    def on_save(self, args, state, control, **kwargs):
        if self.writer is not None:
            self.writer.flush()  # a resumed run skips the batches before the checkpoint


def _positions(seen: TargetFeatures, conversations: list) -> torch.Tensor:
    """Return positions of a batch's tokens, `(batch, length, 3)`: the target's, or counted if it counts tokens."""
    if seen.position_ids is not None:
        return seen.position_ids.permute(1, 2, 0).int()
    positions = seen.last_hidden.new_zeros(*seen.last_hidden.shape[:2], 3, dtype=torch.int32)
    for row, start, conversation in conversations:
        size = len(conversation.input_ids)
        positions[row, start : start + size] = torch.arange(size, dtype=torch.int32)[:, None].to(positions.device)
    return positions


def open_cache(
    folder: str | Path,
    target: FrozenTarget,
    tokenizer: PreTrainedTokenizerBase,
    datasets: list[Dataset],
    *,
    tap_ids: list[int] | None,
    max_length: int,
    dtype: str = "bfloat16",
    write: bool = False,
    processor: ProcessorMixin | None = None,
) -> FeatureCache:
    """Open a run's store, check it against the run, and log how much disk space it will take.

    Args:
        folder: the store's folder. All ranks must see the same folder.
        target: the target with all of its layers, on any device.
        tokenizer: the target's tokenizer.
        datasets: the training and evaluation data, as the trainer takes them.
        tap_ids: the draft's taps, `None` for EAGLE-1.
        max_length: `max_length` of the data.
        dtype: `"bfloat16"`, `"float32"` or `"float8"`.
        write: make the store if there is none, and add missing features.
        processor: the processor that makes the pixels of data with media.

    Raises:
        ValueError: if the store was made with different settings, lacks features, is being written by another run, or
            does not fit on the disk; or if data with media come without their processor.
    """
    shows = any("media" in data.column_names for data in datasets)
    if shows and processor is None:
        raise ValueError("The data hold images or videos: pass the `processor` that their features depend on.")
    if any("media" in names and "media_fingerprint" not in names for names in (d.column_names for d in datasets)):
        raise ValueError("The data have `media` without `media_fingerprint`: make them with `build_vision_dataset`.")

    settings = {
        **{f"target_{name}": value for name, value in target_fingerprints(target).items()},
        "target_dtype": str(target.dtype).removeprefix("torch."),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16],
        "processor": processor_fingerprint(processor) if shows else None,
        "max_length": max_length,
        "tap_ids": tap_ids,
    }

    axes = 3 if shows and tap_ids and has_mrope(target.config) else 0
    layout, state, lock = StoreLayout(len(tap_ids or ()), target.hidden_size, dtype, axes), PartialState(), None
    with state.main_process_first():
        if write and state.is_main_process:
            lock = StoreLock(folder)
            if not (Path(folder) / SETTINGS).is_file():
                FeatureStore.create(folder, layout, settings)
        store = FeatureStore(folder)

    state.wait_for_everyone()  # or a fast rank may write before a slow one lists the missing conversations
    _check(store, {**settings, "dtype": dtype, "hidden": target.hidden_size})
    _check_space(store, datasets, write)
    cache = FeatureCache(store, target, FeatureWriter(store) if write else None)
    cache.lock = lock  # as long as the cache lives
    return cache


def _check(store: FeatureStore, wanted: dict) -> None:
    found = {**store.settings, "dtype": store.layout.dtype, "hidden": store.layout.hidden}
    for name, words in _SETTINGS.items():
        if found.get(name) != wanted[name]:
            raise ValueError(
                f"`feature_store` {store.folder} was made with {words} {found.get(name)}, this run has {wanted[name]}: "
                "use the same, or a different folder."
            )


def _check_space(store: FeatureStore, datasets: list[Dataset], write: bool) -> None:
    """Log the store's size; raise a `ValueError` if it lacks features and `write` is off, or does not fit the disk."""
    conversations = {c.key: c for data in datasets for _, c in conversations_of(data)}.values()
    layouts = {dtype: replace(store.layout, dtype=dtype) for dtype in (store.layout.dtype, "float8")}
    needed = sum(map(store.layout.bytes_of, conversations))
    missing = [c for c in conversations if c not in store]
    more, smaller = (sum(map(layout.bytes_of, missing)) for layout in (store.layout, layouts["float8"]))
    free, tokens = shutil.disk_usage(store.folder).free, sum(len(c.input_ids) for c in conversations)
    logger.info(
        "Features of %d different conversations, %d tokens: %.0f bytes per token, %.2f GiB in %s, %.2f of them to be "
        "written (%.1f GiB are free there).",
        *(len(conversations), tokens, needed / tokens, needed / 2**30, store.folder, more / 2**30, free / 2**30),
    )

    if missing and not write:
        raise ValueError(
            f"`feature_store` {store.folder} lacks {len(missing)} of the run's {len(conversations)} different "
            "conversations, or has them with different tokens or a different loss mask: add them with "
            "scripts/cache_features.py and this run's arguments, or train with `--cache_mode first_epoch`."
        )

    if more + _SPARE_BYTES * bool(missing) > free:
        raise ValueError(
            f"`feature_store` {store.folder} needs another {more / 2**30:.2f} GiB but only {free / 2**30:.2f} GiB are "
            f"free there: name a folder on another disk, or use `--store_dtype float8` ({smaller / 2**30:.2f} GiB)."
        )


def fill(
    cache: FeatureCache, target: FrozenTarget, datasets: list[Dataset], collator: Callable, batch_size: int
) -> int:
    """Store all missing features, on all ranks together.

    A batch has `batch_size` consecutive rows of its data set, whatever is stored already. So an interruption changes no
    feature, and training on the same batches computes the same features.

    Returns:
        The number of tokens that this rank passed to the target.
    """
    state, collate = PartialState(), cache.collator(collator)
    batches = [batch for data in datasets for batch in _incomplete(cache.store, data, batch_size)]
    tokens, rounds = 0, -(-len(batches) // state.num_processes)

    def made() -> Iterator[tuple[int, dict]]:
        for n in range(rounds):
            place = n * state.num_processes + state.process_index
            data, rows = batches[min(place, len(batches) - 1)]
            yield place, read_batch(collate([data[row] for row in rows]), target.vocab_size)

    shown = {"total": rounds, "desc": "features", "disable": not state.is_local_main_process}
    for place, batch in tqdm(_asked_ahead(made(), target), **shown):
        documents = documents_of(batch)
        asked = {name: x for name, x in batch.items() if name not in ("stored", "loss_mask", "documents")}
        asked |= told_to_target(batch, documents, any_packed(documents))  # as in training
        asked = {name: x.to(target.device) for name, x in asked.items()}

        if place < len(batches):
            cache.compute(batch["stored"].conversations, lambda: target(**asked))  # noqa: B023
            tokens += int(batch["attention_mask"].sum())
        else:  # other ranks still need this one, since the target may be spread over all
            cache.encoded(target(**asked), batch["stored"].conversations)
    cache.sync()
    return tokens


def _asked_ahead(batches: Iterator[tuple[int, dict]], target: FrozenTarget) -> Iterator[tuple[int, dict]]:
    """The same batches. A target in a server is asked for the next two while one is stored."""
    if target.ask_ahead is None:
        yield from batches
        return

    waiting: deque[tuple[int, dict]] = deque()
    for place, batch in batches:
        target.ask_ahead(batch["input_ids"], documents_of(batch))
        waiting.append((place, batch))
        if len(waiting) > 2:
            yield waiting.popleft()
    yield from waiting


def _incomplete(store: FeatureStore, dataset: Dataset, batch_size: int) -> list[tuple[Dataset, list[int]]]:
    """Return the batches of a data set that are not completely stored."""
    starts = {
        row // batch_size * batch_size for row, conversation in conversations_of(dataset) if conversation not in store
    }
    return [(dataset, list(range(i, min(i + batch_size, len(dataset))))) for i in sorted(starts)]
