"""Killed and resumed training: the loss curve of an uninterrupted run, and never from a torn checkpoint."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers.trainer_callback import TrainerState
from workers import losses, run_worker

from hf_eagle.training.checkpoints import (
    MANIFEST,
    checkpoints,
    last_complete_checkpoint,
    why_incomplete,
    write_manifest,
)
from hf_eagle.training.resuming import resolve_resume, states_begun_anew


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


FILES = {
    "model.safetensors": b"x" * 100,
    "optimizer.pt": b"x" * 50,
    "scheduler.pt": b"x" * 10,
    "rng_state.pth": b"x",
    "trainer_state.json": json.dumps({"global_step": 5, "log_history": []}).encode(),
}


def write_checkpoint(folder, without=()):
    """A checkpoint as a run finishes one, as far as its completeness goes."""
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        if name not in without:
            (folder / name).write_bytes(content)
    write_manifest(folder)
    return folder


@pytest.mark.parametrize("damage", ["delete", "truncate", "manifest"])
def test_damaged_checkpoints_are_not_complete(damage, tmp_path):
    for step in (5, 10):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
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


# ---- what "last" and a name stand for ----

NO_STATES = {"optimizer.pt", "scheduler.pt"}


@pytest.mark.parametrize("when", ["never there", "lost", "cut"])
@pytest.mark.parametrize("files", [["optimizer.pt"], ["scheduler.pt"], ["optimizer.pt", "scheduler.pt"]])
@pytest.mark.parametrize("named", [True, False])
def test_without_its_states_a_checkpoint_is_refused_unless_told(named, files, when, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-5", without=files if when == "never there" else ())
    for name in files if when != "never there" else ():
        (folder / name).unlink() if when == "lost" else (folder / name).write_bytes(b"x" * 3)
    asked = str(folder) if named else "last"
    with pytest.raises(
        ValueError, match=r"checkpoint-5 is not a complete checkpoint: .*`--ignore_missing_state`"
    ) as no:
        resolve_resume(tmp_path, asked)
    assert files[0] in str(no.value)
    assert resolve_resume(tmp_path, asked, ignore_missing_state=True) == folder
    anew = states_begun_anew(folder)
    assert all(name in anew for name in files) and "the optimizer's state and the learning rate schedule" in anew


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json"])
def test_without_weights_or_place_no_argument_helps(name, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-5")
    (folder / name).unlink()
    for ignore in (False, True):
        with pytest.raises(
            ValueError, match=rf"checkpoint-5 is not a complete checkpoint: {name} is missing"
        ) as refused:
            resolve_resume(tmp_path, "last", ignore_missing_state=ignore)
        assert "ignore_missing_state" not in str(refused.value) and "--overwrite" in str(refused.value)


def test_last_takes_a_complete_checkpoint_before_a_newer_one_that_is_not(tmp_path):
    whole = write_checkpoint(tmp_path / "checkpoint-5")
    write_checkpoint(tmp_path / "checkpoint-10", without=NO_STATES)
    for ignore in (False, True):
        assert resolve_resume(tmp_path, "last", ignore) == whole
    (whole / "model.safetensors").unlink()
    assert resolve_resume(tmp_path, "last", True).name == "checkpoint-10"


def test_a_checkpoint_that_was_never_finished_is_as_if_it_were_not_there(tmp_path):
    torn = write_checkpoint(tmp_path / "checkpoint-5")
    (torn / MANIFEST).unlink()
    assert resolve_resume(tmp_path, "last") is None and resolve_resume(tmp_path / "nowhere", "last") is None
    with pytest.raises(ValueError, match="it has no checkpoint_manifest.json, which is written last. There is no"):
        resolve_resume(tmp_path, str(torn))


def test_nothing_missing_is_nothing_to_say(tmp_path):
    assert states_begun_anew(write_checkpoint(tmp_path / "checkpoint-5")) is None
    bare = write_checkpoint(tmp_path / "checkpoint-6", without={*NO_STATES, "rng_state.pth"})
    assert "the learning rate schedule and the random numbers begin anew" in states_begun_anew(bare)


# ---- our own JSON, whatever it holds ----

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
STATE_FIELDS = [f.name for f in dataclasses.fields(TrainerState)]


def assert_resumed_or_one_sentence(output_dir):
    try:
        assert resolve_resume(output_dir, "last").name == "checkpoint-5"
    except ValueError as problem:
        assert "checkpoint-5" in str(problem) and str(problem).endswith(".")


@pytest.mark.parametrize("file", [MANIFEST, "trainer_state.json"])
@pytest.mark.parametrize("text", ["[]", "{}", "null", "3", "", "{oops", "[" * 100_000, "\x00"])
def test_what_is_no_such_object_is_one_sentence(file, text, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-5")
    (folder / file).write_text(text)
    if file != MANIFEST:
        write_manifest(folder)  # as it would be, had the run written this
    with pytest.raises(ValueError, match=file) as problem:
        resolve_resume(tmp_path, "last")
    assert "checkpoint-5" in str(problem.value)


@given(JSON)
@settings(deadline=None, max_examples=60)
def test_a_manifest_may_hold_anything(found):
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "checkpoint-5")
        for content in (found, {"files": found}, {"files": {"model.safetensors": found}}, {"files": {str(found): 3}}):
            (checkpoint / MANIFEST).write_text(json.dumps(content))
            assert_resumed_or_one_sentence(folder)


@given(st.sampled_from(STATE_FIELDS), JSON)
@settings(deadline=None, max_examples=100)
def test_a_state_may_hold_anything(name, found):
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "checkpoint-5")
        for content in (found, json.loads(FILES["trainer_state.json"]) | {name: found}, {name: found}):
            (checkpoint / "trainer_state.json").write_text(json.dumps(content))
            write_manifest(checkpoint)
            assert_resumed_or_one_sentence(folder)
