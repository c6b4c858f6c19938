"""Records of prompt files are those of training data: whatever form they have, and whatever is wrong with them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_families import family_tokenizer
from tiny_tokenizer import CHATML, tiny_tokenizer

from hf_eagle.data.messages import read_tools, to_messages
from hf_eagle.data.rendering import ChatRenderer
from hf_eagle.evaluation.prompts import Prompt, encode_prompt, load_prompts, render_prompt


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def said(role, content, **more):
    return {"role": role, "content": content, **more}


TOKENIZER = tiny_tokenizer(CHATML)
TOOL = {
    "name": "weather",
    "description": "Of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TURNS = [said("user", "one"), said("assistant", "two"), said("user", "three")]
# a record and the messages of its prompt
FORMS = {
    "other names in messages": ({"messages": [{"from": "human", "value": "one"}]}, [said("user", "one")]),
    "messages as JSON text": ({"messages": json.dumps(TURNS)}, TURNS),
    "system beside the chat": (
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "one"}]},
        [said("system", "Be brief."), said("user", "one")],
    ),
    "system beside turns": (
        {"system": "Be brief.", "turns": ["one"]},
        [said("system", "Be brief."), said("user", "one")],
    ),
    "question with its answer": ({"question": "one", "answer": "two"}, [said("user", "one")]),
    "instruction with input": ({"instruction": "one", "input": "two", "output": "three"}, [said("user", "one\ntwo")]),
    "preference": ({"prompt": "one", "chosen": "good", "rejected": "bad"}, [said("user", "one")]),
    "the whole chat preferred": ({"chosen": [*TURNS, said("assistant", "four")], "rejected": []}, TURNS),
    "parts": (
        {"messages": [said("user", [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])]},
        [said("user", "one\ntwo")],
    ),
    "calls as text": (
        {
            "messages": [
                said("user", "one"),
                said(
                    "assistant",
                    None,
                    tool_calls=[CALL | {"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
                ),
                said("tool", "rain", name="weather"),
            ]
        },
        [said("user", "one"), said("assistant", "", tool_calls=[CALL]), said("tool", "rain", name="weather")],
    ),
    "thoughts": (
        {"messages": [said("user", "one"), said("assistant", "two", thinking="hm"), said("user", "three")]},
        [said("user", "one"), said("assistant", "two", reasoning_content="hm"), said("user", "three")],
    ),
    "answers with calls left off": (
        {"messages": [said("user", "one"), said("assistant", None, tool_calls=[CALL])]},
        [said("user", "one")],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, tmp_path):
    record, messages = FORMS[form]
    assert load_prompts(write(tmp_path / "prompts.jsonl", record)) == [Prompt(messages, None, 0)]


@pytest.mark.parametrize("family", ["smollm2", "llama3", "llama3_1", "qwen2_5", "qwen3", "gptoss", "kimi_k2"])
def test_prompts_are_what_training_renders(family, tmp_path):
    """One prompt a form, tools in the forms that they come in, and the ids of what the renderer of training writes."""
    tokenizer = family_tokenizer(family)
    records = [record for record, _ in FORMS.values()] + [{"prompt": "one", "tools": tools} for tools in TOOLS]
    prompts = load_prompts(write(tmp_path / "prompts.jsonl", *records))
    for record, prompt in zip(records, prompts, strict=True):
        if "turns" in record:
            record = {"messages": [said("user", record["turns"][0])], "system": record["system"]}
        messages = to_messages(record)
        while messages[-1]["role"] == "assistant":
            messages.pop()
        expected = ChatRenderer(tokenizer).render(messages, read_tools(record, 0), add_generation_prompt=True)
        assert render_prompt(prompt, tokenizer) == expected
        assert encode_prompt(prompt, tokenizer) == tokenizer(expected, add_special_tokens=False)["input_ids"]


TOOLS = ([TOOL], [{"type": "function", "function": TOOL}], json.dumps([TOOL]), [json.dumps(TOOL)])


def test_tools_are_on_offer_whatever_form_they_have(tmp_path):
    prompts = load_prompts(write(tmp_path / "prompts.jsonl", *({"turns": ["one", "two"], "tools": t} for t in TOOLS)))
    for prompt in prompts:
        assert prompt.tools == [{"type": "function", "function": TOOL}]
        assert prompt.answered("so").tools == prompt.tools  # behind an answer too
    texts = {render_prompt(prompt, family_tokenizer("qwen2_5")) for prompt in prompts}
    assert len(texts) == 1 and '"name": "weather"' in texts.pop()


def test_template_options_are_those_of_training():
    tokenizer, prompt = family_tokenizer("qwen3"), Prompt([said("user", "one")], None, 0)
    options = {"enable_thinking": False}
    text = tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True, **options)
    assert render_prompt(prompt, tokenizer, options) == text and text.endswith("<think>\n\n</think>\n\n")
    assert render_prompt(prompt, tokenizer) != text
    # tools among them are for prompts that bring none
    own = Prompt(prompt.messages, None, 0, tools=[{"type": "function", "function": TOOL | {"name": "own"}}])
    offered = {"tools": [{"type": "function", "function": TOOL}]}
    assert '"name": "weather"' in render_prompt(prompt, tokenizer, offered)
    assert '"name": "own"' in render_prompt(own, tokenizer, offered)
    assert '"name": "weather"' not in render_prompt(own, tokenizer, offered)
    with pytest.raises(ValueError, match="Prompt 0 holds the lone surrogate"):  # as said in Python
        encode_prompt(Prompt([said("user", "one \ud800")], None, 0), tokenizer)
    with pytest.raises(ValueError, match="`template_kwargs` holds 'tokenize', which no chat template sees"):
        render_prompt(prompt, tokenizer, {"tokenize": True})


@pytest.mark.parametrize(
    ("category", "id_", "text", "same"),
    [
        (3, 1.5, "3", "1.5"),
        (["a", 1], {"n": 1}, '["a", 1]', '{"n": 1}'),
        (True, "x", "true", "x"),
        ("writing", 7, "writing", 7),
    ],
)
def test_a_category_of_any_type_is_its_text(tmp_path, category, id_, text, same):
    (prompt,) = load_prompts(write(tmp_path / "p.jsonl", {"prompt": "one", "category": category, "id": id_}))
    assert (prompt.category, prompt.id) == (text, same)


def test_what_is_asked_is_text(tmp_path):
    """Of parts their texts, so that held-out prompts can be looked for in data."""
    shown = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]
    records = [{"messages": [said("user", shown)]}, {"turns": ["one", "two"]}]
    assert [prompt.asked for prompt in load_prompts(write(tmp_path / "p.jsonl", *records))] == [
        ["\nWhat is it?"],
        ["one", "two"],
    ]


def test_media_of_a_column_stand_in_their_places(tmp_path):
    """As in training; a record of text beside them keeps its parts, which a processor's template joins itself."""
    shown = [{"type": "image"}, {"type": "text", "text": "What?"}]
    spoken = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    records = [{"messages": [said("user", shown)], "images": ["a.png"]}, {"messages": [said("user", spoken)]}]
    first, second = load_prompts(write(tmp_path / "p.jsonl", *records))
    assert first.messages == [said("user", [{"type": "image", "image": "a.png"}, shown[1]])]
    assert second.messages == [said("user", spoken)]
    tokenizer = tiny_tokenizer(CHATML)
    assert "one\ntwo" in render_prompt(second, tokenizer)  # for a target of text
    with pytest.raises(ValueError, match="Prompt 0 holds images or videos, but the target takes text only"):
        encode_prompt(first, tokenizer)


