"""`scripts/dev/chaos.py`: its trials meet everything, its checks find what is planted, and training survives it."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "dev"))

from chaos import checks  # noqa: E402
from chaos.plan import DAMAGE, FAULTS, ROWS, STEPS, axes, draft_names, trials  # noqa: E402
from chaos.processes import Ended  # noqa: E402

from hf_eagle.drafts.kinds import KINDS  # noqa: E402
from hf_eagle.training.checkpoints import write_manifest  # noqa: E402


ALL = 12  # trials that meet every value of every axis
PAIRED = 80  # and every one of them beside every fault; of 150 seeds, none needed more than 67


def chaos(root, out, *arguments):
    """A run of the script, and its report."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(root / "scripts" / "dev" / "chaos.py"), "--out", str(out), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out.parent)
    assert (out / "report.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    return done, json.loads((out / "report.json").read_text())


# ---- the runs ----


@pytest.mark.timeout(1800)
def test_training_survives_every_fault(tmp_path):
    done, report = chaos(ROOT, tmp_path / "chaos", "--trials", ALL, "--seed", 0)
    assert done.returncode == 0 and not report["failed"], done.stdout
    # each was met, and by every kind of configuration that there is
    assert report["faults"].keys() == set(FAULTS)
    for axis, values in axes(0).items():
        if axis == "fault":
            continue
        met = report["resumed"] if axis == "resumed" else report["axes"][axis]
        assert met.keys() == set(map(str, values)), axis
    assert set(report["axes"]["draft"]) == {name for kind in KINDS.values() for name in kind.architectures}
    assert all(x["met"] == x["survived"] for x in report["faults"].values())


# a module, what is written at its end, a trial that meets it, and what must be said
PLANTED = {
    "a checkpoint that is always complete": (
        "hf_eagle/training/checkpoints.py",
        "def why_incomplete(folder, without_states=False): return None",
        lambda trial: trial.blow.fault == "checkpoint removed",
        "is taken for complete, which it is not",
    ),
    "a resumed run that begins its pass again": (
        "hf_eagle/arguments/training.py",
        "EagleTrainingArguments.ignore_data_skip = property(lambda self: True, lambda self, value: None)",
        # from a checkpoint in the middle of a pass of three steps
        lambda trial: (
            (trial.blow.fault, trial.first.streaming) == ("SIGKILL", False)
            and trial.blow.moment in ("begin", "loss")
            and trial.blow.step // trial.first.save_steps * trial.first.save_steps in (1, 2, 4, 5)
        ),
        "trained on",
    ),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name, tmp_path):
    file, code, fits, found = PLANTED[name]
    root = tmp_path / "copy"
    for folder in ("hf_eagle", "scripts", "tests", "training_args", "model_cards"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (root / file).open("a") as module:
        module.write(f"\n\n{code}\n")

    number = next(trial.number for trial in trials(0) if fits(trial) and trial.first.ranks == 1 and not trial.again)
    done, report = chaos(root, tmp_path / "chaos", "--trial", number)
    assert done.returncode == 1 and found in done.stdout, done.stdout
    # it can be made again, and its folder is there
    assert f"--seed 0 --trial {number}" in done.stdout
    assert (tmp_path / "chaos" / f"trial-{number}" / "trial.json").exists() and len(report["failed"]) == 1


# ---- the plan ----


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 10**6))
def test_the_first_trials_meet_everything(seed):
    plan, found = list(islice(trials(seed), PAIRED)), axes(seed)
    assert found["fault"] == sorted(FAULTS) and found["draft"] == sorted(draft_names())
    values = {(axis, value) for axis, all_of_it in found.items() for value in all_of_it}
    assert set().union(*(trial.values for trial in plan[:ALL])) == values
    met = set().union(*(trial.pairs for trial in plan))
    assert {(fault, axis) for fault, axis, _ in met} == {(f, axis) for f in FAULTS for axis in found if axis != "fault"}
    for fault in set(FAULTS) - {"SIGSTOP"}:  # after which nothing has to go on
        for axis, value in values - {("fault", fault)}:
            assert axis == "fault" or (fault, axis, value) in met, (fault, axis, value)
    assert plan == list(islice(trials(seed), PAIRED))


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 10**6))
def test_trials_can_be_made(seed):
    for trial in islice(trials(seed), PAIRED, PAIRED + 40):
        for told in (trial.first, trial.second):
            assert told.batch * told.ranks * told.accumulation == ROWS
            assert not (told.streaming and (told.packing or told.store != "none" or told.sampler != "random"))
            assert told.ranks > 1 or (told.target, told.wrapped) == ("none", "alone")
        assert 0 <= trial.blow.rank < trial.first.ranks and 0 <= trial.blow.step <= STEPS
        if trial.blow.fault in DAMAGE:  # there is something to damage
            assert trial.blow.step >= trial.first.save_steps
        if trial.blow.moment == "checkpoint":
            assert trial.blow.step > 0 and trial.blow.step % trial.first.save_steps == 0


# ---- the checks ----


