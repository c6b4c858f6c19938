"""Both ways of the reading benchmark read the same chats, and measure themselves."""

import json

import pytest
from tiny_files import write_tiny_target

from hf_eagle.data.records import load_records, to_messages
from scripts.dev import benchmark_reading


@pytest.mark.parametrize("only_read", [True, False])
def test_both_ways_measure_themselves(only_read, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_tiny_target(tmp_path / "target")
    benchmark_reading.write_chats(tmp_path / "chats.jsonl", 20, words=5)
    spec = {"path": str(tmp_path / "chats.jsonl"), "target": str(tmp_path / "target"), "max_length": 64}
    for way in benchmark_reading.WAYS:
        benchmark_reading.child({**spec, "way": way, "only_read": only_read})
        measured = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert set(measured) == set(benchmark_reading.MEASURES) and measured["seconds"] > 0


def test_its_chats_have_answers_and_calls(tmp_path):
    benchmark_reading.write_chats(tmp_path / "chats.jsonl", 20, words=5)
    chats = [to_messages(record) for record in load_records(tmp_path / "chats.jsonl")]
    assert len(chats) == 20 and all(chat[-1]["role"] == "assistant" for chat in chats)
    calls = [chat[-1]["tool_calls"][0]["function"] for chat in chats if "tool_calls" in chat[-1]]
    assert [call["arguments"]["top"] for call in calls] == [0, 10]
