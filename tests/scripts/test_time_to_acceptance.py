"""scripts/dev/time_to_acceptance.py: whole with a tiny model; its order, and when what is reached."""

import json
import subprocess
import sys

import pytest
import yaml
from forks import ROOT
from hypothesis import given
from hypothesis import strategies as st
from tiny_files import write_chats, write_tiny_target
from warm_python import warm_python


sys.path.append(str(ROOT / "scripts" / "dev"))
from comparing_kinds.report import Run  # noqa: E402
from time_to_acceptance import Ways, WaysArguments, minutes_to, told  # noqa: E402


CURVE = {1: (1.0, 1.2), 2: (2.0, 1.3), 3: (3.0, 1.25), 4: (4.0, 1.5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ways")
    write_tiny_target(folder / "target")
    write_chats(folder / "questions.jsonl", 16)
    (folder / "prompts.txt").write_text("red green\nstone fish\nbird\n")
    recipe = {"target": str(folder / "target"), "per_device_train_batch_size": 4, "max_length": 64, "ttt_steps": 2}
    for name, more in {"fast": {"learning_rate": 1e-2}, "slow": {"ttt_steps": 3}, "other": {"target": "other"}}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe | more))
    return folder


def ways(folder, *names, **changes) -> Ways:
    sizes = {"minutes": 0.01, "points": 2, "num_prompts": 3, "max_new_tokens": 12, "seeds": 1, "answer_minutes": 1.0}
    paths = {"questions": "questions.jsonl", "prompts": "prompts.txt", "out": "out"}
    paths = {name: str(folder / path) for name, path in paths.items()}
    recipes = [str(folder / f"{name}.yaml") for name in names]
    return Ways(WaysArguments(recipes=recipes, **paths | sizes | changes))


def test_it_runs_whole_and_does_nothing_twice(folder, monkeypatch):
    called = []

    def forked(command, env, stdout, stderr):
        called.append(command[1].rpartition("/")[2])
        done = warm_python().run(*command[1:], **env)
        stdout.write(done.stdout + done.stderr)
        return done

    monkeypatch.setattr(subprocess, "run", forked)
    ways(folder, "fast", "slow").run()
    assert called == ["regenerate_answers.py", "clocked.py", "clocked.py"]
    found = json.loads((folder / "out" / "compared.json").read_text())
    assert [(run["draft"], run["seed"]) for run in found["runs"]] == [("fast", 0), ("slow", 0)]
    assert all(max(map(int, run["curve"])) == 2 for run in found["runs"])

    again = ways(folder, "fast", "slow")
    assert again.plan(again.runs()) == ([], 0.0)
    again.run()
    assert len(called) == 3
    assert told(again.read(again.runs())).startswith("In the end ")


def test_recipes_of_one_name_or_of_several_targets_are_refused(folder):
    with pytest.raises(ValueError, match="`recipes` .*fast.yaml .*fast.yaml have one name twice: rename a file"):
        ways(folder, "fast", "fast", out=str(folder / "none"))
    with pytest.raises(ValueError, match=r"`recipes` are for several targets \(.*target, other\): name those of one"):
        ways(folder, "fast", "other", out=str(folder / "none"))


@pytest.mark.parametrize(("seeds", "jobs"), [(1, 1), (1, 2), (3, 2), (2, 3)])
def test_every_round_keeps_all_cores_at_work(folder, seeds, jobs):
    compared = ways(folder, "fast", "slow", seeds=seeds, jobs=jobs, out=str(folder / "none"))
    runs = compared.runs()
    assert len(runs) % jobs == 0 and len(set(runs)) == len(runs)
    assert {(name, seed) for name in ("fast", "slow") for seed in range(seeds)} <= set(runs)


def test_when_a_length_is_reached_is_read_between_measurements():
    assert minutes_to(1.1, CURVE) == pytest.approx(0.5)
    assert minutes_to(1.25, CURVE) == pytest.approx(1.5)
    assert minutes_to(1.4, CURVE) == pytest.approx(3.6)
    assert minutes_to(1.5, CURVE) == 4.0 and minutes_to(1.51, CURVE) is None


@given(st.lists(st.floats(1, 4), min_size=1, max_size=6), st.floats(1, 4))
def test_it_is_reached_no_later_than_it_was_seen(lengths, wanted):
    curve = {point: (float(point), length) for point, length in enumerate(lengths, start=1)}
    found, seen = minutes_to(wanted, curve), [minutes for minutes, length in curve.values() if length >= wanted]
    assert (found is None) == (not seen)
    assert found is None or 0 <= found <= seen[0]


def test_the_result_is_told():
    runs = [Run("ours", 0, 9, CURVE), Run("theirs", 0, 5, {1: (2.0, 1.1), 2: (4.0, 1.2)})]
    assert told(runs).splitlines() == [
        "In the end theirs has an acceptance length of 1.200.",
        "ours has it after 1.0 minutes, and 1.500 in the end.",
    ]
