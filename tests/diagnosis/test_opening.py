"""A folder that cannot be read as it was trained is mended in a copy, and what that is worth is told first."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from taught_drafts import ANSWER, target_and_tokenizer, taught, word_prompts

from hf_eagle.diagnosis.case import Case
from hf_eagle.diagnosis.diagnose import diagnose
from hf_eagle.diagnosis.opening import open_draft
from hf_eagle.diagnosis.sample import Sample
from hf_eagle.evaluation.measurement import DecodingSettings


SETTINGS = DecodingSettings(num_speculative_tokens=3, max_new_tokens=ANSWER, batch_size=4)


@pytest.fixture(scope="module")
def models():
    target, tokenizer = target_and_tokenizer()
    return target, tokenizer, taught(target, tokenizer, word_prompts(), draft_vocab_size=60)


def saved(models, folder, change_tensors=None, **fields):
    """A draft's folder with changed tensors, or fields of its config.json."""
    models[2].save_pretrained(folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    if change_tensors is not None:
        change_tensors(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | fields))
    return str(folder)


def opened(models, folder):
    target = models[0]
    found = open_draft(folder, target.config, torch.float32)
    found.draft.attach(target)
    return found


def diagnosed(models, found):
    return diagnose(Case(found.draft, Sample(models[0], models[1], word_prompts(), SETTINGS)), found, confirm=False)


def absolute(tensors):
    tensors["d2t"] = tensors["d2t"] + torch.arange(len(tensors["d2t"]))


def test_absolute_ids_are_named_first(models, tmp_path):
    found = opened(models, saved(models, tmp_path / "draft", absolute))
    assert found.mended and found.served_offsets is not None
    told = diagnosed(models, found).causes
    assert told[0].cause == "folder" and "d2t" in told[0].evidence
    # what a server makes of it is less, and the mended copy is the sound draft again
    (sound,) = Sample(models[0], models[1], word_prompts(), SETTINGS).replayed([models[2]])
    assert told[0].acceptance_length == pytest.approx(sound.acceptance_length()) and told[0].gain > 0.5


def test_two_spellings_that_disagree(models, tmp_path):
    found = opened(models, saved(models, tmp_path / "draft", rope_theta=123_456.0))
    assert 123_456.0 in found.bases and found.faults
    assert diagnosed(models, found).causes[0].cause == "folder"


def test_a_sound_folder(models, tmp_path):
    found = opened(models, saved(models, tmp_path / "draft"))
    assert not found.faults and not found.mended
    assert "folder" not in [one.cause for one in diagnosed(models, found).causes]


def test_what_cannot_be_mended_is_refused_as_ever(models, tmp_path):
    folder = saved(models, tmp_path / "draft", lambda tensors: tensors.pop("midlayer.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match="up_proj"):
        open_draft(folder, models[0].config, torch.float32)
