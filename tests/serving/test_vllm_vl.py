"""A real, unmodified vLLM shows pictures to a tiny Qwen3-VL with a draft: the target's own output, our counts."""

import json
import sys

import harness
import pytest


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Folder of target and draft, the prompts, and what decoding gave."""
    folder = tmp_path_factory.mktemp("vl")
    harness.call(harness.project(), "tests/serving/teach_vl.py", "--folder", folder, "--rope", "mrope")
    return folder, json.loads((folder / "measured.json").read_text())


@pytest.mark.parametrize(("kind", "count"), [("all", 1), ("text", 3)])
def test_output_is_the_targets_and_counts_are_the_measured_ones(kind, count, taught):
    """Prompts of no picture, of one and of two.

    Behind pictures one token is drafted: vLLM 0.32's runner for CPUs puts the keys of further ones where the target's
    time axis says, which is not behind the prompt; the output stays the target's, but fewer tokens are accepted.
    """
    folder, found = taught
    prompts = [p for p in found["prompts"] if kind == "all" or not p["images"]]
    assert {len(p["images"]) for p in prompts} == ({0, 1, 2} if kind == "all" else {0})
    measured = found[kind][str(count)]
    changes = {"target": folder / "target", "max_images": 2, "max_tokens": measured["max_new_tokens"]}
    changes |= {"num_speculative_tokens": count, "max_num_seqs": 1, "max_model_len": 256}
    served = harness.serve(folder, prompts, folder / "draft", **changes)
    assert served["token_ids"] == measured["token_ids"]
    harness.assert_counts_equal(served, measured)
    # what keeps this test strong
    assert 0 < measured["accepted_per_position"][-1] < measured["drafts"]


def test_the_benchmark_sends_pictures_as_a_client_does_and_counts_the_same(taught, tmp_path):
    """Its chats with data addresses become the prompts that ours are; each category is counted by itself."""
    folder, found = taught
    measured = found["all"]["1"]
    values = {"target": folder / "target", "draft": folder / "draft", "prompts": folder / "prompts.jsonl"}
    values |= {"num_speculative_tokens": 1, "batch_sizes": "1,3", "rounds": 1, "max_model_len": 256}
    values |= {"max_new_tokens": measured["max_new_tokens"], "dtype": "float32"}
    values |= {"serving_python": sys.executable, "output_json": tmp_path / "serving.json"}
    printed = harness.call(harness.project(), "scripts/benchmark_serving.py", *harness.options(values))
    drafted = [e for e in json.loads((tmp_path / "serving.json").read_text())["entries"] if "categories" in e]
    assert [(e["num_speculative_tokens"], e["batch_size"]) for e in drafted] == [(1, 1), (1, 3)]
    for entry in drafted:
        assert entry["identical_answers"] == 1
        assert (entry["drafts"], entry["accepted_per_position"]) == (
            measured["drafts"],
            measured["accepted_per_position"],
        )
        kinds = entry["categories"]
        assert {kind: x["prompts"] for kind, x in kinds.items()} == {"0 pictures": 2, "1 pictures": 3, "2 pictures": 1}
        assert sum(x["drafts"] for x in kinds.values()) == measured["drafts"]
        text = found["text"]["1"]
        assert kinds["0 pictures"]["drafts"] == text["drafts"]
        assert kinds["0 pictures"]["accepted_per_position"] == text["accepted_per_position"]
    assert "| K | 0 pictures (2) | 1 pictures (3) | 2 pictures (1) |" in printed
