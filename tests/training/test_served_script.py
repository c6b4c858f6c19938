"""`scripts/train_eagle.py` and `scripts/cache_features.py` with a served target, as a user starts them."""

import json
import os
from pathlib import Path

import pytest
import yaml
from feature_server import FeatureServer
from tiny_files import tiny_recipe, write_chats, write_tiny_target
from transformers import AutoModelForCausalLM
from warm_python import warm_python

from hf_eagle.training.run_arguments import RunArguments


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_tiny_target(folder / "target")
    write_chats(folder / "chats.jsonl")
    (folder / "features").mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(folder) | {"per_device_train_batch_size": 2}))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "target")


def run(script, folder, *words, ranks=1, expect=0):
    command = [str(ROOT / "scripts" / script), "--config", str(folder / "recipe.yaml"), *map(str, words)]
    done = warm_python().run(*command, cwd=folder, ranks=ranks)
    assert done.returncode == expect, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def by_server(folder, server):
    return ["--target_url", server.url, "--features_folder", folder / "features"]


def curve(out):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_by_a_server_is_the_run_beside_the_target(folder, model, ranks):
    beside, served = folder / f"beside-{ranks}", folder / f"served-{ranks}"
    run("train_eagle.py", folder, "--output_dir", beside, ranks=ranks)
    with FeatureServer(model, folder / "features", name=str(folder / "target"), longest=129) as server:
        printed = run("train_eagle.py", folder, "--output_dir", served, *by_server(folder, server), ranks=ranks)
    assert f"The target's features come from {server.url}." in printed
    assert curve(served) == pytest.approx(curve(beside), rel=1e-4) and len(curve(served)) == 6
    assert not any((folder / "features").iterdir())
    assert server.url not in (served / "README.md").read_text()


def test_a_run_goes_on_behind_a_server_that_ended(folder, model):
    out, options = folder / "goes-on", {"name": str(folder / "target"), "longest": 129}

    def fault(number):
        return (400, "gone") if number > 16 + 2 * 4 else None

    with FeatureServer(model, folder / "features", fault=fault, **options) as server:
        printed = run("train_eagle.py", folder, "--output_dir", out, *by_server(folder, server), expect=1)
    assert "answers POST /v1/completions with 400" in printed and "Traceback" not in printed

    with FeatureServer(model, folder / "features", **options) as server:
        resumed = ["--resume_from_checkpoint", "last", *by_server(folder, server)]
        run("train_eagle.py", folder, "--output_dir", out, *resumed)
        whole = folder / "whole"
        run("train_eagle.py", folder, "--output_dir", whole, *by_server(folder, server))
    assert curve(out) == pytest.approx(curve(whole), rel=1e-5)
    assert not any((folder / "features").iterdir())


def test_a_store_is_filled_by_a_server_and_trained_from_without_one(folder, model):
    store = ["--feature_store", folder / "store", "--store_dtype", "float32"]
    with FeatureServer(model, folder / "features", name=str(folder / "target"), longest=129) as server:
        served = by_server(folder, server)
        run("cache_features.py", folder, *store, *served)
        run("train_eagle.py", folder, "--output_dir", folder / "live", *served)
    # nothing answers there any more
    run("train_eagle.py", folder, "--output_dir", folder / "from-store", *store, *served)
    assert curve(folder / "from-store") == pytest.approx(curve(folder / "live"), rel=1e-4)


def test_a_server_that_does_not_fit_is_refused_before_the_data_are_read(folder, model, tmp_path):
    """No tokenising comes first, which may take hours."""
    for told, options in {
        "serves another, not `target` ": {"name": "another"},
        "start it with `--max-model-len 129`.": {"name": str(folder / "target"), "longest": 128},
    }.items():
        with FeatureServer(model, folder / "features", **options) as server:
            words = ["--output_dir", tmp_path / "out", *by_server(folder, server)]
            printed = run("train_eagle.py", folder, *words, expect=1)
        assert told in printed and "Traceback" not in printed and "conversations" not in printed
    printed = run("train_eagle.py", folder, *words, expect=1)
    assert "does not answer" in printed and "hf-eagle serve-features" in printed


def test_prompts_cannot_be_decoded_beside_a_server(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("red green\n")
    words = ["--config", str(folder / "recipe.yaml"), "--output_dir", str(tmp_path / "out")]
    words += ["--target_url", "http://localhost:1", "--features_folder", os.fspath(tmp_path)]
    words += ["--acceptance_prompts", str(tmp_path / "prompts.txt")]
    with pytest.raises(ValueError, match="`acceptance_prompts` are decoded with the whole target, .*`target_url`"):
        RunArguments.parse(words).refuse_before_loading()
