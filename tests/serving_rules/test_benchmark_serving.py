"""What the benchmark of a real vLLM makes of its runs, and what it says instead; tests/serving runs real engines."""

import runpy
import sys

import pytest
from forks import ROOT

from hf_eagle.serving.speed import Engine, _summary, table, verdict


def run(seconds, *lengths, drafts=0, accepted=(), token=7):
    return {
        "seconds": seconds,
        "token_ids": [[token] * length for length in lengths],
        "drafts": drafts,
        "accepted_tokens": sum(accepted),
        "accepted_per_position": list(accepted),
    }


def test_an_entry_sums_up_rounds_that_alternated():
    """The machine was slow in the second round: each round is held to its own run without a draft."""
    alone = [run(1, 10, 10), run(4, 10, 10), run(1, 10, 10)]
    drafted = [run(0.5, 10, 10, drafts=8, accepted=(6, 4)), run(2, 10, 10), run(0.8, 10, 10)]
    entry = _summary(2, 1, drafted, alone)
    assert entry["tokens_per_second"] == 25 and entry["tokens_per_second_range"] == [10, 40]
    assert entry["speedup"] == 2 and entry["speedup_range"] == [1.25, 2]
    assert entry["acceptance_length"] == 1 + 10 / 8 and entry["accepted_per_position"] == [6, 4]
    assert entry["identical_answers"] == 1

    entry = _summary(0, 1, alone, alone)
    assert entry["speedup"] == 1 and entry["acceptance_length"] is None
    other = [run(1, 10, 9)] * 3
    assert _summary(2, 1, other, alone)["identical_answers"] == 0.5


def test_the_table_says_where_the_draft_stops_paying():
    alone, fast, slow = (
        [run(1, 100)],
        [run(0.5, 100, drafts=50, accepted=(50,))],
        [run(2, 100, drafts=50, accepted=(50,))],
    )
    entries = [_summary(count, size, runs, alone) for count, size, runs in ((0, 1, alone), (0, 8, alone))]
    entries += [_summary(1, 1, fast, alone), _summary(1, 8, slow, alone)]
    assert table(entries).splitlines() == [
        "| K | acceptance length | batch 1 | batch 8 |",
        "|---|---|---|---|",
        "| no draft |  | 100.0 tokens/s | 100.0 tokens/s |",
        "| 1 | 2.000 | 200.0 (2.00x) | 50.0 (0.50x) |",
    ]
    assert verdict(entries) == "batch 1: fastest with K = 1, 2.00x\nbatch 8: no draft is the fastest"


def test_an_engine_that_does_not_start_says_why(tmp_path):
    """This environment has no vLLM."""
    with pytest.raises(RuntimeError, match="(?s)vLLM ended; its last words:.*No module named 'vllm'"):
        with Engine(sys.executable, tmp_path / "log", model="target"):
            pass


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--batch_sizes=4..1", "`batch_sizes` must be numbers from 1 on, as `1..8` or `1,2,4`, but is '4..1'"),
        ("--rounds=0", "`rounds` must be at least 1, but is 0"),
        ("--engine_args=[1]", "`engine_args` must be a JSON object, got [1]"),
        ("--engine_args={", "`engine_args` is no JSON"),
        (
            "--serving_python=/nowhere/python",
            "`serving_python` /nowhere/python does not exist",
        ),
    ],
)
def test_bad_arguments(monkeypatch, capsys, option, message):
    script = str(ROOT / "scripts" / "benchmark_serving.py")
    given = [*("--target=t", "--draft=d", "--prompts=p", "--output_json=o"), f"--serving_python={sys.executable}"]
    monkeypatch.setattr(sys, "argv", [script, *given, option])
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    assert message in capsys.readouterr().err
