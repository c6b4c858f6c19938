"""Windows in a real vLLM: of a draft that was trained with one; and two faults of drafts that no output shows, the
target's window, and a draft's short context.

Folders are made wrong from a sound one. Decoding by hf_eagle, where a draft sees what it was trained to see and knows
no limit, says what the counters should be.
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


# in chunks shorter than prompt and window; and with the draft's keys in no group of their own
ENGINES = {
    "as by default": {},
    "in chunks": {"max_num_batched_tokens": 20, "max_num_seqs": 4},
    "one group of keys": {"disable_hybrid_kv_cache_manager": True},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_draft_with_a_window_is_shown_it_and_no_more(engine, measured_draft, answers, tmp_path):
    draft, measured, tokens = measured_draft("windowed")
    window, prompts = json.loads((draft / "config.json").read_text())["sliding_window"], answers["prompt_token_ids"]
    assert min(map(len, prompts)) > window and faults(draft, TARGET) == []

    served = harness.serve(tmp_path, prompts, draft, engine_args=json.dumps(ENGINES[engine]))
    assert served["token_ids"] == answers["token_ids"] == [entry["token_ids"] for entry in tokens]
    harness.assert_counts_equal(served, measured)


def test_a_window_in_one_key_is_ignored_or_ends_the_server(measured_draft, answers, prompts_file, tmp_path):
    draft, measured, _ = measured_draft("windowed")
    ignored = rewritten(draft, tmp_path / "ignored", layer_types=...)
    (found,) = faults(ignored, TARGET)
    assert "but `layer_types` names no sliding attention: it is shown all tokens" in found

    served = harness.serve(tmp_path, answers["prompt_token_ids"], ignored)
    assert served["token_ids"] == answers["token_ids"]
    with pytest.raises(AssertionError, match="accepted_per_position"):
        harness.assert_counts_equal(served, measured)
    everything = rewritten(ignored, tmp_path / "everything", sliding_window=..., draft_sliding_window=...)
    how = {"compare_to_target": False, "batch_size": 12}
    harness.assert_counts_equal(served, harness.measure(tmp_path, everything, prompts_file, **how)[0])

    ended = rewritten(draft, tmp_path / "ended", sliding_window=...)
    assert faults(ended, TARGET) == [text for text in faults(ended, TARGET) if text.endswith("missing: loading fails.")]
    with pytest.raises(AssertionError, match="has no attribute 'sliding_window'"):
        harness.serve(tmp_path, answers["prompt_token_ids"][:1], ended)

    repair_draft(ignored, tmp_path / "mended", AutoConfig.from_pretrained(TARGET))
    harness.assert_counts_equal(harness.serve(tmp_path, answers["prompt_token_ids"], tmp_path / "mended"), measured)
