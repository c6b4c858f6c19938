"""Killed and resumed training: the loss curve of an uninterrupted run, and never from a torn checkpoint."""

import json
import shutil

import pytest
from safetensors import safe_open
from workers import losses, run_worker

from hf_eagle.training.checkpoints import checkpoints, last_complete_checkpoint, resolve_resume, why_incomplete


ARGS = {
    "num_train_epochs": 3,  # 8 steps each, so that step 10 lies inside an epoch
    "per_device_train_batch_size": 2,
    "ttt_steps": 3,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "save_steps": 5,
    "save_total_limit": 2,
}
SPEC = {"records": 16, "tied": True, "args": ARGS}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    run_worker(out, **SPEC)
    return losses(out)


def assert_same_curve(out, uninterrupted):
    curve = losses(out)
    assert len(uninterrupted) == 24
    assert curve == pytest.approx(uninterrupted, rel=1e-6)


def test_killed_between_checkpoints(tmp_path, uninterrupted):
    run_worker(tmp_path, expect_kill=True, kill_before_step=13, **SPEC)
    assert last_complete_checkpoint(tmp_path / "run").name == "checkpoint-10"
    run_worker(tmp_path, resume="last", **SPEC)
    assert_same_curve(tmp_path, uninterrupted)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_killed_while_writing_a_checkpoint(file, tmp_path, uninterrupted):
    run_worker(tmp_path, expect_kill=True, kill_while_writing=["checkpoint-15", file], **SPEC)
    torn = tmp_path / "run" / "checkpoint-15"
    assert (torn / file).exists() and why_incomplete(torn)
    assert last_complete_checkpoint(tmp_path / "run").name == "checkpoint-10"
    with pytest.raises(ValueError, match=r"checkpoint-15 is not a complete checkpoint.*checkpoint-10"):
        resolve_resume(tmp_path / "run", str(torn))
    run_worker(tmp_path, resume="last", **SPEC)
    assert_same_curve(tmp_path, uninterrupted)
    left = checkpoints(tmp_path / "run")
    assert [p.name for p in left] == ["checkpoint-20", "checkpoint-24"]  # the torn one is gone, two are kept
    assert all(why_incomplete(p) is None for p in left)


def test_killed_while_writing_the_first_checkpoint(tmp_path, uninterrupted):
    run_worker(tmp_path, expect_kill=True, kill_while_writing=["checkpoint-5", "optimizer.pt"], **SPEC)
    assert last_complete_checkpoint(tmp_path / "run") is None
    run_worker(tmp_path, resume="last", **SPEC)
    assert_same_curve(tmp_path, uninterrupted)


def test_a_checkpoint_keeps_head_and_mapping(tmp_path):
    """A tied target with a shrunk vocabulary: the head keeps its (Vd, H) shape, the buffers are there."""
    run_worker(tmp_path, **{**SPEC, "args": {**ARGS, "max_steps": 5}})
    with safe_open(tmp_path / "run" / "checkpoint-5" / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    assert shapes["lm_head.weight"] == [40, 32]
    assert shapes["d2t"] == [40] and shapes["t2d"] == [96]
    assert "embed_tokens.weight" not in shapes
    config = json.loads((tmp_path / "run" / "checkpoint-5" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and "use_cache" not in config
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)


@pytest.mark.parametrize("damage", ["delete", "truncate", "manifest"])
def test_damaged_checkpoints_are_not_complete(damage, tmp_path):
    from hf_eagle.training.checkpoints import MANIFEST, write_manifest

    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * 100)
        write_manifest(folder)
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-10"
    file = tmp_path / "checkpoint-10" / "model.safetensors"
    if damage == "delete":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(b"x" * 50)
    else:
        (tmp_path / "checkpoint-10" / MANIFEST).unlink()
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-5"
    shutil.rmtree(tmp_path / "checkpoint-5")
    assert last_complete_checkpoint(tmp_path) is None
