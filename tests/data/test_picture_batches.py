"""Conversations with images for targets of other forms than Qwen-VL's: token ids, masks, pixels, what is refused."""

import pytest
import torch
from tiny_pictures import CHATS, FILM_CHATS, FILMS, NAMES, TOKENS, any_processor, pictured
from tiny_tokenizer import supervised_texts
from tiny_vision import chat, image, picture, text, video, write_records
from tokenizers.processors import TemplateProcessing

from hf_eagle.data.collators import EagleDataCollator
from hf_eagle.data.media import shown
from hf_eagle.data.vision_dataset import build_vision_dataset


ANSWERS = [[turn["content"] for turn in messages if turn["role"] == "assistant"] for messages in CHATS]
OTHER = [name for name in NAMES if name in TOKENS]  # whose processors are not Qwen's


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_the_processors(name, tmp_path):
    """Ids, types and pixels are those of one call of the processor over the same conversations."""
    processor = any_processor(name)
    data = build_vision_dataset(write_records(tmp_path, CHATS), processor)
    for side in ("right", "left"):
        batch = EagleDataCollator.of(processor, padding_side=side)(list(data))
        mask, wanted = batch.pop("loss_mask"), pictured(processor, CHATS, side)

        assert set(batch) == set(wanted)
        for key in batch:
            assert torch.equal(batch[key], torch.as_tensor(wanted[key])), key
        for row, answers in enumerate(ANSWERS):
            said = supervised_texts(processor.tokenizer, batch["input_ids"][row], mask[row].tolist())
            assert said == [answer + "<|im_end|>" for answer in answers]


@pytest.mark.parametrize("name", FILMS)
def test_videos_and_images_stand_in_their_order(name, tmp_path):
    """Also where both are one tensor (InternVL)."""
    processor = any_processor(name)
    rows = list(build_vision_dataset(write_records(tmp_path, FILM_CHATS), processor))
    batch, wanted = EagleDataCollator.of(processor)(rows), pictured(processor, FILM_CHATS)
    assert set(batch) - {"loss_mask"} == set(wanted)
    for key, x in wanted.items():
        assert torch.equal(batch[key], torch.as_tensor(x)), key


@pytest.mark.parametrize("name", OTHER)
def test_an_image_of_another_size_stops(name, tmp_path):
    """Where a size shows in the number of tokens, also of a family whose types leave out most of them (Llama 4)."""
    processor = any_processor(name)
    rows = list(build_vision_dataset(write_records(tmp_path, CHATS), processor))
    picture(9, 8, 8).save(tmp_path / "1.png")
    if name == "gemma3":  # all of its images are as many
        assert EagleDataCollator.of(processor)(rows)
        return
    with pytest.raises(ValueError, match="images of a batch are .* tokens large, but its rows were made for"):
        EagleDataCollator.of(processor)(rows)


@pytest.mark.parametrize("name", ["gemma3", "llama4", "mistral3"])
def test_a_kind_that_a_processor_takes_none_of_is_refused(name):
    """And not left out, as the processor would."""
    processor, films = any_processor(name), chat([video(3), text("see")], "the cat")
    with pytest.raises(ValueError, match=f"Record 0: .*{type(processor).__name__} takes no videos, but there are 1"):
        build_vision_dataset([{"messages": films}], processor)


@pytest.mark.parametrize("name", OTHER)
def test_special_tokens_are_those_of_the_template(name):
    """A tokenizer that writes the begin of a text by itself, as Gemma's and Llama's do, writes no second one."""
    processor = any_processor(name)
    messages = chat([image(1), text("hello")], "the cat")
    wanted = build_vision_dataset([{"messages": messages}], processor)[0]["input_ids"]
    begin = ("<|bos|>", processor.tokenizer.bos_token_id)
    processor.tokenizer._tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[begin])
    assert processor.tokenizer("a")["input_ids"][0] == begin[1]

    assert build_vision_dataset([{"messages": messages}], processor)[0]["input_ids"] == wanted


@pytest.mark.parametrize("name", OTHER)
def test_types_that_say_nothing_are_left_out(name):
    """Some tokenizers return `token_type_ids` of zeros, which most forwards do not take."""
    processor = any_processor(name)
    known = shown(processor, [_place(processor)], [{"image": [picture(1)], "video": []}], return_tensors="pt")
    processor.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in processor.tokenizer("a")

    again = shown(processor, [_place(processor)], [{"image": [picture(1)], "video": []}], return_tensors="pt")
    assert set(again) == set(known)
    assert ("token_type_ids" in again) == (name == "gemma3") and ("mm_token_type_ids" in again) == (name == "gemma4")


def _place(processor) -> str:
    return f"see {processor.image_token} this"
