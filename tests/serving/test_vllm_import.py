"""A trained draft, rewritten as other projects publish theirs and imported again, serves as the original does."""

import json

import harness
import pytest
import torch
from safetensors.torch import load_file, save_file


TAP_IDS = "eagle_aux_hidden_state_layer_ids"
_OF_LAYER = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")
_OF_LAYER += (
    "num_hidden_layers",
    "rms_norm_eps",
    "max_position_embeddings",
    "vocab_size",
    "rope_theta",
    "rope_scaling",
)


def as_modelopt(config, tensors):
    """`layers.0.`, tokens in another order than that of their ids, no `t2d`, output ids of the taps."""
    order = torch.randperm(len(tensors["d2t"]), generator=torch.Generator().manual_seed(0))
    ids = (torch.arange(len(order)) + tensors.pop("d2t"))[order]
    del tensors["t2d"]
    tensors |= {"d2t": ids - torch.arange(len(order)), "lm_head.weight": tensors["lm_head.weight"][order]}
    eagle_config = {
        TAP_IDS: [i - 1 for i in config[TAP_IDS]],
        "use_aux_hidden_state": True,
        "use_last_layernorm": True,
        "next_layer_regular": True,
        "parallel_draft_step": 1,
        "parallel_draft_heads_num_layers": 1,
    }
    kept = {name: config[name] for name in (*_OF_LAYER, "draft_vocab_size", "torch_dtype", "model_type")}
    return {**kept, "architectures": ["LlamaForCausalLMEagle3"], "eagle_config": eagle_config}, tensors


def as_speculators(config, tensors):
    """The layer's fields in a mapping of their own, entry ids of the taps, the target's embeddings in the file."""
    tensors["embed_tokens.weight"] = load_file(harness.TARGET / "model.safetensors")["model.embed_tokens.weight"]
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": {name: config[name] for name in (*_OF_LAYER, "model_type")},
        "draft_vocab_size": config["draft_vocab_size"],
        "norm_before_residual": False,
        TAP_IDS: config[TAP_IDS],
    }, tensors


@pytest.fixture(scope="module")
def imported(measured_draft, tmp_path_factory):
    """form -> folder of the draft after it went through that form."""
    draft, *_ = measured_draft("eagle3")
    folder, found = tmp_path_factory.mktemp("imported"), {}
    for rewrite in (as_modelopt, as_speculators):
        form = rewrite.__name__.removeprefix("as_")
        config, tensors = json.loads((draft / "config.json").read_text()), load_file(draft / "model.safetensors")
        config, tensors = rewrite(config, tensors)
        foreign = folder / f"foreign-{form}"
        foreign.mkdir()
        tensors = {name.replace("midlayer.", "layers.0."): x.contiguous() for name, x in tensors.items()}
        save_file(tensors, foreign / "model.safetensors")
        (foreign / "config.json").write_text(json.dumps(config))
        options = harness.options({"target": harness.TARGET, "output_dir": folder / form})
        printed = harness.call(harness.project(), "scripts/import_draft.py", foreign, *options)
        assert f"in the form `{form}`" in printed
        found[form] = folder / form
    return found


@pytest.mark.parametrize("form", ["modelopt", "speculators"])
def test_the_imported_folder_is_the_original_one(form, imported, measured_draft):
    draft, *_ = measured_draft("eagle3")
    before, after = (load_file(folder / "model.safetensors") for folder in (draft, imported[form]))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((imported[form] / "config.json").read_text()) == json.loads((draft / "config.json").read_text())


def test_output_is_the_targets_and_counts_are_the_originals(imported, measured_draft, answers, tmp_path):
    _, measured, _ = measured_draft("eagle3")
    served = harness.serve(tmp_path, answers["prompt_token_ids"], imported["modelopt"])
    assert served["token_ids"] == answers["token_ids"]
    harness.assert_counts_equal(served, measured)
