"""Features of conversations, computed once and read for many epochs: safetensors shards under an Arrow index.

A conversation is found by a hash of its tokens, loss mask and media. So order, split and packing of a data set do not
matter, and a conversation that occurs twice is stored once. A shard is written under a temporary name and renamed once
it is on the disk, so a kill leaves complete shards only. Each shard lists its own conversations; `index.arrow` merely
saves opening all of them. Nothing here depends on models.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..door.inputs import check_file, naming
from ..door.json_files import read_json
from ..door.locks import is_free
from ..door.outputs import check_output_folder
from ..door.reading import reading
from ..door.writing import part_of, write_atomically
from .layout import Conversation, StoreLayout


SETTINGS, INDEX, LOCK = "store.json", "index.arrow", ".lock"
_FORMAT = 2
_SHARD_BYTES = 2**28
_INDEX = pa.schema(
    [("key", pa.binary(16)), ("shard", pa.string()), *((name, pa.int64()) for name in ("taps", "kept", "hidden"))]
)

_SETTINGS_FIELDS = {"format": int, "layout": {"taps": int, "hidden": int, "dtype": str, "axes?": int}}


class FeatureStore:
    """A folder of features, read through the memory map.

    Args:
        folder (`str` or `Path`): the store.

    `settings` holds the settings that the features depend on, as given to `create`.

    Raises:
        ValueError: if the folder is not a store, or one of its shards cannot be read.

    Example:
        >>> store = FeatureStore(folder)
        >>> store.gather([(0, 0, conversation)], shape=(1, 512))["taps"]["values"].shape  # (1, 512, taps * hidden)
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        check_store(folder)
        with naming("feature_store"):
            found = read_json(self.folder / SETTINGS, _SETTINGS_FIELDS, "make a new store")
        if found.pop("format") != _FORMAT:
            raise ValueError(f"`feature_store` {folder} has a different format from this program's: make a new one.")
        with reading("feature_store", self.folder / SETTINGS):
            self.layout = StoreLayout(**found.pop("layout"))

        self.settings = found
        self._index: dict[bytes, tuple[str, int, int, int]] = {}
        self._listed: set[str] = set()  # shards in the index
        self._shards: dict[str, dict[str, torch.Tensor]] = {}
        self.refresh()

    @classmethod
    def create(cls, folder: str | Path, layout: StoreLayout, settings: dict) -> "FeatureStore":
        """Make an empty store in a folder whose [`StoreLock`] you hold."""
        folder = Path(folder)
        content = {"format": _FORMAT, "layout": asdict(layout), **settings}
        write_atomically(folder / SETTINGS, [json.dumps(content, indent=2)])
        return cls(folder)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_shards": {}}  # a DataLoader's worker maps the files itself

    def __contains__(self, conversation: Conversation) -> bool:
        return conversation.key in self._index

    def __len__(self) -> int:
        return len(self._index)

    def refresh(self) -> None:
        """Add the shards that any process has finished since the last refresh."""
        names = {p.name for p in self.folder.glob("features-*.safetensors")} - self._listed
        if names and not self._listed and (self.folder / INDEX).is_file():
            with reading("feature_store", self.folder / INDEX), pa.memory_map(str(self.folder / INDEX)) as source:
                columns = pa.ipc.open_file(source).read_all().to_pydict()
            rows = zip(*columns.values(), strict=True)
            self._index = {key: tuple(place) for key, *place in rows if place[0] in names}
            self._listed = {place[0] for place in self._index.values()}

        # shards that are newer than the index list themselves
        for name in sorted(names - self._listed):
            self._list(name)

    def _list(self, name: str) -> None:
        shard = self._open(name)
        ids, masks = (shard[column].split(shard["lengths"].tolist()) for column in ("input_ids", "loss_mask"))
        media = [""] * len(ids)
        if "media" in shard:
            media = [bytes(x).hex() if any(x) else "" for x in shard["media"].tolist()]

        taps = hidden = 0
        for i, m, shown in zip(ids, masks, media, strict=True):
            conversation = Conversation(i.numpy(), m.numpy(), shown)
            # another rank's shard may hold the same conversation: the first one is read
            self._index.setdefault(conversation.key, (name, taps, conversation.kept, hidden))
            taps += conversation.kept if self.layout.taps else 0
            hidden += len(self.layout.places(conversation))

        self._listed.add(name)

    def _open(self, name: str) -> dict[str, torch.Tensor]:
        """Return a shard's tensors, whose data stay in the file until they are used."""
        if name not in self._shards:
            try:
                with safe_open(self.folder / name, "pt") as file:
                    self._shards[name] = {column: file.get_tensor(column) for column in file.keys()}
            except (OSError, SafetensorError) as problem:
                raise ValueError(
                    f"`feature_store`: the shard {self.folder / name} cannot be read ({problem}): delete it, and its "
                    "conversations will be computed again."
                ) from problem
        return self._shards[name]

    def write_index(self) -> None:
        """List all conversations in one file, so that opening the store opens no shard."""
        columns = list(zip(*((key, *place) for key, place in self._index.items()), strict=True)) or [[]] * len(_INDEX)
        part = self.folder / _part(INDEX)
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, _INDEX) as writer:
            writer.write_table(pa.table([pa.array(c, f.type) for c, f in zip(columns, _INDEX, strict=True)], _INDEX))
        _to_disk(part, self.folder / INDEX)

    def gather(self, documents: list[tuple[int, int, Conversation]], shape: tuple[int, int]) -> dict[str, dict]:
        """Return the features of a batch, zeros where none are stored.

        Args:
            documents: row in the batch, first position in the row, and the conversation that begins there.
            shape: `(batch, length)`.

        Returns:
            The results of `encode`, on the batch's grid: `{"last_hidden": {"values": (batch, length, hidden)}}`,
            and, if stored, `"taps"`, `"positions"` `(batch, length, axes)`, and `"top"` and `"log_partition"` `(batch,
            length, 1)`.
        """
        grids: dict[str, torch.Tensor] = {}
        for row, start, conversation in documents:
            name, first_tap, kept, first = self._index[conversation.key]
            shard = self._open(name)
            places = self.layout.places(conversation)
            for column in (c for c in shard if "." in c):
                stored = shard[column]
                if column not in grids:
                    grids[column] = stored.new_zeros(*shape, stored.shape[1])
                if column.startswith(("taps", "positions")):
                    grids[column][row, start : start + kept] = stored[first_tap : first_tap + kept]
                else:
                    grids[column][row, start + torch.from_numpy(places)] = stored[first : first + len(places)]

        features: dict[str, dict] = {}
        for column, grid in grids.items():
            name, _, part = column.partition(".")
            features.setdefault(name, {})[part] = grid
        return features


