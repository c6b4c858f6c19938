"""`scripts/train_eagle.py` with a draft of latent attention: trained, resumed, and refused where it does not fit."""

import json

import pytest
from test_train_script import curve, folder, train  # noqa: F401 (folder is a fixture)

from hf_eagle import Eagle3DeepseekV2ForCausalLM, FrozenTarget, load_draft


SIZES = "--q_lora_rank 0 --kv_lora_rank 16 --qk_nope_head_dim 8 --qk_rope_head_dim 4 --v_head_dim 6".split()


@pytest.fixture(scope="module")
def trained(folder):  # noqa: F811
    train(folder, "--output_dir", folder / "mla", "--draft_attention", "mla", *SIZES, "--max_steps", 3)
    return folder / "mla"


def test_it_leaves_a_folder_with_the_sizes_asked_for(trained, folder):  # noqa: F811
    draft = load_draft(trained, FrozenTarget.from_pretrained(str(folder / "target")))
    assert type(draft) is Eagle3DeepseekV2ForCausalLM and sorted(curve(trained)) == [1, 2, 3]
    config = json.loads((trained / "config.json").read_text())
    assert config["architectures"] == ["Eagle3DeepseekV2ForCausalLM"]
    assert [config[name] for name in ("q_lora_rank", "kv_lora_rank", "v_head_dim")] == [None, 16, 6]


def test_resuming_keeps_the_attention(trained, folder):  # noqa: F811
    resumed = ("--output_dir", trained, "--resume_from_checkpoint", "last", "--max_steps", 4)
    printed = train(folder, *resumed, expect=1)
    assert "error: `draft_attention` is llama but" in printed
    printed = train(folder, *resumed, "--draft_attention", "mla", *SIZES, "--v_head_dim", 8, expect=1)
    assert "error: `v_head_dim` is 8 but" in printed and "was trained with 6" in printed
    train(folder, *resumed, "--draft_attention", "mla", *SIZES)
    assert sorted(curve(trained)) == [1, 2, 3, 4]
