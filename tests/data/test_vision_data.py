"""Conversations with images and videos as token ids, loss masks and pixels."""

import base64
import logging

import pytest
import torch
from tiny_tokenizer import encode_conversation, supervised_texts, tiny_tokenizer
from tiny_vision import (
    CHATS,
    NAMES,
    chat,
    image,
    picture,
    processed,
    text,
    vision_processor,
    vision_tokenizer,
    write_records,
)

from hf_eagle.data.collators import EagleDataCollator
from hf_eagle.data.conversations import MaskOptions, build_dataset
from hf_eagle.data.media import has_media, read_media_record
from hf_eagle.data.packing import pack_dataset
from hf_eagle.data.vision_dataset import build_vision_dataset


ANSWERS = [[turn["content"] for turn in messages if turn["role"] == "assistant"] for messages in CHATS]


@pytest.fixture
def records(tmp_path):
    return write_records(tmp_path, CHATS)


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_the_processors(name, records):
    """Ids, types and pixels are those of one call of the processor over the same conversations."""
    processor = vision_processor(name)
    data = build_vision_dataset(records, processor)
    for side in ("right", "left"):
        batch = EagleDataCollator.of(processor, padding_side=side)(list(data))
        mask = batch.pop("loss_mask")
        wanted = processed(processor, CHATS, side)
        assert set(batch) == set(wanted)
        for key in batch:
            assert torch.equal(batch[key], torch.as_tensor(wanted[key])), key
        assert not (mask * batch["mm_token_type_ids"]).any()
        for row, answers in zip(range(4), ANSWERS, strict=True):
            said = supervised_texts(processor.tokenizer, batch["input_ids"][row], mask[row].tolist())
            assert said == [answer + "<|im_end|>" for answer in answers]


def test_the_mask_of_text_is_that_of_text(records):
    """Without media nothing is different; media move the rest of the mask along, and their tokens are not in it."""
    processor = vision_processor()
    data = build_vision_dataset(records, processor)
    plain = encode_conversation(CHATS[1], vision_tokenizer())
    assert data[1]["input_ids"] == plain["input_ids"] and data[1]["loss_mask"] == plain["loss_mask"]
    last = build_vision_dataset(records, processor, options=MaskOptions(last_turn_only=True))
    said = supervised_texts(processor.tokenizer, last[2]["input_ids"], last[2]["loss_mask"])
    assert said == [ANSWERS[2][1] + "<|im_end|>"]
    batch = EagleDataCollator.of(processor)([data[1]])
    assert set(batch) == {"input_ids", "attention_mask", "loss_mask"}  # no image, no pixels


def test_marked_templates(records):
    template = vision_processor().chat_template.replace(
        "{%- if message.content is string %}{{- message.content }}{% else %}",
        "{%- if message.role == 'assistant' %}{% generation %}{{- message.content }}{% endgeneration %}"
        "{%- elif message.content is string %}{{- message.content }}{% else %}",
    )
    processor = vision_processor()
    processor.chat_template = template
    data = build_vision_dataset(records, processor)
    for row, answers in zip(data, ANSWERS, strict=True):
        assert supervised_texts(processor.tokenizer, row["input_ids"], row["loss_mask"]) == answers


def test_too_long_ones_are_left_out_whole(records, caplog):
    processor = vision_processor()
    whole = build_vision_dataset(records, processor)
    lengths = [len(ids) for ids in whole["input_ids"]]
    limit = sorted(lengths)[1]
    with caplog.at_level(logging.WARNING):
        kept = build_vision_dataset(records, processor, max_length=limit)
    assert kept["input_ids"] == [ids for ids in whole["input_ids"] if len(ids) <= limit] and len(kept) == 2
    batch = EagleDataCollator.of(processor)(list(kept))
    short = [messages for messages, length in zip(CHATS, lengths, strict=True) if length <= limit]
    wanted = processed(processor, short)  # and no medium of the others
    assert all(torch.equal(batch[key], torch.as_tensor(x)) for key, x in wanted.items())
    assert f"Of 4 conversations 2 were left out whole because they are longer than `max_length`={limit}" in caplog.text


def test_bad_media_stop_or_are_counted(records, tmp_path, caplog):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    broken = chat([{"type": "image", "image": str(tmp_path / "broken.png")}], "the cat")
    missing = chat([{"type": "image", "image": str(tmp_path / "nowhere.png")}], "the cat")
    given = [records[0], {"messages": broken}, {"messages": missing}, records[1]]
    for n, wrong in ((1, given[:2]), (2, [given[0], given[3], given[2]])):
        with pytest.raises(ValueError, match=f"Record {n}: a medium cannot be loaded .*`skip_bad_media`"):
            build_vision_dataset(wrong, vision_processor())
    with caplog.at_level(logging.WARNING):
        data = build_vision_dataset(given, vision_processor(), skip_bad_media=True)
    assert len(data) == 2 and "2 because a medium cannot be loaded" in caplog.text


