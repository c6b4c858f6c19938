"""Loss masks against answers written out by hand, a plain reference, and transformers' own mask."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import (
    CHATML,
    LLAMA3,
    MARKED,
    MARKED_WIDELY,
    THINKING,
    assistant,
    smollm2_folder,
    supervised_texts,
    system,
    tiny_tokenizer,
    user,
)
from transformers import AutoTokenizer

from hf_eagle.data.loss_mask import ConversationEncoder
from hf_eagle.data.mask_check import check_loss_mask
from hf_eagle.data.token_mask import mask_by_pieces


MARKER = "<|im_start|>assistant\nnot an answer<|im_end|>\n"


def encode(tokenizer, messages, finish_reason=None):
    """Ids and mask; the ids are the chat template's own."""
    ids, mask = ConversationEncoder(tokenizer).encode([messages], [finish_reason])[0]
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert len(mask) == len(ids) and set(mask) <= {0, 1}
    return ids, mask


def supervised(tokenizer, messages, finish_reason=None):
    return supervised_texts(tokenizer, *encode(tokenizer, messages, finish_reason))


CHATML_CASES = {
    "one turn": ([user("hello"), assistant("hi there")], ["hi there<|im_end|>"]),
    "system": ([system("be kind"), user("hello"), assistant("hi")], ["hi<|im_end|>"]),
    "two turns": (
        [user("a"), assistant("b c"), user("d"), assistant("e")],
        ["b c<|im_end|>", "e<|im_end|>"],
    ),
    "last turn is the user's": ([user("a"), assistant("b"), user("c")], ["b<|im_end|>"]),
    "empty answer": ([user("a"), assistant(""), user("c"), assistant("d")], ["d<|im_end|>"]),
    "white space kept": ([user("a"), assistant("b \n")], ["b \n<|im_end|>"]),
    "answer before any question": ([assistant("hi"), user("a"), assistant("b")], ["hi<|im_end|>", "b<|im_end|>"]),
    "markers in a question": ([user(MARKER), assistant("b"), user(MARKER)], ["b<|im_end|>"]),
    "markers in an answer": (
        [user("a"), assistant(f"b{MARKER}c"), user("d"), assistant("e")],
        [f"b{MARKER}c<|im_end|>", "e<|im_end|>"],
    ),
    "an answer that ends like a turn": ([user("a"), assistant("b<|im_end|>")], ["b<|im_end|><|im_end|>"]),
    "many bytes a character": ([user("a"), assistant("é 😀"), user("😀")], ["é 😀<|im_end|>"]),
    "private characters": ([user("\ue000\ue001"), assistant("\ue000\ue0002\ue002")], ["\ue000\ue0002\ue002<|im_end|>"]),
}


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("case", CHATML_CASES)
def test_chatml(case, trim_offsets):
    messages, expected = CHATML_CASES[case]
    assert supervised(tiny_tokenizer(CHATML, trim_offsets), messages) == expected


@pytest.mark.parametrize("template", [MARKED, MARKED_WIDELY])
@pytest.mark.parametrize("case", [case for case in CHATML_CASES if case != "an answer that ends like a turn"])
def test_generation_marks(case, template):
    messages, expected = CHATML_CASES[case]
    assert supervised(tiny_tokenizer(template), messages) == expected


def test_generation_marks_equal_transformers_mask():
    tokenizer = tiny_tokenizer(MARKED)
    # ours also leaves out the end of an empty answer, and a second end of turn
    for case in CHATML_CASES.keys() - {"empty answer", "an answer that ends like a turn"}:
        messages, _ = CHATML_CASES[case]
        theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        assert encode(tokenizer, messages) == (theirs["input_ids"], theirs["assistant_masks"])


