"""The processor of a run: of a target that takes images, where its folder has one."""

import pytest
from tiny_vision import save_adapter, tiny_vision_model, write_processor

from hf_eagle.arguments.groups import DataArguments, TargetArguments
from hf_eagle.targets.loading import files_of_processor
from hf_eagle.targets.merged_folder import save_merged
from hf_eagle.training.target_of_run import processor_of


DATA = DataArguments(train_data=["chats.jsonl"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target") / "base"
    tiny_vision_model("qwen3-vl-moe").save_pretrained(folder)
    return folder


def test_a_target_without_a_processor_is_shown_text(base, caplog):
    """As a checkpoint of training is that was saved alone."""
    assert processor_of(TargetArguments(target=str(base)), DATA) is None
    assert "takes images, but its folder has no processor" in caplog.text


def test_an_adapter_and_what_it_is_merged_into_have_the_processor_of_the_base(base, tmp_path):
    save_adapter(base, tmp_path / "adapter")
    save_merged(str(tmp_path / "adapter"), tmp_path / "merged")
    write_processor(base)
    held = {file.name: file.read_bytes() for file in files_of_processor(str(base))}
    assert held.keys() == {"preprocessor_config.json", "video_preprocessor_config.json"}
    for folder in ("adapter", "merged"):
        found = files_of_processor(str(tmp_path / folder))
        assert {file.name: file.read_bytes() for file in found} == held
        assert processor_of(TargetArguments(target=str(tmp_path / folder)), DATA) is not None