@given(st.integers(1, 8), st.integers(0, 30), st.data())
def test_records_that_are_lost_or_seen_twice_are_found(records, seen, data):
    steps = checks.Steps()
    for place in range(seen):
        steps.records.setdefault(place // 3, Counter())[place % records] += 1
    assert not checks.wrong_counts(steps, records)
    if records > 1:
        # one pass more than the others, and one more than that
        steps.records[-1] = Counter({data.draw(st.integers(0, records - 1)): 3 * records + 30})
        assert checks.wrong_counts(steps, records)


def ended(*journals, codes=None, printed=None):
    ranks = len(journals)
    return Ended(codes or [0] * ranks, printed or [""] * ranks, [list(journal) for journal in journals])


def line(step, records, loss=1.0):
    return {"step": step, "records": records, "loss": loss}


def test_steps_that_were_lost_count_once():
    steps = checks.Steps()
    steps.add(ended([line(1, [0, 1]), line(2, [2]), line(3, [4])], [line(1, [5]), line(2, [3])]))  # killed in step 3
    steps.add(ended([line(2, [2], 2.0), line(2, [3], 4.0), line(3, [4, 6])]))
    assert steps.records == {1: Counter([0, 1, 5]), 2: Counter([2, 3]), 3: Counter([4, 6])}
    assert steps.losses == {1: 1.0, 2: 6.0, 3: 1.0}


@pytest.mark.parametrize("exact", [True, False])
def test_other_records_and_other_losses_are_found(exact):
    wanted, found = checks.Steps(), checks.Steps()
    wanted.add(ended([line(step, [step], 2.0) for step in range(1, STEPS + 1)]))
    found.add(ended([line(step, [step], 2.0 + 1e-6 * (step == 2)) for step in range(1, STEPS + 1)]))
    assert len(checks.wrong_steps(found, wanted, exact)) == exact
    found.add(ended([line(3, [4], 2.1)]))
    assert "step 3 trained on 4 instead of 3" in checks.wrong_steps(found, wanted, exact)
    del found.losses[5]
    assert "the run took the steps [1, 2, 3, 4, 6]" in checks.wrong_steps(found, wanted, exact)


@pytest.mark.parametrize("fault", FAULTS)
def test_ends_that_are_not_a_faults_are_found(fault):
    trial = next(t for t in trials(3) if t.blow.fault == fault and t.first.ranks > 1 and t.blow.step < STEPS - 1)
    blow, journals = trial.blow, [[{"struck": fault}]] * trial.first.ranks

    def wrong(code, others=None, text=""):
        codes = [code if rank == blow.rank or others is None else others for rank in range(len(journals))]
        return checks.wrong_end(ended(*journals, codes=codes, printed=[text] * len(codes)), blow)

    sentence = "error: `argument` is wrong."
    right = {"SIGTERM": 143, "SIGINT": 130, "SIGSTOP": 0, "full disk": 1, "rank raises": 1}.get(fault, -9)
    assert not wrong(right, text=sentence)
    assert wrong(2 if fault == "SIGSTOP" else 0)
    assert wrong(right, text=f"{sentence}\nTraceback (most recent call last):")
    assert wrong(right, others=-11, text=sentence)
    if right == 1:
        assert wrong(right) and wrong(right, text=f"{sentence}\n{sentence}") and wrong(right, others=0, text=sentence)
    assert (right == -9) == (fault in ("SIGKILL", *DAMAGE))


@pytest.mark.parametrize("damage", ["none", "cut", "removed", "manifest cut", "manifest removed"])
def test_a_whole_checkpoint_is_told_from_a_torn_one(damage, tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x" * 9)
    write_manifest(folder)
    path = next(folder.glob("*manifest*" if "manifest" in damage else "*.safetensors"))
    if "cut" in damage:
        path.write_bytes(path.read_bytes()[:4])
    if "removed" in damage:
        path.unlink()
    assert checks.is_whole(folder) == (damage == "none")
    assert checks.newest_whole(tmp_path) == (folder if damage == "none" else None)


# ---- the ranks ----


RANKS = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
from chaos.processes import Ranks, in_sessions

def work(rank, journal):
    os.write(journal, b'{"rank": %d}\\n{"ha' % rank)
    print(os.environ["RANK"], os.environ["OWN"], flush=True)
    way = WAYS[rank % len(WAYS)]
    if way == "exits": sys.exit("error: one sentence")
    if way == "fails": 1 / 0
    if way == "dies": os.kill(os.getpid(), signal.SIGKILL)
    if way == "stops": os.kill(os.getpid(), signal.SIGSTOP)
    if way == "leaves": subprocess.Popen(["sleep", "600"])
    if way == "hangs": time.sleep(600)

WAYS = sys.argv[1].split()
import chaos.processes
chaos.processes._GRACE = 0.5
found = Ranks(work, 2, Path(sys.argv[2]), {"OWN": "x"}).wait(float(sys.argv[3]), launcher="dies" in WAYS, pause=0.1)
print(found.codes, found.journals, found.hung, [x.split()[1] for x in found.left])
print([text.splitlines()[-1] for text in found.printed])
"""


@pytest.mark.parametrize(
    ("ways", "seconds", "told"),
    [
        ("ends exits", 60, "[0, 1] [[{'rank': 0}], [{'rank': 1}]] False []\n['0 x', 'error: one sentence']"),
        ("stops fails", 60, "[0, 1] [[{'rank': 0}], [{'rank': 1}]] False []\n['0 x', 'ZeroDivisionError: div"),
        ("dies hangs", 60, "[-9, -15] [[{'rank': 0}], [{'rank': 1}]] False []\n"),  # the launcher ends the other one
        ("leaves ends", 60, "[0, 0] [[{'rank': 0}], [{'rank': 1}]] False ['sleep']\n"),
        ("hangs ends", 5, "[-9, 0] [[{'rank': 0}], [{'rank': 1}]] True []\n"),
    ],
)
def test_ranks_end_as_scripts_do_and_what_hangs_or_stays_is_found(ways, seconds, told, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts" / "dev")])}
    command = [sys.executable, "-c", textwrap.dedent(RANKS), ways, str(tmp_path), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.startswith(told), done.stdout + done.stderr
