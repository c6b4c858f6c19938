"""How many tokens to draft at which load: from measurements to what vLLM reads, commands and cards."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from forks import ROOT
from hypothesis import given
from hypothesis import strategies as st

from hf_eagle.serving import schedule
from hf_eagle.serving.commands import serve_commands
from hf_eagle.serving.schedule import FIELD, fastest_counts, schedule_fields, schedule_of, takes_schedule, told_schedule


sys.path.append(str(ROOT / "scripts"))
import benchmark_serving  # noqa: E402


def entries(speedups: dict[int, dict[int, float]]) -> list[dict]:
    """`{requests: {K: speedup}}` as a measurement; K of 0 is as fast as itself."""
    return [
        {"batch_size": size, "num_speculative_tokens": count, "speedup": speedup}
        for size, row in speedups.items()
        for count, speedup in ({0: 1.0} | row).items()
    ]


MEASURED = {1: {2: 1.2, 4: 1.4}, 4: {2: 1.2, 4: 1.21}, 16: {2: 0.9, 4: 0.7}}


def test_fewest_tokens_of_those_that_are_as_fast_and_none_where_none_pays():
    assert fastest_counts(entries(MEASURED)) == {1: 4, 4: 2, 16: 0}
    assert fastest_counts(entries({8: {3: 1.005}})) == {8: 0}
    assert fastest_counts(entries({8: {3: 1.02}})) == {8: 3}


def test_borders_lie_between_loads_and_neighbours_are_joined():
    assert schedule_of(entries(MEASURED)) == [[1, 2, 4], [3, 8, 2], [9, 16, 0]]
    assert schedule_of(entries({1: {3: 2}, 2: {3: 2}, 9: {3: 0.5}})) == [[1, 4, 3], [5, 9, 0]]
    assert schedule_of(entries({4: {3: 2}})) == [[1, 4, 3]]


@given(
    st.dictionaries(
        st.integers(1, 300), st.dictionaries(st.integers(1, 8), st.floats(0.2, 4), max_size=4), min_size=1, max_size=6
    )
)
def test_every_load_has_one_number_and_a_measured_one_its_own(measured):
    made, counts = schedule_of(entries(measured)), fastest_counts(entries(measured))
    assert made[0][0] == 1 and made[-1][1] == max(measured)
    assert all(first <= last for first, last, _ in made)
    for (_, last, count), (first, _, other) in zip(made, made[1:], strict=False):
        assert first == last + 1 and count != other
    for size, count in counts.items():
        assert [each for first, last, each in made if first <= size <= last] == [count]


def test_it_is_told_in_words_and_as_fields():
    made = schedule_of(entries(MEASURED))
    assert told_schedule(made) == "1 to 2 requests: 4 tokens; 3 to 8: 2 tokens; from 9: no draft"
    assert told_schedule([[1, 1, 1], [2, 9, 0]]) == "1 requests: 1 token; from 2: no draft"
    assert schedule_fields(made) == {"num_speculative_tokens": 4, FIELD: made}
    assert schedule_fields([[1, 9, 3]]) == {"num_speculative_tokens": 3}
    assert schedule_fields([[1, 9, 0]]) == {}

    command = serve_commands("t", "d", 3, schedule=made)["vLLM"]
    assert f'"num_speculative_tokens": 4, "{FIELD}": [[1, 2, 4], [3, 8, 2], [9, 16, 0]]' in command
    assert FIELD not in serve_commands("t", "d", 3)["vLLM"]


@pytest.mark.parametrize("field", [FIELD, "num_speculative_tokens"])
def test_a_server_is_asked_whether_it_takes_one(field, tmp_path, monkeypatch):
    (tmp_path / "vllm" / "config").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "vllm" / "config" / "speculative.py").write_text(f"    {field}: list | None = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert takes_schedule(sys.executable) == (field == FIELD)
    monkeypatch.setattr(subprocess, "run", lambda *args, **how: SimpleNamespace(stdout="no vLLM here"))
    assert schedule.takes_schedule("python") is False


@pytest.mark.parametrize(
    ("measured", "takes", "said"),
    [
        (MEASURED, True, f'from 9: no draft. In --speculative-config: "num_speculative_tokens": 4, "{FIELD}": [[1, 2'),
        (MEASURED, False, "takes no such schedule: start it with the number for your load"),
        ({1: {3: 2}, 4: {3: 2}}, True, "from 1 requests: 3 tokens"),
        ({1: {3: 0.5}, 4: {3: 0.5}}, True, "from 1 requests: no draft"),
        ({1: {3: 2}}, True, ""),
    ],
)
def test_the_script_says_how_to_start_the_server(measured, takes, said):
    found = entries(measured)
    told = benchmark_serving.advice({"entries": found, "schedule": schedule_of(found), "takes_schedule": takes})
    assert (said in told) if said else told == ""
    if FIELD in told:
        fields = json.loads("{" + told.partition("In --speculative-config: ")[2] + "}")
        assert fields == schedule_fields(schedule_of(found))
