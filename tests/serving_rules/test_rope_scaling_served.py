"""A draft with a RoPE scaling of its own passes the check, and the servers' rotation as restated gives its logits."""

import json

import pytest
import torch
from tiny import tiny_llama, tiny_pair

from hf_eagle.arguments.groups import DraftArguments, TargetArguments
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.kinds import KINDS, kind_of_method
from hf_eagle.serving.check import check_draft
from hf_eagle.serving.probe import probe
from hf_eagle.targets.target import FrozenTarget
from hf_eagle.training.parts import config_of_draft


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SCALINGS = {
    "default": {},
    "linear": {"factor": 2.0, "rope_theta": 1e3},
    "llama3": LLAMA3,
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
}
YARN = {"rope_type": "yarn", "rope_theta": 5e4, **SCALINGS["yarn"]}
KINDS_AND_ATTENTION = [
    *((next(iter(kind.methods)), "auto") for kind in KINDS.values()),
    ("eagle3", "mla"),
]


def mask_of(method):
    """What is otherwise chosen by the data."""
    return {"mask_token_id": 0} if "mask_token_id" in kind_of_method(method).own else {}


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("method", "attention"), KINDS_AND_ATTENTION)
def test_the_check_accepts_it_and_servers_rotate_alike(method, attention, name, target_folder, tmp_path):
    if attention == "mla" and name in ("linear", "llama3"):
        return  # refused, since servers run it as YaRN
    target, scaling = FrozenTarget(tiny_llama()), json.dumps({"rope_type": name, **SCALINGS[name]})
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    mla = {"draft_attention": "mla", **sizes} if attention == "mla" else {}
    arguments = DraftArguments(method=method, draft_rope_scaling=scaling, **mla, **mask_of(method))
    config = config_of_draft(target.config, TargetArguments(str(target_folder)), arguments)
    torch.manual_seed(1)
    draft = new_draft(config, target.embedding_weight(), head_weight=target.head_weight())
    draft.save_pretrained(tmp_path)
    findings = [str(found) for found in check_draft(tmp_path, target.config) if found.level != "note"]
    assert findings == [] and probe(tmp_path, target_folder, target.config) == []


@pytest.mark.parametrize(("method", "attention"), KINDS_AND_ATTENTION)
@pytest.mark.parametrize("mscale", [0.7, 1.0])
def test_a_draft_of_a_target_with_mscale_is_trained_as_served(method, attention, mscale, target_folder, tmp_path):
    """Servers read `mscale` and `mscale_all_dim` in latent attention only."""
    target = FrozenTarget(tiny_llama())
    target.config.rope_parameters = {**YARN, "mscale": mscale, "mscale_all_dim": mscale}
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    mla = {"draft_attention": "mla", **sizes} if attention == "mla" else {}
    arguments = DraftArguments(method=method, **mla, **mask_of(method))
    config = config_of_draft(target.config, TargetArguments(str(target_folder)), arguments)
    torch.manual_seed(1)
    new_draft(config, target.embedding_weight(), head_weight=target.head_weight()).save_pretrained(tmp_path)
    assert probe(tmp_path, target_folder, target.config) == []


@pytest.mark.parametrize(("factor", "reached"), [(2.0, 256), (4.0, 512), (8.0, 1024)])
def test_positions_beyond_the_table_of_yarn_are_told(factor, reached, tmp_path):
    """A context of 512, and a table of `factor` times 128 positions."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor, "original_max_position_embeddings": 128}
    target, draft = tiny_pair(40, rope_parameters=rope)
    draft.save_pretrained(tmp_path)
    found = [str(x) for x in check_draft(tmp_path, target.config) if "YaRN" in x.text]
    if reached < 512:
        assert len(found) == 1 and f"{reached} positions, and `max_position_embeddings` is 512" in found[0]
        assert found[0].startswith("vLLM: (note) ") and f"serve at most {reached} tokens" in found[0]
    else:
        assert found == []