def test_bad_records_stop_or_are_counted(records, caplog):
    given = [records[0], {"messages": chat([{"type": "image"}], "the cat")}, {"messages": [{"role": 1}]}, records[1]]
    with pytest.raises(ValueError, match="Record 1: message 0 holds an image part that names no image"):
        build_vision_dataset(given, vision_processor())
    with caplog.at_level(logging.WARNING):
        data = build_vision_dataset(given, vision_processor(), skip_bad_records=True)
    assert len(data) == 2 and "2 because they cannot be read" in caplog.text


def test_what_changes_afterwards_stops(records, tmp_path):
    processor = vision_processor()
    data = list(build_vision_dataset(records, processor))
    collate = EagleDataCollator.of(processor)
    picture(9, 32, 32).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="images of a batch are .* tokens large, but its rows were made for"):
        collate(data)
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match="cannot be loaded any more"):
        collate(data)


def test_ways_to_name_media(tmp_path):
    shown = picture(1)
    shown.save(tmp_path / "a.png")
    held = (tmp_path / "a.png").read_bytes()
    ways = [shown, str(tmp_path / "a.png"), {"bytes": held, "path": None}, base64.b64encode(held).decode()]
    chats = [chat([{"type": "image", "image": way}, text("a")], "b") for way in ways]
    rows = [build_vision_dataset([{"messages": messages}], vision_processor()) for messages in chats]
    by_column = {"messages": chat([{"type": "image", "image": None, "text": None}, text("a")], "b"), "images": [shown]}
    rows.append(build_vision_dataset([by_column], vision_processor()))
    collate = EagleDataCollator.of(vision_processor())
    batches = [collate(list(data)) for data in rows]
    for batch in batches[1:]:
        assert all(torch.equal(batch[name], batches[0][name]) for name in batches[0])


def test_what_is_refused(records):
    processor = vision_processor()
    refused = {
        "Record 0: message 1 is an answer": chat("a", [image(1)]),
        "Record 0: message 0 holds an image part that names no image": chat([{"type": "image"}], "a"),
        "Record 0: message 0 holds a part that is neither": chat([image(1), {"type": "sound"}], "a"),
        r"Record 0: its text holds 2 times <\|image_pad\|>, but it has 1": chat([image(1), text("<|image_pad|>")], "a"),
        r"1 times <\|video_pad\|>, but it has 0 videos": chat("a", "<|video_pad|>"),
    }
    for said, messages in refused.items():
        with pytest.raises(ValueError, match=said):
            build_vision_dataset([{"messages": messages}], processor)
    with pytest.raises(ValueError, match="`images` holds more images than the messages have parts"):
        read_media_record({"messages": CHATS[0], "images": [picture(1)]}, 0)
    with pytest.raises(ValueError, match="None of the 4 conversations is left"):
        build_vision_dataset(records, processor, max_length=4)
    assert [has_media(record) for record in records] == [True, False, True, True]
    with pytest.raises(ValueError, match="images and videos need a target that takes them"):
        build_dataset(records, tiny_tokenizer())
    with pytest.raises(ValueError, match="`packing`"):
        pack_dataset(build_vision_dataset(records, processor), 64)
    row = build_vision_dataset(records, processor)[0]
    with pytest.raises(ValueError, match="`packing` puts conversations side by side"):
        EagleDataCollator.of(processor)([{**row, "document_lengths": [len(row["input_ids"])]}])
    packed = [{"input_ids": [1, 2], "loss_mask": [0, 1], "document_lengths": [1, 1]}]  # without media, they can be
    assert set(EagleDataCollator.of(processor)(packed)) == set(EagleDataCollator(0)(packed))


def test_answers_are_trained_on_in_the_tokens_they_were_said_in(records):
    """Behind a prompt with all tokens of its media, as a server tells them."""
    processor = vision_processor()
    plain = build_vision_dataset(records, processor)
    for index, row in enumerate(plain):
        start = row["loss_mask"].index(1)
        end = next((n for n in range(start, len(row["loss_mask"])) if not row["loss_mask"][n]), len(row["loss_mask"]))
        said = processor.tokenizer(" the")["input_ids"] + row["input_ids"][start:end]  # white space first, and more
        columns = {"answer_token_ids": [said], "prompt_tokens": [start]}
        record = {"messages": records[index]["messages"][:2], **columns}
        (own,) = build_vision_dataset([record], processor)
        assert own["input_ids"] == row["input_ids"][:start] + said
        assert own["loss_mask"] == [0] * start + [1] * len(said)
