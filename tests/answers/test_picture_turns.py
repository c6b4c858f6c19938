"""What a server is asked of records with pictures in columns and files: OpenAI's parts, files as data addresses."""

import base64
import json

import pytest
from tiny_vision import chat, picture, text

from hf_eagle.answers.served_target import ServedTarget
from hf_eagle.answers.turns import context, read_turns
from hf_eagle.data.media import has_media
from hf_eagle.data.records import load_records


@pytest.fixture
def folder(tmp_path):
    picture(1).save(tmp_path / "a.png")
    picture(2).save(tmp_path / "b.jpg")
    return tmp_path


def address(path, kind: str) -> dict:
    url = f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def sent(turns) -> list:
    return ServedTarget(None, "m", {}, False).body(context(turns, []))["messages"]


def test_columns_are_sent_as_data_and_kept_as_paths(folder):
    """What is written beside the answers names the files; what is sent needs none."""
    record = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nhello"}]}
    more = {"images": ["a.png", "b.jpg"], "prompt": "<image> and <image>", "completion": "the cat"}
    (folder / "chats.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(more))
    records = load_records(folder / "chats.jsonl", content_parts=True)
    one, two = read_turns(records, content_parts=True)
    a, b = address(folder / "a.png", "png"), address(folder / "b.jpg", "jpeg")
    assert sent(one) == chat([a, text("\nhello")]) and sent(two) == chat([a, text(" and "), b])
    kept = context(one, [])
    assert kept == chat([{"type": "image", "image": str(folder / "a.png")}, text("\nhello")])
    assert has_media({"messages": kept})


def test_where_paths_start(folder):
    record = {"image": "b.jpg", "prompt": "hello"}
    (turns,) = read_turns([record], content_parts=True, media_root=str(folder))
    assert sent(turns) == chat([address(folder / "b.jpg", "jpeg"), text("hello")])


def test_addresses_and_bytes(folder):
    """Addresses go as they are, with what stands beside them; bytes and base64 as data."""
    held = base64.b64encode((folder / "a.png").read_bytes()).decode()
    own = {"type": "image_url", "image_url": {"url": "https://x/a.png", "detail": "low"}}
    other = {"type": "image", "image": "https://x/a.png"}
    carried = [{"type": "image", "image": {"bytes": held}}, {"type": "image", "base64": held}]
    (turns,) = read_turns([{"messages": chat([own, other, *carried, text("hello")])}], content_parts=True)
    by_address = {"type": "image_url", "image_url": {"url": "https://x/a.png"}}
    a = address(folder / "a.png", "png")
    assert sent(turns) == chat([own, by_address, a, a, text("hello")])


def test_a_target_of_text_in_process_is_told_the_column(folder):
    with pytest.raises(ValueError, match="Record 0: its `image` names an image: .* leave such records out"):
        read_turns([{"image": "a.png", "prompt": "hello"}])
