"""How a run of `scripts/train_eagle.py` ends: finished, continued, killed behind its last step, or with nothing."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from test_train_script import curve, train
from tiny_files import WORDS, write_chats, write_tiny_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny target, chats, and a recipe."""
    folder = tmp_path_factory.mktemp("ends")
    write_tiny_target(folder / "target")
    write_chats(folder / "chats.jsonl")
    recipe = {"target": str(folder / "target"), "train_data": [str(folder / "chats.jsonl")], "max_length": 64}
    recipe |= {"ttt_steps": 2, "max_steps": 6, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    train(folder, "--output_dir", folder / "draft", "--eval_share", 0.25)
    return folder / "draft"


def files_of(out):
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_finished_run_is_left_as_it_is(trained, folder):
    before = files_of(trained)
    assert {"train_results.json", "eval_results.json", "README.md"} <= {str(path) for path in before}
    printed = train(folder, "--output_dir", trained, "--eval_share", 0.25, "--resume_from_checkpoint", "last")
    assert "checkpoint-6 already has all 6 steps of this run: there is nothing to train." in printed
    assert f"{trained} is left as it is." in printed and "it/s" not in printed.partition("nothing to train")[2]
    assert files_of(trained) == before


@pytest.mark.parametrize("lost", ["nothing but the end", "the draft"])
def test_a_run_that_was_killed_behind_its_last_step_leaves_its_results(lost, trained, folder, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    whole = files_of(trained)
    for name in ("trainer_state.json", "train_results.json", "README.md"):
        (tmp_path / "out" / name).unlink()
    if lost == "the draft":
        (tmp_path / "out" / "model.safetensors").unlink()
    args = ("--output_dir", tmp_path / "out", "--eval_share", 0.25, "--resume_from_checkpoint", "last")
    assert "nothing to train" in train(folder, *args)
    found = files_of(tmp_path / "out")
    assert found.keys() == whole.keys() and found[Path("model.safetensors")] == whole[Path("model.safetensors")]
    wanted = json.loads(whole[Path("train_results.json")])["train_loss"]
    results = json.loads(found[Path("train_results.json")])
    assert results == {"train_loss": pytest.approx(wanted, rel=1e-6)}  # what it took of time is not known
    assert f"{tmp_path / 'out'} is left as it is." in train(folder, *args)


def test_last_beside_a_draft_without_checkpoints_is_refused(trained, folder, tmp_path):
    shutil.copytree(trained, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))
    before = files_of(tmp_path / "out")
    printed = train(folder, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "last", expect=1)
    last = printed.strip().splitlines()[-1]
    assert last.startswith("error: `output_dir`") and "no checkpoint that `resume_from_checkpoint` last could" in last
    assert files_of(tmp_path / "out") == before and "Traceback" not in printed


def test_without_its_states_a_checkpoint_is_refused_before_anything_is_loaded(trained, folder, tmp_path):
    shutil.copytree(trained / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    (tmp_path / "out" / "checkpoint-3" / "optimizer.pt").unlink()
    args = ("--output_dir", tmp_path / "out", "--resume_from_checkpoint", "last")
    printed = train(folder, *args, "--target", "nowhere", expect=1)
    last = printed.strip().splitlines()[-1]
    assert "checkpoint-3 is not a complete checkpoint: optimizer.pt is missing." in last
    assert last.endswith("`--ignore_missing_state` continues from it, and these states begin anew.")
    printed = train(folder, *args, "--ignore_missing_state")
    assert (
        "checkpoint-3 has no optimizer.pt: the optimizer's state and the learning rate schedule begin anew." in printed
    )
    assert sorted(curve(tmp_path / "out")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("args", [["--dataloader_drop_last", "true"], ["--streaming"]])
def test_a_run_that_trains_on_nothing_fails_and_saves_nothing(args, folder, tmp_path):
    """Fewer conversations than a batch, or a stream of questions without an answer."""
    questions = [{"messages": [{"role": "user", "content": f"{word}?"}]} for word in WORDS]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in questions))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"save_steps": 1}
    if "--streaming" in args:
        recipe["train_data"] = [str(tmp_path / "questions.jsonl")]
    (folder / "nothing.yaml").write_text(yaml.safe_dump(recipe))
    more = ("--per_device_train_batch_size", 128, "--output_dir", tmp_path / "out")
    printed = train(folder, *args, *more, recipe="nothing.yaml", expect=1)
    assert printed.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in printed
    assert not [path for path in files_of(tmp_path / "out") if path.suffix in (".safetensors", ".md", ".json")]
