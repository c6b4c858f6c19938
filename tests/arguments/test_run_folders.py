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
