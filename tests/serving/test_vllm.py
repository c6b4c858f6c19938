"""A real, unmodified vLLM serves trained drafts: same output as without, same counts as `scripts/evaluate_draft.py`."""

import json
import shutil
import sys
from pathlib import Path

import harness
import pytest
from safetensors.torch import load_file, save_file

from hf_eagle.evaluation.prompts import encode_prompt, load_prompts
from hf_eagle.serving.check import check_draft


@pytest.mark.parametrize("name", ["eagle3", "four_taps", "full_vocabulary", "eagle3.1"])
def test_output_is_the_targets_and_counts_are_the_measured_ones(name, measured_draft, answers, tmp_path):
    draft, measured, tokens = measured_draft(name)
    if name == "eagle3":  # as others have it: published, and fetched into an environment without hf_eagle
        draft = drafted_by_a_stranger(draft, answers, tmp_path)
    served = harness.serve(tmp_path, answers["prompt_token_ids"], draft)

    assert [entry["prompt_token_ids"] for entry in tokens] == answers["prompt_token_ids"]
    assert served["token_ids"] == answers["token_ids"]
    assert [entry["token_ids"] for entry in tokens] == answers["token_ids"]
    assert measured["identical_to_target"] is (True if name == "eagle3" else None)
    harness.assert_counts_equal(served, measured)
    # what keeps this test strong: long answers, answers that end early, and a draft that is right at several positions
    lengths = [len(ids) for ids in answers["token_ids"]]
    assert lengths.count(64) >= 8 and min(lengths) < 32
    assert measured["accepted_per_position"][0] > measured["accepted_per_position"][1] > 0


def drafted_by_a_stranger(draft, answers, folder):
    """The folder that was fetched, after plain transformers gave the target's answers with it, in fewer forwards."""
    found = harness.through_the_hub(folder, draft, answers["prompt_token_ids"][::4])
    assert found["plain"] == found["drafted"] == answers["token_ids"][::4]
    assert found["drafted_forwards"] < 0.8 * found["plain_forwards"]
    assert Path(found["folder"]).is_relative_to(folder / "stranger")
    return found["folder"]


def test_falsified_tap_ids_are_noticed(measured_draft, answers, tmp_path):
    """The same weights behind other tap ids: the output stays the target's, and only the counts can tell."""
    draft, measured, _ = measured_draft("eagle3")
    falsified = shutil.copytree(draft, tmp_path / "falsified")
    config = json.loads((falsified / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 15, 27]
    config["eagle_aux_hidden_state_layer_ids"] = [1, 10, 20]
    (falsified / "config.json").write_text(json.dumps(config))

    served = harness.serve(tmp_path, answers["prompt_token_ids"], falsified)
    assert served["token_ids"] == answers["token_ids"]
    with pytest.raises(AssertionError, match="accepted_per_position"):
        harness.assert_counts_equal(served, measured)
    assert served["accepted_tokens"] < measured["accepted_tokens"]


def test_a_missing_tensor_loads_silently_and_acceptance_collapses(measured_draft, answers, tmp_path):
    """What `check_draft` is for: vLLM starts, answers as the target does, and drafts with untrained numbers."""
    draft, measured, _ = measured_draft("eagle3")
    broken = shutil.copytree(draft, tmp_path / "broken")
    tensors = load_file(draft / "model.safetensors")
    del tensors["fc.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})

    served = harness.serve(tmp_path, answers["prompt_token_ids"], broken)
    assert served["token_ids"] == answers["token_ids"]
    assert served["accepted_tokens"] < measured["accepted_tokens"] / 2
    assert not [finding for finding in check_draft(draft) if finding.level != "note"]
    assert any("`fc.weight` is missing: it loads silently" in finding.text for finding in check_draft(broken))


def test_the_benchmarks_engines_count_the_same(measured_draft, answers, prompts_file, tmp_path):
    """Requests that are decoded together too, one of which ends early and makes room."""
    draft, measured, _ = measured_draft("eagle3")
    values = {"target": harness.TARGET, "draft": draft, "prompts": prompts_file, "batch_sizes": "1,5", "rounds": 1}
    values |= {"dtype": "float32", "serving_python": sys.executable, "output_json": tmp_path / "serving.json"}
    printed = harness.call(harness.project(), "scripts/benchmark_serving.py", *harness.options(values))
    entries = json.loads((tmp_path / "serving.json").read_text())["entries"]
    assert [(entry["num_speculative_tokens"], entry["batch_size"]) for entry in entries] == [
        (0, 1),
        (0, 5),
        (3, 1),
        (3, 5),
    ]
    for entry in entries:
        assert entry["identical_answers"] == 1 and entry["tokens_per_second"] > 0
        drafted = entry["num_speculative_tokens"] > 0
        for name in ("drafts", "accepted_per_position"):
            assert entry[name] == (measured[name] if drafted else None)
        assert entry["acceptance_length"] == (measured["acceptance_length"] if drafted else None)
    assert (tmp_path / "serving.png").stat().st_size > 5000 and "batch 5: " in printed


def test_the_number_of_the_quickstart_is_vllms(tokenizer, tmp_path):
    outputs = [harness.ROOT / "outputs" / name for name in ("quickstart", "quickstart-short")]
    drafts = [folder for folder in outputs if (folder / "acceptance.json").exists()]
    if not drafts:
        pytest.skip("outputs/quickstart is not there; `make quickstart` makes it")
    for draft in drafts:
        measured = json.loads((draft / "acceptance.json").read_text())
        prompts = load_prompts(harness.ASSETS / "prompts" / measured["prompts"], limit=measured["num_prompts"])
        served = harness.serve(
            tmp_path,
            [encode_prompt(prompt, tokenizer) for prompt in prompts],
            draft,
            max_tokens=measured["max_new_tokens"],
            num_speculative_tokens=measured["num_speculative_tokens"],
        )
        harness.assert_counts_equal(served, measured)
        assert measured["identical_to_target"] is True
