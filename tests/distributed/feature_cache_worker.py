"""Fill a store on two ranks, of which one is slow to open it; started by `test_feature_cache.py`.

    feature_cache_worker.py SPEC.json       {"out": DIR}

Leaves in `out`: the `store`, and of each rank `missing_RANK.json`, how many conversations it took for missing.
"""

import json
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState


torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from datasets import Dataset  # noqa: E402
from tiny import VOCAB, random_chats, tiny_llama  # noqa: E402
from tiny_tokenizer import word_tokenizer  # noqa: E402

from hf_eagle import FrozenTarget  # noqa: E402
from hf_eagle.data.collators import EagleDataCollator  # noqa: E402
from hf_eagle.store import cache as feature_cache  # noqa: E402
from hf_eagle.store.feature_store import FeatureStore  # noqa: E402
from hf_eagle.training.distributed import leave  # noqa: E402


class SlowlyOpened(FeatureStore):
    """Another rank has a while to write its first shard."""

    def __init__(self, folder):
        for _ in range(40):
            if not any(Path(folder).glob("*.safetensors")):
                time.sleep(0.05)
        super().__init__(folder)


def main():
    out = Path(json.loads(Path(sys.argv[1]).read_text())["out"])
    rank = PartialState(cpu=True).process_index
    target, data = FrozenTarget(tiny_llama(), tap_ids=[2, 4, 5]), Dataset.from_list(random_chats(8, seed=5))
    if rank == 1:
        feature_cache.FeatureStore = SlowlyOpened
    cache = feature_cache.open_cache(
        out / "store",
        target,
        word_tokenizer(VOCAB, 2),
        [data],
        tap_ids=target.tap_ids,
        max_length=64,
        dtype="float32",
        write=True,
    )
    (out / f"missing_{rank}.json").write_text(json.dumps(len(data) - len(cache.store)))
    feature_cache.fill(cache, target, [data], EagleDataCollator(0), 1)
    leave()


if __name__ == "__main__":
    main()
