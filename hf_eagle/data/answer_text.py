"""Parse a target's answer, a text with all its special tokens, into the message that chat templates take.

Reasoning and tool calls have their own fields there. Only this module knows how each model family marks them.
"""

import json
import re
from dataclasses import dataclass, field


_THINK, _END_THINK = "<think>", "</think>"
# gpt-oss: any number of messages to channels; the last one may be cut
_HARMONY = re.compile(
    r"(?P<start>[^<]*)<\|channel\|>(?P<channel>[^<]*)(?:<\|constrain\|>[^<]*)?<\|message\|>(?P<text>.*?)"
    r"(?:<\|end\|>|<\|return\|>|<\|call\|>|\Z)",
    re.DOTALL,
)
_RECIPIENT = re.compile(r"to=(?:functions\.)?(\S+)")
# a call as JSON (Qwen, Hermes, Mistral), or its name and arguments separately (DeepSeek, Kimi)
_CALLS = (
    re.compile(r"<tool_call>\s*(?P<call>\{.*?\})\s*</tool_call>", re.DOTALL),
    re.compile(r"\[TOOL_CALLS\]\s*(?P<call>\[.*\])", re.DOTALL),
    re.compile(
        r"(?:<｜tool▁calls▁begin｜>)?<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^\n<]+)"
        r"(?:\n```json\n|<｜tool▁sep｜>)(?P<arguments>\{.*?\})(?:\n```)?<｜tool▁call▁end｜>",
        re.DOTALL,
    ),
    re.compile(
        r"(?:<\|tool_calls_section_begin\|>)?<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>[^:<]+):\d+)\s*"
        r"<\|tool_call_argument_begin\|>\s*(?P<arguments>\{.*?\})\s*<\|tool_call_end\|>",
        re.DOTALL,
    ),
)


@dataclass(frozen=True)
class SaidAnswer:
    """The parts of an answer. `text[:thought_end]` is its reasoning; its tool calls begin at `calls_start`, if any.

    If `plain`, no part is marked: the whole text is its content.
    """

    content: str
    thoughts: str = ""
    calls: list[dict] = field(default_factory=list)
    thought_end: int = 0
    calls_start: int | None = None
    plain: bool = False


def read_answer(text: str, opened: bool = False) -> SaidAnswer:
    """Parse an answer, which may be cut anywhere.

    Args:
        text: the whole answer, including special tokens, without the end of turn.
        opened: whether the prompt opened the reasoning, as DeepSeek's prompts do.
    """
    if "<|channel|>" in text:
        return _read_harmony(text)

    thought_end, thoughts = 0, ""
    if opened or text.lstrip().startswith(_THINK):
        before, _, _ = text.partition(_END_THINK)
        thoughts = before.strip().removeprefix(_THINK).strip()
        rest = text[len(before) :].removeprefix(_END_THINK).lstrip()
        thought_end = len(text) - len(rest)

    calls_start, calls = _read_calls(text, thought_end)
    content = text[thought_end:calls_start]
    plain = not thought_end and calls_start is None
    content = content if calls_start is None else content.rstrip()
    return SaidAnswer(content, thoughts, calls, thought_end, calls_start, plain)


def _read_harmony(text: str) -> SaidAnswer:
    contents, thoughts, calls = [], [], []
    thought_end, calls_start = 0, None

    for found in _HARMONY.finditer(text):
        recipient = _RECIPIENT.search(f"{found['start']} {found['channel']}")
        call = recipient and _call(recipient[1], found["text"])
        if call:
            calls.append(call)
            calls_start = found.start() if calls_start is None else calls_start
        elif found["channel"].split()[:1] == ["analysis"]:
            thoughts.append(found["text"])
            thought_end = found.end() if calls_start is None else thought_end
        else:
            contents.append(found["text"])

    # a message that is cut before its text begins has no content
    return SaidAnswer("\n".join(contents), "\n".join(thoughts), calls, thought_end, calls_start)


def _read_calls(text: str, start: int) -> tuple[int | None, list[dict]]:
    """Return start and list of the tool calls; none unless all can be parsed, or the others' text would be lost."""
    for form in _CALLS:
        found = list(form.finditer(text, start))
        if not found:
            continue

        calls = []
        for one in found:
            parts = one.groupdict()
            calls += _json_calls(parts["call"]) if "call" in parts else [_call(**parts)]
        return (found[0].start(), calls) if all(calls) else (None, [])
    return None, []


def _json_calls(text: str) -> list[dict | None]:
    try:
        calls = json.loads(text)
        calls = calls if isinstance(calls, list) else [calls]
        return [_call(call["name"], json.dumps(call.get("arguments", {})), call.get("id")) for call in calls] or [None]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return [None]


def _call(name: str, arguments: str, id: str | None = None) -> dict | None:
    """Return a tool call in OpenAI's form; `None` if its arguments are not an object."""
    try:
        read = json.loads(arguments)
    except (ValueError, RecursionError):
        return None

    if not isinstance(read, dict):
        return None
    call = {"type": "function", "function": {"name": name.strip(), "arguments": read}}
    return {"id": id.strip(), **call} if id else call
