"""Loading targets that are shown images in other forms than Qwen-VL's, with and without that part, and processors."""

import importlib.util
import json

import pytest
import torch
from tiny_pictures import CHATS, NAMES, any_processor, pictured, pictures_tokenizer, tiny_pictures_model
from transformers import LlavaConfig

from hf_eagle.arguments.groups import DataArguments, TargetArguments
from hf_eagle.targets.loading import load_causal_lm, load_processor, takes_media, why_only_text
from hf_eagle.targets.target import FrozenTarget
from hf_eagle.training.target_of_run import load_target, processor_of


TORCHVISION = importlib.util.find_spec("torchvision") is not None
# of which the part for text is a model of its own, to which nothing is missing
TEXT_ALONE = {"qwen3.5": "Qwen3_5ForCausalLM", "qwen3.5-moe": "Qwen3_5MoeForCausalLM", "llama4": "Llama4ForCausalLM"}
DATA = DataArguments(train_data=["chats.jsonl"])


@pytest.mark.parametrize("name", NAMES)
def test_the_part_that_is_shown_images_is_loaded_for_data_that_hold_some(name, tmp_path):
    """The text of both forms has the same features, so a run on text loads no more than it needs."""
    model = tiny_pictures_model(name)
    model.save_pretrained(tmp_path)
    assert takes_media(str(tmp_path)) and why_only_text(str(tmp_path)) is None

    whole = FrozenTarget.from_pretrained(str(tmp_path), [2, 4], media=True)
    assert type(whole.model) is type(model)
    batch = pictured(any_processor(name), CHATS[:1])
    torch.testing.assert_close(whole(**batch).taps, FrozenTarget(model, [2, 4])(**batch).taps, rtol=1e-5, atol=1e-5)

    text = load_causal_lm(str(tmp_path))
    assert type(text).__name__ == TEXT_ALONE.get(name, type(model).__name__)
    ids = torch.arange(20, 40)[None]
    torch.testing.assert_close(FrozenTarget(text, [2, 4])(ids).taps, whole(ids).taps, rtol=1e-5, atol=1e-5)


def test_a_run_loads_the_part_that_its_data_need(tmp_path):
    tiny_pictures_model("qwen3.5").save_pretrained(tmp_path)
    arguments = TargetArguments(target=str(tmp_path), target_dtype="float32")
    found = [type(load_target(arguments, media).model).__name__ for media in (False, True)]
    assert found == ["Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"]


def save_processor(name, folder, **described):
    """The files of a processor as the Hub has them, and the target's config."""
    tiny_pictures_model(name).config.save_pretrained(folder)
    pictures_tokenizer(name).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(described))


def test_gemmas_processors_are_read_with_their_own_numbers(tmp_path):
    """Without torchvision too, where Gemma 4's takes no videos."""
    size = {"do_resize": False, "patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    images = {"image_processor_type": "Gemma4ImageProcessor", **size}
    described = {"image_processor": images, "image_seq_length": 70, "processor_class": "Gemma4Processor"}
    described["feature_extractor"] = {"feature_extractor_type": "Gemma4AudioFeatureExtractor"}
    described["video_processor"] = {"video_processor_type": "Gemma4VideoProcessor"}
    (tmp_path / "gemma4").mkdir()
    save_processor("gemma4", tmp_path / "gemma4", **described)

    own = any_processor("gemma3").image_processor.to_dict()
    described = {"image_processor": own, "image_seq_length": 4, "processor_class": "Gemma3Processor"}
    (tmp_path / "gemma3").mkdir()
    save_processor("gemma3", tmp_path / "gemma3", **described)

    for name, tokens in (("gemma4", 70), ("gemma3", 4)):
        found = processor_of(TargetArguments(target=str(tmp_path / name)), DATA)
        assert type(found).__name__ == {"gemma4": "Gemma4Processor", "gemma3": "Gemma3Processor"}[name]
        assert found.image_seq_length == tokens
        made, wanted = pictured(found, CHATS[:1]), pictured(any_processor(name), CHATS[:1])
        assert made.keys() == wanted.keys() and all(torch.equal(made[key], wanted[key]) for key in wanted)


@pytest.mark.skipif(TORCHVISION, reason="torchvision is installed, so nothing is missing")
@pytest.mark.parametrize(("name", "kind"), [("mistral3", "PixtralProcessor"), ("llama4", "Llama4Processor")])
def test_a_processor_that_needs_torchvision_says_so_and_text_goes_on(name, kind, tmp_path, caplog):
    images = {"image_processor_type": kind.replace("Processor", "ImageProcessor")}
    save_processor(name, tmp_path, processor_class=kind, image_processor=images)
    with pytest.raises(ImportError, match=f"The processor of {tmp_path} needs torchvision: "):
        load_processor(str(tmp_path))
    assert processor_of(TargetArguments(target=str(tmp_path)), DATA) is None
    assert f"The target {tmp_path} gets only text. The processor of {tmp_path} needs torchvision" in caplog.text


def test_a_type_that_is_shown_no_images_is_named(tmp_path, caplog):
    LlavaConfig().save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text("{}")
    assert takes_media(str(tmp_path)) and "gemma3" in why_only_text(str(tmp_path))
    assert processor_of(TargetArguments(target=str(tmp_path)), DATA) is None
    assert f"The target {tmp_path} gets only text: images and videos are shown to targets of" in caplog.text
    assert "and it is a llava." in caplog.text
