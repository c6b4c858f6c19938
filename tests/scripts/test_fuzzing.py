"""Every verb with bad arguments, files, servers, outputs and disks; and the rule by which their ends are judged."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts" / "dev"))

from fuzzing.faults import Trial  # noqa: E402
from fuzzing.rule import broken_rule, snapshot  # noqa: E402
from fuzzing.world import VERBS  # noqa: E402


# the trials of a faster machine are the same ones
MINUTES, TRIALS, SEED = 2, 120, 2026
SENTENCE = "error: `output_json` a.json is a folder: name a file."
ENDS = {
    "sentence": (1, SENTENCE, None),
    "usage": (2, "hf-eagle train: error: unknown argument --nope. (--help lists the arguments)", None),
    "success": (0, "", None),
    "killed": (-9, "", "exit status -9"),
    "status": (7, SENTENCE, "exit status 7"),
    "traceback": (1, f"Traceback (most recent call last):\n  File\n{SENTENCE}", "traceback"),
    "unforeseen": (1, "error: hf-eagle failed in a.py:7 with KeyError: 'x'", "nobody foresaw it"),
    "silent": (1, "", "no sentence"),
    "twice": (1, f"{SENTENCE}\n{SENTENCE}", "more than one sentence"),
    "beside a library's": (1, f"run 1: out could not be written (I/O error: too large)\n{SENTENCE}", None),
    "nameless": (1, "error: something is wrong here", "names nothing"),
    "hangs": (1, "Timeout (0:01:00)!\nThread 0x1 (most recent call first):", "hangs"),
}


def trial(world: Path) -> Trial:
    evaluate = next(verb for verb in VERBS if verb.name == "evaluate")
    return Trial(evaluate, world, list(evaluate.command), random.Random(0))


@pytest.mark.parametrize("end", ENDS)
def test_an_end_is_judged_by_status_and_words(end, tmp_path):
    status, errors, broken = ENDS[end]
    assert broken_rule(trial(tmp_path), status, "", errors, snapshot(tmp_path)) == broken


def test_a_file_that_was_there_may_not_change(tmp_path):
    (tmp_path / "target").mkdir()
    config, output = tmp_path / "target" / "config.json", tmp_path / "a.json"
    config.write_text("{}")
    before = snapshot(tmp_path)
    output.write_text("{}")
    assert broken_rule(trial(tmp_path), 0, "", "", before) is None

    config.write_text("{} ")
    assert broken_rule(trial(tmp_path), 1, "", SENTENCE, before) == "changed target/config.json"
    config.unlink()
    assert broken_rule(trial(tmp_path), 0, "", "", before) == "changed target/config.json"


def test_a_success_leaves_numbers(tmp_path):
    (tmp_path / "a.json").write_text('{"lengths": [1.5, NaN]}')
    told = broken_rule(trial(tmp_path), 0, "", "", {})
    assert told == "exit 0, but a.json holds a number that is none"


@pytest.mark.timeout(900)
def test_no_verb_breaks_the_rule():
    """For two minutes; by hand for an hour and with other seeds."""
    command = [sys.executable, "scripts/dev/fuzz.py", "--minutes", str(MINUTES), "--seed", str(SEED)]
    command += ["--trials", str(TRIALS)]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert ended.returncode == 0, f"{ended.stdout[-6000:]}\n{ended.stderr[-2000:]}"
    assert "0 broke the rule" in ended.stdout


def test_findings_of_check_are_what_was_asked_for(tmp_path):
    found = "vLLM: `draft_vocab_size` is missing. Fix: write it.\n"
    checking = replace(trial(tmp_path), verb=replace(trial(tmp_path).verb, script="check_draft.py"))
    before = snapshot(tmp_path)
    assert broken_rule(checking, 1, found, "", before) is None
    assert broken_rule(checking, 1, "", "", before) == "no sentence"
    assert broken_rule(trial(tmp_path), 1, found, "", before) == "no sentence"