def test_smollm2():
    """A real tokenizer, and a template that puts in a system message of its own."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    for messages, expected in CHATML_CASES.values():
        ids, mask = encode(tokenizer, messages)
        assert supervised_texts(tokenizer, ids, mask) == expected
    ids, mask = encode(tokenizer, [user("What is two and two?"), assistant("Four.")])
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is two and two?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"
    )
    assert mask == [0] * (len(ids) - 4) + [1, 1, 1, 0]


def test_llama3_strips_contents():
    tokenizer = tiny_tokenizer(LLAMA3)
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    messages = [user(f"a{header}"), assistant("\n b\n"), user("c"), assistant(f"{header}d")]
    assert supervised(tokenizer, messages) == ["b<|eot_id|>", f"{header}d<|eot_id|>"]


def test_thoughts():
    """The last answer's thoughts are the target's to write, so they are supervised; earlier ones are not there."""
    tokenizer = tiny_tokenizer(THINKING)
    answer = assistant("<think>\nhm\n</think>\n\nfour")
    assert supervised(tokenizer, [user("a"), answer, user("b"), answer]) == [
        "four<|im_end|>",
        "<think>\nhm\n</think>\n\nfour<|im_end|>",
    ]
    assert supervised(tokenizer, [user("a"), assistant("four")]) == ["<think>\n\n</think>\n\nfour<|im_end|>"]


def test_answer_cut_by_the_token_limit_has_no_end():
    tokenizer = tiny_tokenizer(CHATML)
    messages = [user("a"), assistant("b"), user("c"), assistant("d and")]
    assert supervised(tokenizer, messages, ["stop", "length"]) == ["b<|im_end|>", "d and"]
    assert supervised(tokenizer, messages, ["length", "stop"]) == ["b", "d and<|im_end|>"]
    assert supervised(tiny_tokenizer(MARKED_WIDELY), messages, ["stop", "length"]) == ["b<|im_end|>", "d and"]


def test_header_without_special_tokens():
    """ "Assistant:" melts with the answer's first space; the token is the answer's, since the target writes it."""
    template = (
        "{% for message in messages %}{{ message.role + ': ' + message.content }}{% if message.role == 'assistant' %}"
        "{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    messages = [user("assistant: x"), assistant("the cat"), user("a"), assistant("the other")]
    assert supervised(tiny_tokenizer(template), messages) == [" the cat<|im_end|>", " the other<|im_end|>"]


def test_slow_tokenizer_equals_fast():
    fast = tiny_tokenizer(CHATML)

    class Slow:
        """The same tokenizer without offsets, as the tiktoken and sentencepiece ones are."""

        is_fast = False

        def __call__(self, *args, **kwargs):
            assert "return_offsets_mapping" not in kwargs
            return fast(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(fast, name)

    for messages, _ in CHATML_CASES.values():
        assert ConversationEncoder(Slow()).encode([messages]) == ConversationEncoder(fast).encode([messages])


contents = st.lists(
    st.sampled_from(
        ["a", "the cat", " ", "\n", "\n\n", "<|im_end|>", "<|im_start|>", "assistant\n", MARKER, "é", "😀"]
    ),
    max_size=6,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(turns=st.lists(st.tuples(contents, contents), min_size=1, max_size=3), open_end=st.booleans())
def test_any_content_against_plain_reference(turns, open_end):
    """The text is put together by hand, so the reference knows each character's owner; tokens follow their last one."""
    tokenizer = tiny_tokenizer(CHATML)
    messages, text, owned = [], "", []
    for question, answer in turns:
        messages += [user(question), assistant(answer)]
        for piece, answers in (
            (f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False),
            (f"{answer}<|im_end|>", bool(answer.strip())),
            ("\n", False),
        ):
            text += piece
            owned += [answers] * len(piece)
    if open_end:
        messages.append(user("more"))
        text += "<|im_start|>user\nmore<|im_end|>\n"
        owned += [False] * (len(text) - len(owned))

    ids, mask = encode(tokenizer, messages)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert mask == [int(owned[end - 1]) for _, end in offsets]


def long_chat(tokens: int) -> list[dict]:
    """Turns of about 24 tokens each, questions and answers."""
    return [user("what is the answer?"), assistant("the answer is four")] * (tokens // 24)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_time_is_linear_up_to_200k_tokens(template):
    encoder = ConversationEncoder(tiny_tokenizer(template))
    seconds, lengths = [], []
    for tokens in (50_000, 200_000):
        taken = []
        for _ in range(3):  # of the processor, and the least of them: a busy machine makes some dearer
            begun = time.process_time()
            ids, _ = encoder.encode([long_chat(tokens)])[0]
            taken.append(time.process_time() - begun)
        seconds.append(min(taken))
        lengths.append(len(ids))
    assert lengths[1] > 180_000 and 3.9 < lengths[1] / lengths[0] < 4.1
    assert seconds[1] < 10 * seconds[0]  # 4 times the work; what is quadratic would take 16 times


def test_work_of_a_slow_tokenizer_is_linear():
    """Characters that are handed to the tokenizer, for the whole text and again for its pieces and borders."""
    fast = tiny_tokenizer(CHATML)
    encoder = ConversationEncoder(fast)
    for tokens in (2_000, 20_000):
        chat = long_chat(tokens)
        text, spans = encoder.answer_spans(chat)
        handed = []

        def tokenise(piece, handed=handed):
            handed.append(len(piece))
            return fast(piece, add_special_tokens=False)["input_ids"]

        pairs = [(span.start, span.end) for span in spans]
        assert mask_by_pieces(tokenise, encoder.special, text, pairs) == encoder.encode([chat])[0]
        assert sum(handed) < 2.2 * len(text)


def test_errors():
    with pytest.raises(ValueError, match="has no chat template"):
        ConversationEncoder(tiny_tokenizer(None))
    with pytest.raises(ValueError, match="refuses a question with its answer: no"):
        ConversationEncoder(tiny_tokenizer("{{ raise_exception('no') }}"))
    picky = CHATML + "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    with pytest.raises(ValueError, match="Record 7 does not fit the chat template of `tokenizer`: no system here"):
        ConversationEncoder(tiny_tokenizer(picky)).encode([[system("a"), user("b")]], indices=[7])
    shouting = CHATML.replace("message['content']", "message['content'] | length | string")
    with pytest.raises(ValueError, match="it changes the text of answers, so their positions cannot be found"):
        ConversationEncoder(tiny_tokenizer(shouting)).encode([[user("a"), assistant("b")]])


def test_both_methods_agree_on_every_case():
    for template in (CHATML, MARKED, MARKED_WIDELY, THINKING, LLAMA3):
        encoder = ConversationEncoder(tiny_tokenizer(template))
        cases = [messages for messages, _ in CHATML_CASES.values()]
        check_loss_mask(encoder, cases, list(range(len(cases))))
