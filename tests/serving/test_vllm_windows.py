"""Two faults of served drafts that no output shows, in a real vLLM: a target's window, and a draft's short context.

Both folders are made wrong from a sound one. Decoding by hf_eagle, where a draft sees all tokens and knows no limit,
says what the counters should be.
"""

import json
import shutil

import harness
import pytest
from harness import TARGET
from transformers import AutoConfig

from hf_eagle.serving.check import check_draft
from hf_eagle.serving.repair import repair_draft


# longer than the prompts, shorter than prompts and answers
WINDOW = 60
CONTEXT = 64


def rewritten(folder, into, **fields):
    """A copy of a model's folder with fields of its config changed; `...` takes one out."""
    shutil.copytree(folder, into)
    config = json.loads((into / "config.json").read_text()) | fields
    (into / "config.json").write_text(json.dumps({name: x for name, x in config.items() if x is not ...}))
    return into


@pytest.fixture(scope="module")
def sliding_target(tmp_path_factory):
    """SmolLM2 with a window in all of its layers: as a Mistral, which is the same model otherwise."""
    window = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": WINDOW}
    return rewritten(TARGET, tmp_path_factory.mktemp("window") / "target", **window)


def faults(draft, target):
    return [x.text for x in check_draft(draft, AutoConfig.from_pretrained(target)) if x.level == "fault"]


def test_a_target_whose_layers_all_slide_gives_its_window_to_the_draft(
    measured_draft, answers, sliding_target, tmp_path
):
    wrong, prompts = measured_draft("eagle3")[0], answers["prompt_token_ids"]
    assert max(map(len, prompts)) < WINDOW < min(map(len, prompts)) + 64
    found = faults(wrong, sliding_target)
    assert len(found) == 1 and "all layers of the target slide" in found[0]
    right = tmp_path / "right"
    repair_draft(wrong, right, AutoConfig.from_pretrained(sliding_target))
    assert faults(right, sliding_target) == []

    unseen = tmp_path / "prompts.jsonl"
    shutil.copy(answers["train_data"].parent / "unseen.jsonl", unseen)
    how = {"target": sliding_target, "compare_to_target": False, "batch_size": 12}
    measured, tokens = harness.measure(tmp_path, right, unseen, **how)
    served = {draft: harness.serve(tmp_path, prompts, draft, target=sliding_target) for draft in (wrong, right)}

    for each in served.values():  # both are lossless
        assert each["token_ids"] == [entry["token_ids"] for entry in tokens]
    harness.assert_counts_equal(served[right], measured)
    with pytest.raises(AssertionError, match="accepted_per_position"):
        harness.assert_counts_equal(served[wrong], measured)

    # "full_attention" does not undo it, though it says what is meant
    full = rewritten(wrong, tmp_path / "full", layer_types=["full_attention"])
    assert "all layers of the target slide" in faults(full, sliding_target)[0]
    again = harness.serve(tmp_path, prompts, full, target=sliding_target)
    assert again["accepted_per_position"] == served[wrong]["accepted_per_position"]


def test_beyond_its_own_context_the_draft_does_not_run_for_the_whole_batch(measured_draft, answers, tmp_path):
    """The counter of drafts goes on, over proposals of token 0."""
    draft, measured, _ = measured_draft("eagle3")
    short = rewritten(draft, tmp_path / "short", max_position_embeddings=CONTEXT)
    (found,) = (text for text in faults(short, TARGET) if "does not run" in text)
    assert "`max_position_embeddings` is 64, less than the target's 8192: as soon as one sequence is longer" in found

    prompts = answers["prompt_token_ids"]
    served = harness.serve(tmp_path, prompts, short)
    assert served["token_ids"] == answers["token_ids"]
    assert served["accepted_tokens"] < measured["accepted_tokens"] / 2

    # one long prompt is enough for all others of its batch
    beyond = [prompts[0] * 3, *prompts]
    assert len(beyond[0]) > CONTEXT > max(map(len, prompts)) + 16
    counted = [
        harness.serve(tmp_path, asked, short, max_tokens=8, max_num_seqs=16)["accepted_tokens"]
        for asked in (prompts, beyond)
    ]
    assert counted[0] > 0 == counted[1]

    repair_draft(short, tmp_path / "mended", AutoConfig.from_pretrained(TARGET))
    assert faults(tmp_path / "mended", TARGET) == []
    harness.assert_counts_equal(harness.serve(tmp_path, prompts, tmp_path / "mended"), measured)
