"""scripts/dev/compare_kinds.py: whole with tiny models and a scripted server; its order, clock and table."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from forks import ROOT
from hypothesis import given
from hypothesis import strategies as st
from tiny_files import write_chats, write_tiny_target
from warm_python import warm_python


sys.path.append(str(ROOT / "scripts" / "dev"))
import compare_kinds  # noqa: E402
from compare_kinds import EAGLE3, Comparison, ComparisonArguments  # noqa: E402
from comparing_kinds import timed  # noqa: E402
from comparing_kinds.clocked import Clock, rate  # noqa: E402
from comparing_kinds.report import Run, best, draw, table  # noqa: E402


FASTEST = "DFlash, 2 layers, blocks of 4"
MINUTES = 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny target, questions, prompts, and a recipe of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    write_tiny_target(folder / "target")
    write_chats(folder / "questions.jsonl", 16)
    (folder / "prompts.txt").write_text("red green\nstone fish\nbird\n")
    recipe = {"target": str(folder / "target"), "per_device_train_batch_size": 4, "max_length": 64}
    recipe |= {"learning_rate": 1e-3, "logging_steps": 1, "seed": 5, "num_train_epochs": 1}
    (folder / "eagle3.yaml").write_text(yaml.safe_dump({**recipe, "ttt_steps": 2}))
    (folder / "dflash.yaml").write_text(yaml.safe_dump({**recipe, "method": "dflash", "num_anchors": 4}))
    return folder


def arguments(folder, **changes) -> ComparisonArguments:
    paths = {"out": "out", "eagle3": "eagle3.yaml", "dflash": "dflash.yaml", "questions": "questions.jsonl"}
    paths = {name: str(folder / value) for name, value in paths.items()} | {"prompts": str(folder / "prompts.txt")}
    sizes = {"minutes": MINUTES, "points": 2, "num_prompts": 3, "max_new_tokens": 12, "seeds": 2}
    return ComparisonArguments(**paths | sizes | {"answer_minutes": 1.0} | changes)


def served(command) -> None:
    """Stands for scripts/benchmark_serving.py: one variant is the fastest, each seed a little faster."""
    asked = dict(zip(command[2::2], command[3::2], strict=True))
    variant, seed = asked["--draft"].split("/")[-2:]
    speed = 10.0 * (1 + (variant == compare_kinds.ablate.slug(FASTEST))) + int(seed)
    entries = [
        {"num_speculative_tokens": count, "batch_size": size, "tokens_per_second": size * x, "speedup": x / 8.0}
        for size in map(int, asked["--batch_sizes"].split(","))
        for count, x in ((0, 8.0), (3, speed))
    ]
    with open(asked["--output_json"], "w") as file:
        json.dump({"server": "vLLM", "entries": entries}, file)


@pytest.fixture
def called(monkeypatch):
    """The scripts that are called, in order; they run in forks."""
    called = []

    def forked(command, env, stdout, stderr):
        called.append(os.path.basename(command[1]))
        if called[-1] == "benchmark_serving.py":
            served(command)
            return subprocess.CompletedProcess(command, 0)
        done = warm_python().run(*command[1:], **env)
        stdout.write(done.stdout + done.stderr)
        return done

    monkeypatch.setattr(subprocess, "run", forked)
    return called


def test_it_runs_whole_and_does_nothing_twice(folder, called):
    comparison = Comparison(arguments(folder))
    told = comparison.described()
    assert told.count("train ") == 7 and "the best DFlash, seed 1" in told and "blocks of 16" not in told
    comparison.run()
    assert called.count("regenerate_answers.py") == 1
    assert called.count("clocked.py") == called.count("benchmark_serving.py") == 5 + 2

    out = folder / "out"
    found = json.loads((out / "compared.json").read_text())
    assert found["best"] == FASTEST
    trained = sorted((run["draft"], run["seed"]) for run in found["runs"])
    assert trained == sorted([(name, 0) for name in comparison.variants] + [(EAGLE3, 1), (FASTEST, 1)])
    for run in found["runs"]:
        minutes, length = run["curve"]["2"]
        assert minutes >= MINUTES and length >= 1 and run["steps"] > 0
        state = json.loads((comparison.folder((run["draft"], run["seed"])) / "trainer_state.json").read_text())
        assert state["global_step"] == run["steps"]
    config = json.loads((comparison.folder((FASTEST, 1)) / "config.json").read_text())
    assert (config["num_hidden_layers"], config["block_size"]) == (2, 4)

    lines = (out / "table.md").read_text().splitlines()
    assert lines[0].endswith("| 0.005 min | 0.01 min | 1 request, tokens/s | 4 requests, tokens/s |")
    assert lines[2].startswith(f"| {FASTEST} | 2 |") and lines[2].endswith("| 20.5 ± 0.7 | 82.0 ± 2.8 |")
    assert lines[-1].startswith("| no draft |") and lines[-1].endswith("| 8.0 | 32.0 |")
    assert (out / "compared.png").read_bytes().startswith(b"\x89PNG")

    again = Comparison(arguments(folder))
    assert again.described() == "In all about 0 minutes."
    called.clear()
    again.run()
    assert called == []

    (again.folder((EAGLE3, 1)) / "trainer_state.json").unlink()  # as after an interruption
    (again.folder((EAGLE3, 1)) / "serving.json").unlink()
    assert again.described().startswith("train EAGLE-3, seed 1: 0.01 minutes\nserve 1 of these")
    again.run()
    assert called == ["clocked.py", "benchmark_serving.py"]

    with pytest.raises(ValueError, match="^`minutes` is 5, but the runs in `out` .* have 0.01: give that, or name"):
        Comparison(arguments(folder, minutes=5))

    told = "^`max_new_tokens` is 13, but the runs in `out` .* have 12: give that, or name"
    with pytest.raises(ValueError, match=told):
        Comparison(arguments(folder, max_new_tokens=13))


@pytest.mark.parametrize("left", [set(), {1}, {0, 1}], ids=["whole", "half", "none"])
def test_a_round_that_was_interrupted_is_trained_whole(folder, tmp_path, monkeypatch, left):
    comparison = Comparison(arguments(folder, out=str(tmp_path), jobs=2))
    together = comparison.first()[:2]
    for number, run in enumerate(together):
        of_run = comparison.folder(run)
        of_run.mkdir(parents=True)
        (of_run / "serving.json").touch()
        if number not in left:
            (of_run / "trainer_state.json").touch()

    trained, served = [], []
    monkeypatch.setattr(timed, "shares", lambda cores, jobs: [[0], [1]])
    monkeypatch.setattr(comparison, "train", lambda run, cores: trained.append((run, cores)))
    monkeypatch.setattr(comparison, "serve", served.append)
    monkeypatch.setattr(comparison, "write", lambda known: None)
    comparison.train_and_serve(together, together)
    assert dict(trained) == (dict(zip(together, [[0], [1]], strict=True)) if left else {})
    assert served == (together if left else [])


def test_answers_and_speed_get_all_cores_and_training_its_share(folder, tmp_path, monkeypatch):
    comparison = Comparison(arguments(folder, out=str(tmp_path), jobs=2))
    comparison.settings["bf16"] = False
    threads = {}

    def run(command, env, stdout, stderr):
        threads[os.path.basename(command[1])] = int(env["OMP_NUM_THREADS"])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(subprocess, "run", run)
    comparison.make_answers()
    comparison.train((EAGLE3, 0), [0, 1, 2])
    comparison.serve((EAGLE3, 0))
    assert threads == {"regenerate_answers.py": 6, "clocked.py": 3, "benchmark_serving.py": 6}


@given(jobs=st.integers(1, 6), seeds=st.integers(1, 5), place=st.integers(1, 4))
def test_every_round_keeps_all_cores_at_work_and_no_run_comes_twice(jobs, seeds, place):
    comparison = Comparison.__new__(Comparison)
    comparison.variants = dict.fromkeys([EAGLE3, "a", "b", "c", "d"])
    comparison.args = SimpleNamespace(jobs=jobs, seeds=seeds)
    variant = list(comparison.variants)[place]
    first, second = comparison.first(), comparison.second(variant)
    assert all(len(together) == jobs for together in comparison.rounds(first) + comparison.rounds(second))
    assert len(set(first + second)) == len(first + second)
    assert {(name, 0) for name in comparison.variants} <= set(first)
    assert {(name, seed) for name in (EAGLE3, variant) for seed in range(seeds)} <= set(first + second)


def test_cores_are_shared_out_evenly():
    assert timed.shares([0, 1, 2, 3, 7], 2) == [[0, 1], [2, 3]] and timed.shares([4], 1) == [[4]]
    with pytest.raises(ValueError, match="^`jobs` is 3, but there are 2 cores: each run needs one of its own.$"):
        timed.shares([0, 1], 3)


class Scripted:
    """A run whose clock moves by what its steps and measurements take; `logged` is what the clock logs."""

    def __init__(self, step: float, measuring: float, minutes: float, points: int):
        self.time, self.logged, self.rates, self.steps = 100.0, [], [], 0

        def measure():
            self.time += measuring
            return 1.5

        clock = Clock(SimpleNamespace(log=self.logged.append), measure, minutes, points, now=lambda: self.time)
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([{"params": [parameter], "lr": 2.0, "initial_lr": 2.0}])
        control = SimpleNamespace(should_log=True, should_training_stop=False)
        self.time += 50  # the trainer is made ready
        clock.on_train_begin(None, None, control)
        while not control.should_training_stop:
            clock.on_step_begin(None, None, control, optimizer=optimizer)
            self.rates.append(optimizer.param_groups[0]["lr"])
            self.time += step
            self.steps += 1
            clock.on_step_end(None, None, control)
        assert control.should_log


@given(
    step=st.integers(8, 2000), measuring=st.integers(0, 30_000), minutes=st.integers(4, 192), points=st.integers(1, 6)
)
def test_measuring_costs_a_run_no_time(step, measuring, minutes, points):
    step, measuring, minutes = step / 64, measuring / 64, minutes / 64  # sums of these are exact
    free, found = Scripted(step, 0, minutes, points), Scripted(step, measuring, minutes, points)
    assert found.steps == free.steps == math.ceil(60 * minutes / step)
    assert found.rates == pytest.approx(free.rates, abs=1e-6)
    assert [log["point"] for log in found.logged] == [log["point"] for log in free.logged]
    assert found.logged[-1]["point"] == points
    for log in found.logged:
        assert log["minutes_trained"] >= minutes * log["point"] / points - 1e-9


def test_the_learning_rate_warms_up_and_ends_with_the_time():
    assert [rate(share) for share in (0, 0.015, 0.03, 1, 1.2)] == pytest.approx([0, 0.5, 1, 0, 0])
    assert rate(0.03 + 0.97 / 2) == pytest.approx(0.5)


def test_without_a_server_acceptance_decides(tmp_path):
    slow = Run(EAGLE3, 0, 9, {1: (1.0, 1.2), 2: (2.0, 1.3)})
    runs = [slow, replace(slow, seed=1, curve={2: (2.1, 1.5)}), Run("DFlash", 0, 7, {1: (1.0, 1.6), 2: (2.0, 1.35)})]
    assert best(runs) == EAGLE3
    assert table(runs, 2.0, 2).splitlines() == [
        "| draft | seeds | steps | 1 min | 2 min |",
        "|---|---|---|---|---|",
        "| EAGLE-3 | 2 | 9 | 1.200 | 1.400 ± 0.141 |",
        "| DFlash | 1 | 7 | 1.600 | 1.350 |",
    ]
    draw(runs, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 0