class FeatureWriter:
    """Add conversations to a store. A conversation is on disk once its shard is full, or after `flush`.

    Args:
        store ([`FeatureStore`]): the store. Conversations that it has already are not written again.
        shard_bytes (`int`): size of a shard.
    """

    def __init__(self, store: FeatureStore, shard_bytes: int = _SHARD_BYTES):
        self.store, self.shard_bytes = store, shard_bytes
        self._rows: dict[bytes, tuple[Conversation, dict[str, torch.Tensor]]] = {}
        self._bytes = 0

    def __contains__(self, conversation: Conversation) -> bool:
        return conversation.key in self._rows or conversation in self.store

    def add(self, conversation: Conversation, features: dict[str, dict[str, torch.Tensor]]) -> None:
        """Keep the part of the features that the layout stores.

        Args:
            features: features of all tokens as `gather` returns them, `(length, ...)` each.
        """
        if conversation in self:
            return

        layout = self.store.layout
        kept = slice(conversation.kept)
        judged = torch.from_numpy(layout.places(conversation))
        places = {name: kept if name in ("taps", "positions") else judged for name in features}

        self._rows[conversation.key] = (
            conversation,
            {
                # a copy: a waiting slice must not keep its whole batch in memory
                f"{name}.{part}": x[places[name]].detach().to("cpu", copy=True)
                for name, parts in features.items()
                for part, x in parts.items()
            },
        )

        self._bytes += layout.bytes_of(conversation)
        if self._bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the conversations added since the last shard as a new shard, and wait until it is on the disk."""
        if not self._rows:
            return

        conversations, features = zip(*self._rows.values(), strict=True)
        tensors = {name: torch.cat([x[name] for x in features]) for name in features[0]}
        for name in ("input_ids", "loss_mask"):
            tensors[name] = torch.from_numpy(np.concatenate([getattr(c, name) for c in conversations]))
        if any(c.media for c in conversations):
            shown = [list(bytes.fromhex(c.media or "00" * 16)) for c in conversations]
            tensors["media"] = torch.tensor(shown, dtype=torch.uint8)

        tensors["lengths"] = torch.tensor([len(c.input_ids) for c in conversations])
        name = f"features-{hashlib.blake2b(b''.join(self._rows), digest_size=8).hexdigest()}.safetensors"
        folder = self.store.folder
        part = folder / _part(f"{name}-{os.getpid()}")

        try:
            # when killed, safetensors' own `save_file` leaves temporary files of unknown names
            part.write_bytes(save(tensors))
            _to_disk(part, folder / name)
        except OSError as problem:
            part.unlink(missing_ok=True)
            raise OSError(
                f"`feature_store`: {folder} could not be written ({problem}); "
                f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB are free there. Finished shards are complete: make "
                "room and run again."
            ) from problem
        self._rows, self._bytes = {}, 0
        self.store.refresh()


class StoreLock:
    """Let only one run write into a folder. The lock is released when the run ends, even by a kill.

    Raises:
        ValueError: if another run has the lock, or the folder contains something other than a store.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        check_store_to_write(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / LOCK).open("w")
        if not is_free(self._file):
            self._file.close()
            raise ValueError(
                f"`feature_store` {folder} is being written by another run: wait for it, or name a different folder."
            )

        for part in folder.glob(_part("features-*")):
            part.unlink()  # left by a killed run

    def release(self) -> None:
        self._file.close()


def check_store(folder: str | Path) -> None:
    """Raise a `ValueError` unless the folder is a feature store."""
    if not os.path.isfile(Path(folder) / SETTINGS):
        raise ValueError(
            f"`feature_store` {folder} is not a feature store, it has no {SETTINGS}: make one with "
            "scripts/cache_features.py."
        )

    check_file("feature_store", Path(folder) / SETTINGS)


def check_store_to_write(folder: str | Path, reads: dict | None = None) -> None:
    """Raise a `ValueError` unless a feature store can be made or extended here; `reads`: see `check_output_folder`."""
    check_output_folder("feature_store", folder, reads, overwrite=True, ours=lambda folder: True)
    folder = Path(folder)
    unfinished = (LOCK, part_of(folder / SETTINGS).name)
    if folder.is_dir() and not (folder / SETTINGS).is_file():
        if any(path.name not in unfinished for path in folder.iterdir()):
            raise ValueError(
                f"`feature_store` {folder} holds something other than a feature store: name a different folder."
            )


def _part(name: str) -> str:
    return f".{name}-part"


def _to_disk(part: Path, path: Path) -> None:
    """Rename a finished file once it is on the disk."""
    _sync(part)
    os.replace(part, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