BAD = [
    (
        '{"messages": [{"role": "user", "content": 7}]}',
        r"Record 0 of the prompt file .*message 0 must be text, got int",
    ),
    ('{"conversations": [{"from": "human", "value": true}]}', r"Record 0 .*message 0 must be text, got bool"),
    ('{"prompt": 7.5}', r"Record 0 of the prompt file .*must be text, got float"),
    ('{"messages": [{"role": "user", "content": {"a": 7}}]}', r"Record 0 of the prompt file .*must be text, got dict"),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', r"Record 0 of the prompt file .*role"),
    ('{"messages": [7]}', r"Record 0 of the prompt file .*message 0 must be an object"),
    ('{"prompt": "x", "tools": [7]}', r"Record 0 of the prompt file .*`tools` must be a list of objects"),
    ('{"prompt": "one \\ud800 two"}', r"A prompt file cannot be read: .*lone surrogate"),
    ('{"prompt": "x", "category": "\\udfff"}', r"A prompt file cannot be read: .*lone surrogate"),
    (
        '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
        r"A prompt file cannot be read: Line 1 of .*nested more than",
    ),
    ("[" * 100_000 + "]" * 100_000, r"A prompt file cannot be read: .*nested more than"),
    ('{"turns": ["x", 7]}', r"Record 0 of the prompt file .* has no readable prompt"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_what_cannot_be_read_is_one_sentence_with_file_and_record(tmp_path, name, line, message):
    (tmp_path / name).write_text(line + "\n")
    with pytest.raises(ValueError, match=message) as told:
        load_prompts(tmp_path / name)
    assert "\n" not in str(told.value) and name in str(told.value)


NAMES = ("messages", "role", "content", "turns", "conversations", "from", "value", "prompt", "tools", "tool_calls")
NAMES += ("function", "name", "arguments", "thinking", "type", "text", "images", "category", "id", "system", "question")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)
ROLE = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt"]) | JSON
MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": JSON}, optional={"tool_calls": JSON, "thinking": JSON})
RECORD = st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1, max_size=4) | st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, min_size=1, max_size=3)}, optional={"tools": JSON, "category": JSON, "id": JSON}
)


