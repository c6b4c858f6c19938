"""A feature store gives back what was put in, whole rows only, whatever happened to its writers."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from store_worker import contents, fill_store, rows_in_shards, tiny_target
from tiny import random_chats

from hf_eagle.store.feature_store import INDEX, FeatureStore, StoreLock
from hf_eagle.store.layout import conversations_of


WORKER = Path(__file__).parents[1] / "store_worker.py"
CHATS = random_chats(20, seed=2)
DATA = Dataset.from_list([*CHATS, *CHATS[:5]])  # five come twice


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def folder(target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "features"
    fill_store(folder, DATA, target)
    return folder


def test_features_are_the_targets_where_they_are_needed_and_zero_elsewhere(folder, target):
    """transformers' own forward of each conversation by itself is the reference."""
    store = FeatureStore(folder)
    assert len(store) == rows_in_shards(folder) == 20 and store.settings == {"made": "by a test"}
    for row, conversation in list(conversations_of(DATA))[:20]:
        ids = torch.tensor([CHATS[row]["input_ids"]])
        with torch.no_grad():
            seen = target.model(ids, output_hidden_states=True)
        states, logits = seen.hidden_states, seen.logits[0]
        wanted = {
            "taps": torch.cat([states[i] for i in (2, 4, 5)], -1)[0],
            "last_hidden": states[-1][0],
            "top": logits.argmax(-1, keepdim=True).int(),
            "log_partition": logits.logsumexp(-1, keepdim=True),
        }
        shape = (2, ids.shape[1] + 3)  # in the second row of a batch, two places from its left
        features = store.gather([(1, 2, conversation)], shape)
        assert set(features) == set(wanted)
        for name, parts in features.items():
            grid = wanted[name].new_zeros(*shape, wanted[name].shape[1])
            places = torch.arange(conversation.kept) if name == "taps" else torch.from_numpy(conversation.judged)
            grid[1, 2 + places] = wanted[name][places]
            torch.testing.assert_close(parts["values"], grid, rtol=1e-4, atol=1e-5)
            assert bool((parts["values"] == 0).eq(grid == 0).all())


def test_the_index_says_what_the_shards_say(folder, tmp_path):
    listed = contents(FeatureStore(folder), DATA)
    index = (folder / INDEX).read_bytes()
    (folder / INDEX).unlink()
    read = contents(FeatureStore(folder), DATA)
    (folder / INDEX).write_bytes(index)
    assert listed.keys() == read.keys()
    for key, features in listed.items():
        assert all(torch.equal(x, read[key][name]) for name, x in features.items())
    copied = pickle.loads(pickle.dumps(FeatureStore(folder)))  # as a worker of a data loader gets it
    assert contents(copied, DATA).keys() == listed.keys()


def test_a_shard_that_is_gone_or_torn_is_computed_again(target, tmp_path):
    folder = tmp_path / "features"
    fill_store(folder, DATA, target)
    before = contents(FeatureStore(folder), DATA)
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].unlink()
    assert len(FeatureStore(folder)) < 20
    os.truncate(shards[1], shards[1].stat().st_size - 1)
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match=f"shard {shards[1]} cannot be read .*: delete it, and its conversations"):
        FeatureStore(folder)
    shards[1].unlink()
    fill_store(folder, DATA, target)
    after = contents(FeatureStore(folder), DATA)
    assert rows_in_shards(folder) == 20
    for key, features in before.items():
        assert all(torch.equal(x, after[key][name]) for name, x in features.items())


def test_other_folders_and_other_writers_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="is not a feature store, it has no store.json"):
        FeatureStore(tmp_path)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds something other than a feature store"):
        StoreLock(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    lock = StoreLock(folder)
    with pytest.raises(ValueError, match="is being written by another run"):
        StoreLock(folder)
    lock.release()
    StoreLock(folder).release()


def test_a_full_disk_is_one_sentence_and_nothing_is_torn(tmp_path, target):
    """A limit on the size of files fails writes as a full disk does."""
    folder = tmp_path / "features"
    fill_store(folder, DATA.select(range(6)), target)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="`feature_store`: .* could not be written .* make room and run again"):
            fill_store(folder, DATA, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(FeatureStore(folder)) == rows_in_shards(folder) == 6 and not list(folder.glob(".*-part"))
    fill_store(folder, DATA, target)
    assert len(FeatureStore(folder)) == rows_in_shards(folder) == 20


def test_sigkill_loses_doubles_and_tears_nothing(tmp_path):
    """Twenty kills at random moments; the worker compares every row with an uninterrupted run's after each."""
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path), "20", "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert seen["kills"] == 20 and len(set(seen["rows"])) > 5, seen  # at many different moments
