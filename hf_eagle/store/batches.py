"""Batches with their stored features, which are read during the previous training step."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch.utils.data import get_worker_info

from ..data.collators import EagleDataCollator
from .feature_store import FeatureStore
from .layout import Conversation, conversations_in


@dataclass
class StoredBatch:
    """The part of a store that belongs to a batch.

    Attributes:
        conversations: row in the batch, first position in the row, conversation.
        features: the result of `FeatureStore.gather`, or a future of it; `None` if some features are not stored.
    """

    conversations: list[tuple[int, int, Conversation]]
    features: Future | dict | None

    def wait(self) -> dict | None:
        """Return the features, once they are read."""
        return self.features.result() if isinstance(self.features, Future) else self.features


class StoredFeaturesCollator:
    """A collator whose batches also hold `stored`, a [`StoredBatch`].

    The main process reads in a thread: its data loader is one batch ahead, so the disk is read during a step. A worker
    of a `DataLoader` is ahead anyway.

    Args:
        collator: makes batches of the rows.
        store ([`FeatureStore`]): the store of the features.
    """

    def __init__(self, collator, store: FeatureStore):
        self.collator, self.store = collator, store
        self._reader: ThreadPoolExecutor | None = None

    def __call__(self, rows: list[dict]) -> dict:
        shows = isinstance(self.collator, EagleDataCollator) and self.collator.processor is not None
        if not shows:
            batch, media = self.collator(rows), None
        else:  # stored features need no images or videos, so do not load any
            batch, media = self.collator.tokens_only(rows), [row.get("media_fingerprint") or "" for row in rows]

        conversations, features = conversations_in(batch, media), None
        complete = all(conversation in self.store for _, _, conversation in conversations)

        if shows and not complete:
            batch = self.collator(rows)

        if complete:
            arguments = (conversations, tuple(batch["input_ids"].shape))
            if get_worker_info() is None:
                self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="feature-store")
                features = self._reader.submit(self.store.gather, *arguments)
            else:
                features = self.store.gather(*arguments)

        return {**batch, "stored": StoredBatch(conversations, features)}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_reader": None}  # a thread pool cannot be pickled
