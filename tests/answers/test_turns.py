"""What is asked of a record: every user turn, and contents with images as they stand."""

import pytest
from tiny_tokenizer import assistant, system, user

from hf_eagle.answers.turns import context, read_turns


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
TEXT = {"type": "text", "text": "What is this?"}


def test_turns_and_their_context():
    tool = {"role": "tool", "content": "t"}
    messages = [system("s"), user("a"), user("b"), assistant("x"), user("c"), tool, user("d")]
    (turns,) = read_turns([{"messages": messages}])
    assert turns == [[system("s"), user("a"), user("b")], [user("c")]]
    assert context(turns, []) == turns[0]
    assert context(turns, [("y", "stop")]) == [*turns[0], assistant("y"), user("c")]
    assert context(turns, [("y", "stop"), ("z", "length")]) == [*turns[0], assistant("y"), user("c"), assistant("z")]


def test_parts_are_kept_as_they_are():
    padded = {**TEXT, "image_url": None}  # as Arrow gives it back
    chat = {"messages": [user([IMAGE, padded]), assistant("x"), user("more?"), user([TEXT])], "system": "Look."}
    (turns,) = read_turns([chat], content_parts=True)
    assert turns == [[system("Look."), user([IMAGE, TEXT])], [user("more?"), user([TEXT])]]
    assert chat["messages"][0]["content"] == [IMAGE, padded]
    with pytest.raises(ValueError, match="Record 1: the content of message 0 must be text"):
        read_turns([{"prompt": "a"}, chat])
    with pytest.raises(ValueError, match="Record 0: every part of the content of message 0 must be"):
        read_turns([{"messages": [user([{"text": "no type"}])]}], content_parts=True)
    with pytest.raises(ValueError, match="Record 0: message 0 must be an object"):
        read_turns([{"messages": ["hello", user([TEXT])]}], content_parts=True)
