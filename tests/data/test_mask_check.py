"""The second method must object when the first is wrong, and show what it saw."""

import pytest
from template_families import family_tokenizer
from tiny_tokenizer import CHATML, MARKED, assistant, system, tiny_tokenizer, user

from hf_eagle.data.loss_mask import AnswerSpan, ConversationEncoder
from hf_eagle.data.mask_check import check_loss_mask, incremental_mask, show_mask


CHAT = [user("the cat"), assistant("hello there"), user("a"), assistant("b")]


class Shifted(ConversationEncoder):
    """Finds spans that are off by some characters."""

    start, end = 0, 0

    def answer_spans(self, messages, tools=None, options=None):
        text, spans = super().answer_spans(messages, tools, options)
        return text, [AnswerSpan(s.start + self.start, s.content_end, s.end + self.end) for s in spans]


@pytest.mark.parametrize("start, end", [(-1, 0), (5, 0), (0, 1), (0, -10)])
def test_wrong_span_is_refused(start, end):
    encoder = Shifted(tiny_tokenizer(CHATML))
    encoder.start, encoder.end = start, end
    with pytest.raises(ValueError, match="Record 3: two methods find different answers") as caught:
        check_loss_mask(encoder, [CHAT], [3])
    assert r"By increments: '<|im_start|>user\nthe cat<|im_end|>\n" in str(caught.value)
    assert "[[hello there<|im_end|>]]" in str(caught.value)


@pytest.mark.parametrize("family", ["mistral", "gptoss", "qwen3"])
@pytest.mark.parametrize("start, end", [(-12, 0), (12, 0), (0, 12), (0, -12)])
def test_wrong_span_is_refused_where_turns_are_rewritten_later(family, start, end):
    """Mistral moves the system text to the last question, the others end or begin an answer of the past differently."""
    chat = [system("be kind"), *CHAT[:2], *CHAT]
    encoder = Shifted(family_tokenizer(family))
    check_loss_mask(encoder, [chat], [0])
    encoder.start, encoder.end = start, end
    with pytest.raises(ValueError, match="Record 0: two methods find different answers"):
        check_loss_mask(encoder, [chat], [0])


def test_incremental_mask_knows_nothing_of_the_first():
    encoder = ConversationEncoder(tiny_tokenizer(CHATML))
    ids, mask = encoder.encode([CHAT])[0]
    assert incremental_mask(encoder, CHAT, ids, [0] * len(ids)) == mask
    shown = show_mask(encoder, ids, mask)
    assert shown.count("[[") == 2 and shown.endswith("<|im_start|>assistant\n[[b<|im_end|>]]\n")


def test_mark_around_the_question_is_refused():
    encoder = ConversationEncoder(tiny_tokenizer(MARKED.replace("== 'assistant'", "== 'user'")))
    with pytest.raises(ValueError, match=r"Record 0: .*differ(?s:.)*\[\[the cat<\|im_end\|>\]\]"):
        check_loss_mask(encoder, [CHAT], [0])


def test_marks_that_mark_nothing_are_refused():
    encoder = ConversationEncoder(tiny_tokenizer(MARKED.replace("== 'assistant'", "== 'bot'")))
    with pytest.raises(ValueError, match="marks no token as the assistant's(?s:.)*Record 5: '<.im_start.>user"):
        check_loss_mask(encoder, [CHAT], [5])


def test_template_that_drops_answers_is_refused():
    silent = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role == 'user' %}")
    with pytest.raises(ValueError, match="marks no token as the assistant's"):
        check_loss_mask(ConversationEncoder(tiny_tokenizer(silent)), [CHAT], [0])


def test_conversation_without_answer_is_passed_over():
    check_loss_mask(ConversationEncoder(tiny_tokenizer(CHATML)), [[user("a")], [user("a"), assistant("")]], [0, 1])
