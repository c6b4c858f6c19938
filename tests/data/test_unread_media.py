"""Media that a record means and that nothing shows: refused, or told once; never trained without, silently."""

import csv
import json
import logging

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_records import SAID, A, held, img, share
from tiny_tokenizer import tiny_tokenizer
from tiny_vision import chat, text, vision_processor

from hf_eagle.data.conversations import build_dataset
from hf_eagle.data.messages import to_messages
from hf_eagle.data.records import load_records
from hf_eagle.data.vision_dataset import build_vision_dataset, holds_media
from hf_eagle.evaluation.prompts import load_prompts


MARKED = chat("<image>\nhello", SAID)
# columns that nothing reads, by their names or by their values
UNREAD = {
    "image_path": "a.png",
    "image_paths": ["a.png", "b.png"],
    "img": "a picture",
    "Image": A,
    "image_url": "http://x/a.png?size=large",
    "file_name": "0001.JPG",
    "picture": {"bytes": b"\x89PNG", "path": None},
    "video_path": "a.mp4",
    "clip": "a.mp4",
    "source": "data:image/png;base64,iVBORw0KGgo=",
    "pixels": b"\xff\xd8\xff\xe0",
}
# columns of chats that show nothing
OTHER = {
    "image_id": 7,
    "images_number": "7",
    "source": "http://x/a.html",
    "title": "how to open cat.png",
    "file_name": "app.py",
    "img": "",
    "rejected": "no",
}


def named(column, value):
    return f"`{column}` looks like the (image|video) for it, but media are read from `image`, `images`"


@pytest.mark.parametrize("column", UNREAD)
@pytest.mark.parametrize("messages", [MARKED, chat([text("a <video>")], SAID)], ids=["image", "typed video"])
def test_a_mark_beside_a_column_that_is_not_read_is_refused(column, messages, caplog):
    """By every target, and counted where asked for."""
    record = {column: UNREAD[column], "messages": messages}
    told = f"Record 0: .*{named(column, UNREAD[column])}"
    with pytest.raises(ValueError, match=told):
        build_vision_dataset([record], vision_processor())
    with pytest.raises(ValueError, match=told):
        build_dataset([record], tiny_tokenizer())
    plain = {"messages": chat("hello", SAID)}
    with caplog.at_level(logging.WARNING):
        assert len(build_vision_dataset([record, plain], vision_processor(), skip_bad_records=True)) == 1
    assert "1 because they cannot be read" in caplog.text


@pytest.mark.parametrize("column", OTHER)
def test_other_columns_mean_no_medium(column):
    record = {column: OTHER[column], "messages": MARKED}
    assert to_messages(record) == to_messages(record, content_parts=True) == MARKED


def test_a_record_that_shows_its_medium_may_have_such_columns():
    record = {"image_path": "a.png", "messages": chat([img(A), text("what is <image>?")], SAID)}
    assert to_messages(record, content_parts=True) == record["messages"]
    with_column = {"image": A, "url": "http://x/a.png", "messages": chat("<image>hello", SAID)}
    assert to_messages(with_column, content_parts=True)[0]["content"] == [img(A), text("hello")]


@pytest.mark.parametrize("column", UNREAD)
def test_such_a_column_without_a_mark_is_told_once(column, tmp_path, caplog):
    value = held(A, tmp_path) if isinstance(UNREAD[column], bytes) else UNREAD[column]
    records = [{column: value, "messages": chat("hello", SAID)}] * 3
    Dataset.from_list(records).to_parquet(tmp_path / "chats.parquet")
    with caplog.at_level(logging.WARNING):
        load_records(tmp_path / "chats.parquet")
    (told,) = [record.getMessage() for record in caplog.records]
    assert "Record 0: " in told and f"`{column}` looks like media" in told


EMPTY = [("image", "<image>hello"), ("images", "hello <image>"), ("video", "<video>"), ("videos", "a\n<video>\nb")]


@pytest.mark.parametrize(("column", "asked"), EMPTY)
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_a_mark_beside_an_empty_column_is_refused_in_every_file(column, asked, ending, tmp_path):
    """As it is beside `[]`."""
    path = tmp_path / f"chats.{ending}"
    records = [{column: None, "conversations": share(asked, SAID)}]
    if ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    elif ending == "parquet":
        Dataset.from_list(records).to_parquet(path)
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([records[0], ["", json.dumps(records[0]["conversations"])]])
    with pytest.raises(ValueError, match=f"Record 0: `{column}` holds fewer (images|videos) than .*: 0 for 1"):
        build_vision_dataset(load_records(path), vision_processor())


@settings(deadline=None, max_examples=30)
@given(
    asked=st.lists(st.sampled_from(["<image>", "<video>", "hello", " "]), min_size=1, max_size=4).map("".join),
    said=st.sampled_from(["<image>", "the cat"]),
    typed=st.booleans(),
)
def test_a_mark_alone_stays_text(asked, said, typed):
    """There is nothing to show; chats about HTML hold such."""
    messages = chat([text("hello" + asked)] if typed else "hello" + asked, said)
    assert to_messages({"messages": messages}, content_parts=True) == messages


MARKS_ALONE = [chat("<image>\nhello", SAID), chat("hello", "<image>"), chat("how do I write <video>?", SAID)]


@pytest.mark.parametrize("shown", [0, 1], ids=["text alone", "beside pictures"])
def test_marks_alone_are_counted_and_told_once(shown, tmp_path, caplog):
    """Of a target that takes media, whether the data hold any or not."""
    records = [{"messages": messages} for messages in MARKS_ALONE] + [{"image": A, "messages": MARKED}] * shown
    with caplog.at_level(logging.WARNING):
        found = holds_media(records)
        if found:
            assert len(build_vision_dataset(records, vision_processor())) == 4
    assert found == bool(shown)
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"2 of {3 + shown} chats hold <image> or <video>" in told and "the first is <image> in Record 0" in told


def test_prompts_are_looked_at_too(tmp_path, caplog):
    path = tmp_path / "p.jsonl"
    turns = {"turns": ["<image>hello", "and?"]}
    for record in ({"image_path": "a.png", "prompt": "<image>hello"}, turns | {"img": "a.png"}):
        path.write_text(json.dumps(record))
        with pytest.raises(ValueError, match="Record 0 of the prompt file .*p.jsonl.* looks like the image for it"):
            load_prompts(path)
    path.write_text(json.dumps(turns) + "\n" + json.dumps({"prompt": "hello"}))
    with caplog.at_level(logging.WARNING):
        assert len(load_prompts(path)) == 2
    assert "1 of 2 chats hold <image>" in caplog.text and "in Record 0 of the prompt file" in caplog.text
