"""Fill a store with a tiny target's features and kill it again and again: `python store_worker.py FOLDER KILLS SEED`.

The work runs in children of one process, which has loaded torch: a kill costs milliseconds. After each of them
everything that is in the store is compared with an uninterrupted one; a line of JSON says what was seen.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from threading import RLock

import torch


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from datasets import Dataset, disable_progress_bars  # noqa: E402
from safetensors import safe_open  # noqa: E402
from tiny import random_chats, tiny_llama  # noqa: E402
from tqdm import tqdm  # noqa: E402

from hf_eagle.data.collators import EagleDataCollator  # noqa: E402
from hf_eagle.store.cache import FeatureCache, fill  # noqa: E402
from hf_eagle.store.feature_store import SETTINGS, FeatureStore, FeatureWriter, StoreLock  # noqa: E402
from hf_eagle.store.layout import StoreLayout, conversations_of  # noqa: E402
from hf_eagle.targets.target import FrozenTarget  # noqa: E402


LAYOUT = StoreLayout(3, 32, "float32")


def tiny_target() -> FrozenTarget:
    return FrozenTarget(tiny_llama(), tap_ids=[2, 4, 5])


def fill_store(folder: Path, data: Dataset, target: FrozenTarget, shard_bytes: int = 2**15) -> FeatureStore:
    """Whatever is missing, three conversations a batch and a few a shard."""
    lock = StoreLock(folder)
    if not (folder / SETTINGS).is_file():
        FeatureStore.create(folder, LAYOUT, {"made": "by a test"})
    store = FeatureStore(folder)
    cache = FeatureCache(store, target, FeatureWriter(store, shard_bytes))
    fill(cache, target, [data], EagleDataCollator(0), 3)
    lock.release()
    return store


def contents(store: FeatureStore, data: Dataset) -> dict[bytes, dict[str, torch.Tensor]]:
    """What the store has for each conversation of the data."""
    found = {}
    for _, conversation in conversations_of(data):
        if conversation in store:
            features = store.gather([(0, 0, conversation)], (1, len(conversation.input_ids)))
            found[conversation.key] = {name: parts["values"] for name, parts in features.items()}
    return found


def rows_in_shards(folder: Path) -> int:
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += len(file.get_tensor("lengths"))
    return count


def bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # written under another name, which it loses meanwhile
            total += path.stat().st_size
    return total


def kill_when_grown(child: int, folder: Path, growth: float, seconds: float) -> int:
    """Kill a child so long after its folder has grown by so many bytes; how it ended. A time alone would be a busy
    machine's first moments again and again."""
    before = bytes_in(folder)
    while bytes_in(folder) < before + growth and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, kills: int, seed: int) -> None:
    disable_progress_bars()
    data, target = Dataset.from_list(random_chats(60, seed=5)), tiny_target()
    begun = time.perf_counter()
    expected = contents(fill_store(folder / "whole", data, target), data)
    whole_run, whole_store = time.perf_counter() - begun, bytes_in(folder / "whole")

    rng, done, stores, seen = random.Random(seed), 0, 0, []
    while done < kills:
        place, kept, stores = folder / f"killed-{stores}", 0, stores + 1
        while kept < len(data):
            child = os.fork()
            if child == 0:
                try:
                    fill_store(place, data, target)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            ended = kill_when_grown(child, place, rng.uniform(0, whole_store / 4), rng.uniform(0, whole_run / 10))
            assert ended in (0, -signal.SIGKILL), f"the writer ended with {ended}"
            done += ended != 0
            if not (place / SETTINGS).is_file():
                continue
            store = FeatureStore(place)
            found = contents(store, data)
            assert len(found) == len(store) == rows_in_shards(place), "doubled or foreign rows"
            assert len(found) >= kept, "lost rows"
            for key, features in found.items():
                assert all(torch.equal(x, expected[key][name]) for name, x in features.items()), "torn row"
            kept = len(found)
            seen.append(kept)
            if done >= kills:
                break
    fill_store(place, data, target)
    assert contents(FeatureStore(place), data).keys() == expected.keys() and not list(place.glob("*-part"))
    print(json.dumps({"kills": done, "stores": stores, "rows": seen}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    tqdm.set_lock(RLock())  # the usual one is shared with children, who may be killed holding it
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
