"""Whatever a server says is read as what it should be, or refused; nothing else is raised."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eagle.answers.replies import (
    ChatAnswer,
    ServedModel,
    SplitThoughts,
    Unreadable,
    Unusable,
    read_chat,
    read_continuation,
    read_models,
    read_reply,
    read_tokens_of,
    said,
)


CHOICE = {
    "message": {"content": "four", "reasoning": None},
    "text": "four",
    "finish_reason": "stop",
    "token_ids": [1, 2],
}
CHAT = {
    "choices": [CHOICE],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    "prompt_token_ids": [5, 6, 7],
}
MODELS = {"data": [{"id": "target", "root": "folder", "max_model_len": 256}]}
READERS = [(read_chat, CHAT), (read_continuation, CHAT), (read_models, MODELS), (read_tokens_of, {"tokens": [1, 2]})]

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([-1, 2**31, 10**400, "\ud800", "half \udc00", "a\0b", "x" * 200, "abort", ""])
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from places(one, (*path, key))


def changed(reply, path, value):
    if not path:
        return value
    reply = copy.deepcopy(reply)
    place = reply
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return reply


def is_sound(found) -> bool:
    """What the rest of the code relies on."""
    if isinstance(found, list) and found and isinstance(found[0], ServedModel):
        lengths = [model.max_model_len for model in found]
        assert all(isinstance(model.id, str) and isinstance(model.root, str | None) for model in found)
        assert all(length is None or 0 <= length < 2**31 for length in lengths)
        json.dumps([[model.id, model.root] for model in found], ensure_ascii=False).encode()
        return True
    if isinstance(found, list):
        return all(type(id) is int and 0 <= id < 2**31 for id in found)
    assert isinstance(found, ChatAnswer)
    json.dumps([found.text, found.finish_reason], ensure_ascii=False).encode()
    ids = [*(found.prompt_ids or []), *(found.token_ids or [])]
    counts = [count for count in (found.prompt_tokens, found.completion_tokens) if count is not None]
    return all(type(number) is int and 0 <= number < 2**31 for number in ids + counts)


@pytest.mark.parametrize(("read", "sound"), READERS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_reply_with_one_other_value_is_sound_or_refused(read, sound, data):
    assert is_sound(read(sound))
    path = data.draw(st.sampled_from(sorted(places(sound), key=str)))
    reply = changed(sound, path, data.draw(anything))
    try:
        found = read(read_reply(json.dumps(reply).encode()))
    except (Unreadable, Unusable, SplitThoughts) as problem:
        assert str(problem).isprintable()
    else:
        assert is_sound(found)


@pytest.mark.parametrize(("read", "sound"), READERS)
def test_a_reply_that_lacks_a_field_is_sound_or_refused(read, sound):
    for path in places(sound):
        if not path or isinstance(path[-1], int):
            continue
        reply = copy.deepcopy(sound)
        place = reply
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        try:
            assert is_sound(read(reply))
        except Unreadable:
            pass


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"[" * 100_000, b"[{}]", b"7", bytes(range(256)), b'{"a": ' + b"9" * 10_000 + b"}"]
)
def test_what_is_no_object_is_unreadable(content):
    with pytest.raises(Unreadable):
        read_reply(content)
    assert isinstance(said(content), str)


def test_counts_that_are_none_are_passed_over():
    for count in ("two", -1, 2.0, True, 10**400, [1]):
        usage = {"prompt_tokens": count, "completion_tokens": count}
        found = read_chat({**CHAT, "usage": usage})
        assert (found.prompt_tokens, found.completion_tokens) == (None, None)
        assert read_models({"data": [{"id": "a", "max_model_len": count}]}) == [ServedModel("a")]
    assert read_chat({**CHAT, "usage": 7}).completion_tokens is None


def test_half_a_character_is_unusable_and_not_asked_again():
    for text in ("\ud800", "a\udfffb"):
        message = {"content": text}
        with pytest.raises(Unusable, match="half a character"):
            read_chat({"choices": [{"message": message, "finish_reason": "stop"}]})
        with pytest.raises(Unusable, match="half a character"):
            read_continuation({"choices": [{"text": text, "finish_reason": "stop"}]})
