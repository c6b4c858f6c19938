"""A real, unmodified vLLM shows pictures to a tiny Qwen3-VL with a draft: the target's own output, our counts."""

import json

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
