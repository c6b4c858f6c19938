"""Prompts that name their pictures as people do: what training reads is what is measured."""

import json

import pytest
import torch
from picture_records import FORMS, save_pictures
from tiny_tokenizer import tiny_tokenizer
from tiny_vision import chat, image, picture, text, vision_processor

from hf_eagle.data.carrying import to_text
from hf_eagle.evaluation.prompt_batches import PromptBatch, holds_media
from hf_eagle.evaluation.prompts import Prompt, encode_prompt, load_prompts


@pytest.fixture
def folder(tmp_path):
    return save_pictures(tmp_path)


def batch(prompt):
    return PromptBatch.of([prompt], vision_processor()).inputs


def assert_asked_alike(prompt, messages):
    assert holds_media(prompt)
    found, wanted = batch(prompt), batch(Prompt(messages, None, 0))
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        assert x is found[key] is None or torch.equal(found[key], x), key


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_training_data_is_a_prompt(form, folder):
    """Without its last answer; paths start at the folder of the prompts."""
    parts, record = FORMS[form]
    (folder / "p.jsonl").write_text(to_text(record(folder), "the prompt") + "\n")
    (prompt,) = load_prompts(folder / "p.jsonl")
    assert_asked_alike(prompt, parts[:-1])
    with pytest.raises(ValueError, match="holds images or videos, but the target takes text only"):
        encode_prompt(prompt, tiny_tokenizer())


def test_turns_with_a_picture(folder, tmp_path_factory):
    """MT-Bench's form, with the picture in the first turn; `media_root` goes before the folder of the prompts."""
    record = {"question_id": 81, "turns": ["<image>hello", "and?"], "image": "a.png"}
    (folder / "p.jsonl").write_text(json.dumps(record))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    image(3)["image"].save(elsewhere / "a.png")
    for root, shown in ((None, picture(1)), (str(elsewhere), image(3)["image"])):
        (prompt,) = load_prompts(folder / "p.jsonl", media_root=root)
        assert prompt.follow_ups == ("and?",)
        assert_asked_alike(prompt, chat([{"type": "image", "image": shown}, text("hello")]))


def test_a_picture_without_a_place_is_told_with_file_and_record(folder):
    (folder / "p.jsonl").write_text(json.dumps({"prompt": "hello", "images": ["a.png", "b.png"]}))
    with pytest.raises(
        ValueError, match=r"Record 0 of the prompt file .*p.jsonl.* `images` holds more images than .*: 2 for 0"
    ):
        load_prompts(folder / "p.jsonl")