@settings(max_examples=300, deadline=None)
@given(record=RECORD)
def test_any_record_is_a_prompt_that_can_be_rendered_or_is_named(record, tmp_path_factory):
    path = write(tmp_path_factory.getbasetemp() / "any.jsonl", record)
    try:
        (prompt,) = load_prompts(path)
    except ValueError as problem:
        assert str(path) in str(problem) and ("ecord 0" in str(problem) or "Line 1" in str(problem))
        return
    json.dumps([prompt.id, prompt.category, prompt.asked])  # what is written of it at the end
    assert prompt.category is None or isinstance(prompt.category, str)
    try:
        assert encode_prompt(prompt, TOKENIZER)
    except ValueError as problem:
        assert f"rompt {prompt.id!r}" in str(problem)


def test_records_that_are_no_prompts_are_left_out_and_counted(tmp_path, caplog):
    """As ShareGPT has them: without a turn. Those that were asked for are the first that are prompts."""
    path = tmp_path / "prompts.jsonl"
    empty, asked = {"conversations": []}, [{"conversations": [{"from": "human", "value": str(n)}]} for n in range(4)]
    write(path, empty, asked[0], {"text": "a document"}, asked[1], asked[2])
    path.write_text(path.read_text() + "no json\n" + json.dumps(asked[3]) + "\n")
    for limit in (None, 4, 2):
        caplog.clear()
        found = load_prompts(path, limit, skip_bad_records=True)
        assert [prompt.messages[0]["content"] for prompt in found] == ["0", "1", "2", "3"][:limit]
        assert [prompt.id for prompt in found] == [1, 3, 4, 6][:limit]
        assert f"{2 if limit == 2 else 3} records of {path} are no prompts and were left out" in caplog.text
    with pytest.raises(ValueError, match="cannot be read"):
        load_prompts(path)
    write(path, empty)
    with pytest.raises(ValueError, match="Record 0 of the prompt file"):
        load_prompts(path, skip_bad_records=True)
