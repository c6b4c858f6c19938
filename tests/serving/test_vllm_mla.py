"""A real, unmodified vLLM serves drafts with latent attention for a tiny DeepSeek target: its output, our counts."""

import json
import shutil

import harness
import pytest


VARIANTS = {"plain": {}, "eagle3.1": {"fc_norm": True, "norm_output": True}}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """variant -> (folder of target and draft, what decoding gave), made once."""
    found = {}

    def get(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("mla")
            fields = ["--draft_fields", json.dumps(VARIANTS[name])]
            harness.call(harness.project(), "tests/serving/teach_mla.py", "--folder", folder, *fields)
            found[name] = folder, json.loads((folder / "measured.json").read_text())
        return found[name]

    return get


def serve(folder, measured, draft):
    # where a CPU has AMX, vLLM would take a kernel that knows bfloat16 only
    changes = {"target": folder / "target", "attention_backend": "CPU_MLA", "max_tokens": 32, "max_model_len": 128}
    return harness.serve(folder, measured["prompts"], draft, **changes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_is_the_targets_and_counts_are_the_measured_ones(variant, taught):
    folder, measured = taught(variant)
    served = serve(folder, measured, folder / "draft")
    assert served["token_ids"] == measured["token_ids"]
    harness.assert_counts_equal(served, measured)
    per_position = measured["accepted_per_position"]
    assert measured["drafts"] > per_position[0] > per_position[2] > 0


def test_another_rope_base_is_noticed(taught, tmp_path):
    """The fault a field's peer has: the draft is served with a base that it was not trained with."""
    folder, measured = taught("plain")
    falsified = shutil.copytree(folder / "draft", tmp_path / "falsified")
    text = (falsified / "config.json").read_text()
    assert text.count('"rope_theta": 50000.0') == 2
    (falsified / "config.json").write_text(text.replace('"rope_theta": 50000.0', '"rope_theta": 10.0'))
    served = serve(folder, measured, falsified)
    assert served["token_ids"] == measured["token_ids"]
    with pytest.raises(AssertionError, match="accepted_per_position"):
        harness.assert_counts_equal(served, measured)
