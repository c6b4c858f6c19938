"""A real, unmodified vLLM serves an EAGLE-1 draft (`method: eagle`): the target's output, and our counts."""

import json

import harness
import pytest


@pytest.fixture(scope="module")
def served(measured_draft, answers, tmp_path_factory):
    draft, *_ = measured_draft("eagle1")
    return harness.serve(tmp_path_factory.mktemp("eagle1"), answers["prompt_token_ids"], draft, method="eagle")


def test_output_is_the_targets_and_counts_are_the_measured_ones(measured_draft, answers, served):
    draft, measured, tokens = measured_draft("eagle1")
    config = json.loads((draft / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle", "EagleLlamaForCausalLM"]
    assert [entry["prompt_token_ids"] for entry in tokens] == answers["prompt_token_ids"]
    assert served["token_ids"] == answers["token_ids"]
    assert [entry["token_ids"] for entry in tokens] == answers["token_ids"]
    harness.assert_counts_equal(served, measured)
    # a draft that is right at several positions, and not always
    per_position = measured["accepted_per_position"]
    assert measured["drafts"] > per_position[0] > per_position[1] > 0


def test_a_falsified_feature_is_noticed(measured_draft, answers, served, prompts_file, tmp_path):
    """Hidden states in front of the final norm: the output stays the target's, and only the counts can tell."""
    draft, measured, _ = measured_draft("eagle1")
    how = {"script": "tests/serving/evaluate_falsified.py", "compare_to_target": False, "batch_size": 12}
    falsified, tokens = harness.measure(tmp_path, draft, prompts_file, **how)
    assert [entry["token_ids"] for entry in tokens] == answers["token_ids"]
    with pytest.raises(AssertionError, match="accepted_per_position"):
        harness.assert_counts_equal(served, falsified)
    assert falsified["accepted_tokens"] < measured["accepted_tokens"]
