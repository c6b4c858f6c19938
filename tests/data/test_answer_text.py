"""What a target says, read as a message: thoughts, calls and content, wherever it is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_eagle.data.answer_text import read_answer


CALL = '{"name": "look", "arguments": {"at": "four"}}'
HERMES = f"<tool_call>\n{CALL}\n</tool_call>"
HARMONY_CALL = (
    "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.look<|channel|>commentary json<|message|>"
    '{"at": "four"}<|call|>'
)
FINAL = "<|channel|>final<|message|>four"


@pytest.mark.parametrize(
    ("text", "opened", "content", "thoughts", "calls"),
    [
        (" four \n", False, " four \n", "", 0),
        ("<think>\nhm\n</think>\n\nfour ", False, "four ", "hm", 0),
        ("hm\n</think>\n\nfour", True, "four", "hm", 0),
        ("hm", True, "", "hm", 0),
        ("a </think> b", False, "a </think> b", "", 0),
        ("<think>hm", False, "", "hm", 0),
        (f"so:\n{HERMES}\n{HERMES}", False, "so:", "", 2),
        (f"<think>hm</think>{HERMES}", False, "", "hm", 1),
        (f"[TOOL_CALLS][{CALL}, {CALL}]", False, "", "", 2),
        ("<tool_call>\n{broken}\n</tool_call>", False, "<tool_call>\n{broken}\n</tool_call>", "", 0),
        ("<tool_call>\n[1]\n</tool_call>", False, "<tool_call>\n[1]\n</tool_call>", "", 0),
        ("[TOOL_CALLS][]", False, "[TOOL_CALLS][]", "", 0),
        (FINAL, False, "four", "", 0),
        (f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant{FINAL}<|return|>", False, "four", "hm", 0),
        ("<|channel|>analysis<|message|>hm", False, "", "hm", 0),
        ("<|channel|>analysis", False, "", "", 0),
        (HARMONY_CALL, False, "", "hm", 1),
    ],
)
def test_parts(text, opened, content, thoughts, calls):
    found = read_answer(text, opened)
    assert (found.content, found.thoughts, len(found.calls)) == (content, thoughts, calls)
    assert found.plain == (not thoughts and not calls and "<|channel|>" not in text)
    assert all(call["function"] == {"name": "look", "arguments": {"at": "four"}} for call in found.calls)


PIECES = ["<think>", "</think>", "hm", "\n", " four", HERMES, "<tool_call>", "{", "[TOOL_CALLS]", "<|channel|>"]
PIECES += ["analysis", "final", "<|message|>", "<|end|>", "<|call|>", " to=functions.look", CALL, "<|start|>assistant"]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.booleans())
def test_parts_lie_inside_the_text_in_their_order(text, opened):
    found = read_answer(text, opened)
    assert 0 <= found.thought_end <= len(text)
    assert found.calls_start is None or 0 <= found.calls_start <= len(text)
    assert bool(found.calls) == (found.calls_start is not None)
    if found.plain:
        assert found.content == text
