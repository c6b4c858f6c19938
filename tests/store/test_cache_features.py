"""`scripts/cache_features.py` as a user starts it: the recipe of a training, on several ranks, then that training."""

import json
from pathlib import Path

import pytest
import yaml
from store_worker import rows_in_shards
from tiny_files import write_chats, write_tiny_target
from warm_python import warm_python

from hf_eagle.store.feature_store import FeatureStore


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("script")
    write_tiny_target(folder / "target")
    write_chats(folder / "chats.jsonl", 13)
    recipe = {
        "target": str(folder / "target"),
        "train_data": [str(folder / "chats.jsonl")],
        "eval_share": 0.2,
        "draft_vocab_size": 24,
        "ttt_steps": 2,
        "oov_rows": "renormalize",  # a random target rarely says one of 24 tokens
        "num_train_epochs": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_length": 128,
        "store_dtype": "float32",
        "feature_store": str(folder / "features"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    recipe = {name: x for name, x in recipe.items() if name not in ("store_dtype", "feature_store")}
    (folder / "live.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def run(script, folder, *args, ranks=1, expect=0, recipe="recipe.yaml"):
    done = warm_python().run(ROOT / "scripts" / script, "--config", folder / recipe, *args, cwd=folder, ranks=ranks)
    assert done.returncode == expect, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def curve(out):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return [*losses, json.loads((out / "eval_results.json").read_text())["eval_loss"]]


def test_two_ranks_fill_and_read_it(folder):
    """Filled beforehand or in the first epoch, by a target that is spread over them: one rank's live losses."""
    printed = run("cache_features.py", folder, "--target_sharding", "fsdp2", ranks=2)
    assert "bytes per token" in printed and "holds features of 13 conversations" in printed, printed[-3000:]
    assert len(FeatureStore(folder / "features")) == rows_in_shards(folder / "features") == 13
    assert len(list((folder / "features").glob("*.safetensors"))) == 2  # one a rank
    assert "holds features of 13" in run("cache_features.py", folder)
    assert rows_in_shards(folder / "features") == 13  # nothing was left to do

    order = ("--train_sampling_strategy", "sequential")
    run("train_eagle.py", folder, *order, "--output_dir", folder / "live", recipe="live.yaml")
    run("train_eagle.py", folder, *order, "--output_dir", folder / "stored")
    assert curve(folder / "stored") == curve(folder / "live")  # batch by batch what the store was made of

    shared = ("--per_device_train_batch_size", 1, "--cache_mode", "first_epoch", "--feature_store", folder / "first")
    shared += ("--target_sharding", "fsdp2")
    run("train_eagle.py", folder, *order, *shared, "--output_dir", folder / "ranks", ranks=2)
    # with the evaluation: a held-out chat counts once, also when ranks cannot share alike
    assert curve(folder / "ranks") == pytest.approx(curve(folder / "live"), rel=1e-5)
    assert len(FeatureStore(folder / "first")) == 13


@pytest.mark.parametrize(
    ("script", "args", "message"),
    [
        (
            "cache_features.py",
            [],
            "`feature_store` is not set: name the folder with `--feature_store DIR`.",
        ),
        ("cache_features.py", ["--feature_store", "."], "holds something other than a feature store"),
        ("train_eagle.py", ["--feature_store", "nowhere"], "`feature_store` nowhere is not a feature store"),
        (
            "train_eagle.py",
            ["--cache_mode", "first_epoch"],
            "`cache_mode` is first_epoch, but `feature_store` names no",
        ),
    ],
)
def test_bad_input_is_one_sentence(script, args, message, folder, tmp_path):
    expect = 2 if "--cache_mode" in args else 1
    printed = run(script, folder, *args, "--output_dir", tmp_path / "out", expect=expect, recipe="live.yaml")
    assert "error: " in printed.strip().splitlines()[-1] and message in printed, printed[-3000:]
    assert "Traceback" not in printed and not (tmp_path / "out").exists()
