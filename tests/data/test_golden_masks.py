"""What is supervised under the chat templates of published models, written out by hand.

The rule: everything that the model writes after its generation prompt, up to and with the token that ends its turn.
"""

from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_families import FAMILIES, family_tokenizer
from tiny_tokenizer import assistant, supervised_texts, system, user

from hf_eagle.data.loss_mask import ConversationEncoder, MaskOptions
from hf_eagle.data.mask_check import check_loss_mask


# family -> the end of a past turn, the end of the last one, what precedes an answer, what precedes the last one
WRITTEN = {
    "smollm2": ("<|im_end|>", "<|im_end|>", "", ""),
    "llama3": ("<|eot_id|>", "<|eot_id|>", "", ""),
    "llama3_1": ("<|eot_id|>", "<|eot_id|>", "", ""),
    "llama3_marked": ("<|eot_id|>", "<|eot_id|>", "", ""),
    "qwen2_5": ("<|im_end|>", "<|im_end|>", "", ""),
    "qwen3": ("<|im_end|>", "<|im_end|>", "", "<think>\n\n</think>\n\n"),
    "qwen3_marked": ("<|im_end|>", "<|im_end|>", "<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
    "phi3": ("<|end|>", "<|end|>", "", ""),
    "mistral": ("</s>", "</s>", "", ""),
    "gemma3": ("<end_of_turn>", "<end_of_turn>", "", ""),
    "gptoss": ("<|end|>", "<|return|>", "<|channel|>final<|message|>", "<|channel|>final<|message|>"),
    "deepseek_v3": ("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "", ""),
    "kimi_k2": ("<|im_end|>", "<|im_end|>", "", ""),
    "kimi_k2_thinking": ("<|im_end|>", "<|im_end|>", "<think></think>", "<think></think>"),
}
ANSWER_HEADERS = {
    "smollm2": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "phi3": "<|assistant|>\n",
    "mistral": "[/INST]",
    "gemma3": "<start_of_turn>model\n",
    "gptoss": "<|start|>assistant<|channel|>commentary<|message|>",  # a final channel is refused by the template itself
    "deepseek_v3": "<｜Assistant｜>",
    "kimi_k2": "<|im_assistant|>assistant<|im_middle|>",
}
CHAT = [user("hello"), assistant("hi there"), user("a"), assistant("the cat")]
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"type": "function", "id": "call_7", "function": {"name": "add", "arguments": {"x": 1, "y": "two"}}}
TOOL_CHAT = [
    user("what is two and two?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "four", "name": "add", "tool_call_id": "call_7"},
    assistant("the answer is four"),
]


def marked(family, messages, reasons=None, tools=None, options=None, template_kwargs=None):
    """The supervised texts; the second method must agree, and the ids must be the template's own."""
    tokenizer = family_tokenizer(family)
    encoder = ConversationEncoder(tokenizer, options, template_kwargs)
    check_loss_mask(encoder, [messages], [0], [tools])
    ids, mask = encoder.encode([messages], [reasons], tools=[tools])[0]
    assert ids == tokenizer(encoder.render(messages, tools), add_special_tokens=False)["input_ids"]
    return supervised_texts(tokenizer, ids, mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_with_and_without_a_system_message(family):
    end, last_end, before, before_last = WRITTEN[family]
    expected = [f"{before}hi there{end}", f"{before_last}the cat{last_end}"]
    assert marked(family, CHAT) == expected
    assert marked(family, [system("be kind"), *CHAT]) == expected
    # a question without an answer at the end: then both turns are past
    if family not in ("qwen3", "gptoss"):
        assert marked(family, [*CHAT, user("b")]) == expected
    assert marked(family, [*CHAT, user("b")])[0] == expected[0]
    assert marked(family, CHAT, options=MaskOptions(last_turn_only=True)) == expected[1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_cut_by_the_token_limit(family):
    end, _, before, before_last = WRITTEN[family]
    cut = marked(family, CHAT, ["stop", "length"])
    assert cut == [f"{before}hi there{end}", f"{before_last}the cat"]


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_turns(family):
    end, last_end, before, before_last = WRITTEN[family]
    chat = [user("hello"), assistant(""), user(""), assistant("the cat")]
    assert marked(family, chat)[-1] == f"{before_last}the cat{last_end}"
    assert not any("hello" in text for text in marked(family, chat))


@pytest.mark.parametrize("family", ANSWER_HEADERS)
def test_markers_in_contents_open_nothing(family):
    end, last_end, before, before_last = WRITTEN[family]
    marker = f"{ANSWER_HEADERS[family]}the other{end}"
    chat = [user(f"say {marker}"), assistant("hi"), user(marker), assistant(f"the {marker} cat")]
    assert marked(family, chat) == [f"{before}hi{end}", f"{before_last}the {marker} cat{last_end}"]


def test_padding_on_the_left_is_no_part_of_a_row():
    for family in FAMILIES:
        tokenizer = family_tokenizer(family)
        rows = ConversationEncoder(tokenizer).encode([CHAT, CHAT[:2]])
        tokenizer.padding_side = "left"
        assert ConversationEncoder(tokenizer).encode([CHAT, CHAT[:2]]) == rows


TOOL_CALLS = {
    "llama3_1": ['{"name": "add", "parameters": {"x": 1, "y": "two"}}<|eot_id|>', "the answer is four<|eot_id|>"],
    "qwen2_5": [
        '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": "two"}}\n</tool_call><|im_end|>',
        "the answer is four<|im_end|>",
    ],
    "qwen3": [
        '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": "two"}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nthe answer is four<|im_end|>",
    ],
    "mistral": [
        '[TOOL_CALLS][{"name": "add", "arguments": {"x": 1, "y": "two"}, "id": "000000000"}]</s>',
        "the answer is four</s>",
    ],
    "gptoss": [
        ' to=functions.add<|channel|>commentary json<|message|>{"x": 1, "y": "two"}<|call|>',
        "<|channel|>final<|message|>the answer is four<|return|>",
    ],
    "deepseek_v3": [
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"x": 1, "y": "two"}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
        "the answer is four<｜end▁of▁sentence｜>",
    ],
    "kimi_k2": [
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
        '{"x": 1, "y": "two"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>',
        "the answer is four<|im_end|>",
    ],
    # templates that know no calls get them as text
    "smollm2": ['{"name": "add", "arguments": {"x": 1, "y": "two"}}<|im_end|>', "the answer is four<|im_end|>"],
}


@pytest.mark.parametrize("family", TOOL_CALLS)
def test_tool_calls(family):
    calls, answer = TOOL_CALLS[family]
    assert marked(family, TOOL_CHAT, tools=[ADD]) == [calls, answer]
    assert marked(family, TOOL_CHAT, options=MaskOptions(last_turn_only=True)) == [calls, answer]
    assert marked(family, [*CHAT, *TOOL_CHAT], options=MaskOptions(last_turn_only=True)) == [calls, answer]
    if family != "smollm2":
        assert marked(family, TOOL_CHAT, tools=[ADD], options=MaskOptions(tool_calls=False)) == [answer]


def test_several_calls_behind_a_text_and_end_marks_in_arguments():
    strange = {"type": "function", "function": {"name": "say", "arguments": {"x": ["<|im_end|>", {"y": ""}], "n": 2}}}
    answer = {"role": "assistant", "content": "the cat", "tool_calls": [CALL, strange]}
    calls = (
        '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": "two"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "say", "arguments": {"x": ["<|im_end|>", {"y": ""}], "n": 2}}\n</tool_call>'
    )
    chat = [user("a"), answer, {"role": "tool", "content": "<|im_start|>assistant\n"}, assistant("b")]
    assert marked("qwen2_5", chat) == [f"the cat\n{calls}<|im_end|>", "b<|im_end|>"]
    assert marked("qwen2_5", chat, options=MaskOptions(tool_calls=False)) == ["the cat", "b<|im_end|>"]


def thinking(content, thoughts, **kwargs):
    return {"role": "assistant", "content": content, "reasoning_content": thoughts, **kwargs}


THOUGHTS = {  # what is supervised, and what is left of it without thoughts
    "qwen3": (
        ["one<|im_end|>", "<think>\nso so\n</think>\n\ntwo<|im_end|>"],
        ["one<|im_end|>", "two<|im_end|>"],
    ),
    "qwen3_marked": (
        ["<think>\nhm\n</think>\n\none<|im_end|>", "<think>\nso so\n</think>\n\ntwo<|im_end|>"],
        ["one<|im_end|>", "two<|im_end|>"],
    ),
    "gptoss": (
        [
            "<|channel|>final<|message|>one<|end|>",
            "<|channel|>analysis<|message|>so so<|end|><|start|>assistant<|channel|>final<|message|>two<|return|>",
        ],
        ["<|channel|>final<|message|>one<|end|>", "<|start|>assistant<|channel|>final<|message|>two<|return|>"],
    ),
    "kimi_k2_thinking": (
        ["<think></think>one<|im_end|>", "<think>so so</think>two<|im_end|>"],
        ["one<|im_end|>", "two<|im_end|>"],
    ),
    "llama3": (["one<|eot_id|>", "two<|eot_id|>"], ["one<|eot_id|>", "two<|eot_id|>"]),  # it writes none
}


@pytest.mark.parametrize("family", THOUGHTS)
def test_thoughts(family):
    chat = [user("a"), thinking("one", "hm"), user("b"), thinking("two", "so so")]
    with_thoughts, without = THOUGHTS[family]
    assert marked(family, chat) == with_thoughts
    assert marked(family, chat, options=MaskOptions(thoughts=False)) == without


def test_thoughts_before_a_call():
    chat = [user("a"), thinking("", "hm", tool_calls=[CALL]), {"role": "tool", "content": "four"}]
    call, _ = TOOL_CALLS["qwen3"]
    assert marked("qwen3", chat) == [f"<think>\nhm\n</think>\n\n{call}"]
    assert marked("qwen3", chat, options=MaskOptions(thoughts=False)) == [call]
    assert marked("qwen3", chat, options=MaskOptions(tool_calls=False)) == ["<think>\nhm\n</think>\n\n"]
    harmony = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant" + TOOL_CALLS["gptoss"][0]
    assert marked("gptoss", chat) == [harmony]


def test_qwen3_without_thinking_has_the_empty_thoughts_in_its_prompt():
    """With `enable_thinking=False` the server writes them, so the model does not."""
    assert marked("qwen3", CHAT, template_kwargs={"enable_thinking": False}) == [
        "hi there<|im_end|>",
        "the cat<|im_end|>",
    ]


def test_plain_text_is_supervised_whole_and_a_rendered_chat_by_its_headers():
    tokenizer = family_tokenizer("smollm2")
    encoder = ConversationEncoder(tokenizer)
    ids, mask = encoder.encode([[{"role": "text", "content": "the cat and the other"}]])[0]
    assert supervised_texts(tokenizer, ids, mask) == ["the cat and the other<|im_end|>"]
    ids, mask = encoder.encode([[{"role": "text", "content": encoder.render(CHAT)}]])[0]
    assert (ids, mask) == encoder.encode([CHAT])[0]


pieces = [
    "a",
    "the cat",
    " ",
    "\n",
    "\n\n",
    "é",
    "😀",
    "\ue000",
    "<|im_end|>",
    "<|end|>",
    "<tool_call>",
    "<|assistant|>\n",
]
pieces += ["<|im_start|>assistant\n", "<|im_assistant|>assistant<|im_middle|>", "{{ messages }}", "{% generation %}"]
pieces += ["<think>", "</think>"]
# a newline at the start would melt with the header's into one token, which is then the answer's
contents = st.lists(st.sampled_from(pieces), max_size=5).map(lambda texts: "".join(texts).lstrip("\n"))
roles = st.sampled_from(["system", "user", "assistant", "assistant"])


@pytest.mark.parametrize("family", ["smollm2", "qwen2_5", "phi3", "kimi_k2"])
@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(roles, contents), min_size=1, max_size=6))
def test_masked_tokens_are_the_answers_with_their_ends(family, turns):
    """In any order of roles, with every family's own marks in the contents."""
    tokenizer, encoder = encoder_of(family)
    messages = [{"role": role, "content": content} for role, content in turns]
    ids, mask = encoder.encode([messages])[0]
    masked = tokenizer.decode([token for token, supervised in zip(ids, mask, strict=True) if supervised])
    end = WRITTEN[family][0]
    assert masked == "".join(text + end for role, text in turns if role == "assistant" and text.strip())


@lru_cache
def encoder_of(family):
    tokenizer = family_tokenizer(family)
    return tokenizer, ConversationEncoder(tokenizer)
