"""A draft's first weights come from the seed alone."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_loading import write_adapter
from test_train_script import folder, train  # noqa: F401 (a fixture)

from hf_eagle.arguments.groups import DraftArguments, TargetArguments
from hf_eagle.targets.loading import load_tokenizer
from hf_eagle.targets.merged_folder import save_merged
from hf_eagle.targets.target import FrozenTarget
from hf_eagle.training.parts import draft_for


@pytest.mark.parametrize("drawn", [0, 1, 1000])
@pytest.mark.parametrize("method", ["eagle3", "eagle1", "dflash"])
def test_what_loading_draws_does_not_change_it(method, drawn, folder):  # noqa: F811
    path = str(folder / "target")
    target, tokenizer = FrozenTarget.from_pretrained(path), load_tokenizer(path)
    size = {"draft_vocab_size": target.vocab_size} if method == "eagle3" else {}
    arguments = TargetArguments(target=path), DraftArguments(method=method, draft_init="random", **size)

    def weights(seed, drawn):
        torch.rand(drawn)
        return draft_for(target, tokenizer, None, *arguments, None, seed).state_dict()

    first, again, other = weights(7, 0), weights(7, drawn), weights(8, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_an_adapter_and_its_merged_folder_begin_alike(folder, tmp_path):  # noqa: F811
    """Which was the other result of the same command, started again where the merged folder was there already."""
    adapter, merged = write_adapter(tmp_path / "adapter", folder / "target"), tmp_path / "merged"
    save_merged(str(adapter), merged)
    for name, target in (("first", adapter), ("again", merged)):
        train(folder, "--output_dir", tmp_path / name, "--target", target, "--max_steps", 1, "--logging_steps", 1)
    losses = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"][0]["loss"]
        for name in ("first", "again")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "again")]
    assert weights[0].keys() == weights[1].keys()
