"""Why answers ended, in whatever way a record says it, and which of their tokens are supervised then."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_families import FAMILIES, family_tokenizer
from tiny_tokenizer import CHATML, assistant, encode_conversation, supervised_texts, tiny_tokenizer, user

from hf_eagle.data.conversations import build_dataset
from hf_eagle.data.loss_mask import ConversationEncoder
from hf_eagle.data.mask_check import check_loss_mask
from hf_eagle.data.said import read_reasons
from hf_eagle.data.spans import CUT, ENDED


TWO = [user("q"), assistant("one"), user("q"), assistant("two")]


@pytest.mark.parametrize(
    ("found", "read"),
    [
        (None, None),
        ([], None),
        ("", None),
        ("length", [None, "length"]),
        ('["length", "stop"]', ["length", "stop"]),
        (["stop", None], ["stop", None]),
        (["", "STOP"], [None, "stop"]),
        *([[reason.upper(), reason], [reason, reason]] for reason in (*ENDED, *CUT)),
    ],
)
def test_reasons(found, read):
    assert read_reasons(found, 2, "Record 5") == read


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (3, "Record 5: `finish_reason` must be a text for the last answer, .* got 3"),
        ({"a": 1}, "must be a text"),
        ([1, 2], "must be a text"),
        (["length"], "has 1 entries for 2 answers; give one for each, or one text for the last"),
        ("[length", "`finish_reason` is no JSON"),
        ("banana", "Record 5: `finish_reason` is 'banana', which is not known; known are stop, .* length, .* or null"),
        (["stop", "leng th"], "`finish_reason` is 'leng th', which is not known"),
        ('["stopped", null]', "`finish_reason` is 'stopped', which is not known"),
        ("x" * 1000, "`finish_reason` is 'x{80}', which is not known"),
    ],
)
def test_reasons_that_are_none_are_refused(found, message):
    with pytest.raises(ValueError, match=message):
        read_reasons(found, 2, "Record 5")
    with pytest.raises(ValueError, match=message.removeprefix("Record 5: ")):
        build_dataset([{"messages": TWO, "finish_reason": found}], tiny_tokenizer(CHATML))


def test_a_reason_as_text_is_that_of_the_last_answer():
    tokenizer = tiny_tokenizer(CHATML)
    whole, cut = ["one<|im_end|>", "two<|im_end|>"], ["one<|im_end|>", "two"]
    for reason, ends in (*((reason, whole) for reason in ENDED), *((reason, cut) for reason in CUT), ("LENGTH", cut)):
        (row,) = build_dataset([{"messages": TWO, "finish_reason": reason}], tokenizer)
        assert supervised_texts(tokenizer, row["input_ids"], row["loss_mask"]) == ends
        assert encode_conversation(TWO, tokenizer, finish_reason=reason) == row


SPACE = st.text(" \n\t", max_size=3)


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=30)
@given(before=SPACE, after=SPACE)
def test_white_space_around_an_answer_is_no_obstacle(family, before, after):
    """Both ways to find the answers agree, in every family of templates, also where no header opens an answer."""
    encoder = ConversationEncoder(family_tokenizer(family))
    chat = [user("say it"), assistant(before + "hello" + after), user("again"), assistant(before + "hello")]
    check_loss_mask(encoder, [chat], [0])
    ids, mask = encoder.encode([chat])[0]
    for said in supervised_texts(encoder.tokenizer, ids, mask):
        assert "hello" in said
