"""Whose folder is it? A run's own is found again, also when a full disk cut the draft in it."""

import json

import pytest

from hf_eagle.arguments.paths import check_draft_folder, is_draft
from hf_eagle.drafts.kinds import KINDS


CONFIGS = {name: json.dumps({"architectures": [name]}) for kind in KINDS.values() for name in kind.architectures}
CONFIGS["LlamaForCausalLM"] = json.dumps({"architectures": ["LlamaForCausalLM"]})  # a target


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("torn", [0, 1, -1])
def test_a_run_with_a_torn_config_is_known_by_its_checkpoints(torn, name, tmp_path):
    (tmp_path / "config.json").write_text(CONFIGS[name][:torn])
    assert not is_draft(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "config.json").write_text(CONFIGS[name])
    if name == "LlamaForCausalLM":
        with pytest.raises(FileExistsError, match="`output_dir` .* holds somebody else's model or config"):
            check_draft_folder("output_dir", str(tmp_path), overwrite=True)
    else:
        check_draft_folder("output_dir", str(tmp_path), overwrite=True)


@pytest.mark.parametrize("beside", [None, "training_args.bin", "README.md", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("text", ["", "{", CONFIGS["LlamaForCausalLMEagle3"][:-1], CONFIGS["LlamaForCausalLM"], "3"])
def test_a_config_that_was_cut_is_said_to_be_cut(text, beside, tmp_path):
    """Nobody loses anything by one that is no JSON, unless weights lie beside it; a whole one may be anybody's."""
    (tmp_path / "config.json").write_text(text)
    if beside is not None:
        (tmp_path / beside).write_bytes(b"x")
    weights = beside in ("model.safetensors", "pytorch_model.bin")
    if weights or text in ("3", CONFIGS["LlamaForCausalLM"]):
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="`output_dir` .* holds somebody else's model or config"):
                check_draft_folder("output_dir", str(tmp_path), overwrite=overwrite)
        return

    with pytest.raises(FileExistsError, match="`output_dir` .* holds a config.json that is not JSON.* `--overwrite`"):
        check_draft_folder("output_dir", str(tmp_path))
    check_draft_folder("output_dir", str(tmp_path), overwrite=True)
