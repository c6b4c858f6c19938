"""Put unused characters around the parts of messages, so that their positions in the rendered text are exact.

Removing them gives the plain text again, whatever the messages say.
"""

import re
from collections import defaultdict

from .messages import text_of


GENERATION = re.compile(r"\{%(-?)\s*generation\s*(-?)%\}")
_END_GENERATION = re.compile(r"\{%(-?)\s*endgeneration\s*(-?)%\}")
_THOUGHTS = re.compile(r"(.*</think>\s*)?(.*)", re.DOTALL)
# in order: start of an answer's content, end of the reasoning in it, end of the content; start and end of the reasoning
# in a separate field; strings of tool calls; the end of a content that is no answer
_KINDS = ("opening", "said", "closing", "thinking", "thought", "call", "other")

Places = dict[str, dict[int, list[int]]]  # kind -> number of the message -> position of each mark in the plain text


def unused_characters(*texts: str) -> dict[str, str]:
    """Return a private-use character for each kind of mark, none of which occurs in the texts."""
    free = (chr(code) for code in range(0xE000, 0xF900) if not any(chr(code) in text for text in texts))
    return {kind: next(free) for kind in _KINDS}


def mark_messages(messages: list[dict], marks: dict[str, str], others: bool = True) -> list[dict]:
    """Add marks that carry the numbers of messages; contents that are no answers are marked if `others`."""
    marked = []
    for number, message in enumerate(messages):

        def mark(kind, number=number):
            return f"{marks[kind]}{number}{marks[kind]}"

        if message["role"] == "assistant":
            changed = {}
            if message["content"].strip():
                changed["content"] = _inside(message["content"], mark("opening"), mark("closing"), mark("said"))
            if message.get("reasoning_content", "").strip():
                changed["reasoning_content"] = _inside(message["reasoning_content"], mark("thinking"), mark("thought"))
            if message.get("tool_calls"):
                changed["tool_calls"] = [_mark_call(call, mark("call")) for call in message["tool_calls"]]
            message = message | changed
        elif others and message["role"] in ("user", "tool") and text_of(message["content"]).strip():
            message = message | {"content": _mark_end(message["content"], mark("other"))}
        marked.append(message)
    return marked


def mark_template(template: str, marks: dict[str, str]) -> str:
    """Return the template with `{% generation %}` blocks as `with` blocks (the same scope) that write the marks."""
    template = GENERATION.sub(rf"{{%\1 with %}}{marks['opening'] * 2}{{% if true \2%}}", template)
    return _END_GENERATION.sub(rf"{{%\1 endif %}}{marks['closing'] * 2}{{% endwith \2%}}", template)


def take_out(marked: str, marks: dict[str, str]) -> tuple[str, Places]:
    """Return the text without marks, and the positions of all marks; a mark without a number counts as number 0."""
    kinds = {character: kind for kind, character in marks.items()}
    places: Places = {kind: defaultdict(list) for kind in marks}
    pieces, last, taken = [], 0, 0

    for mark in re.finditer(rf"([{''.join(kinds)}])(\d*)\1", marked):
        pieces.append(marked[last : mark.start()])
        places[kinds[mark[1]]][int(mark[2] or 0)].append(mark.start() - taken)
        last, taken = mark.end(), taken + len(mark[0])
    return "".join(pieces) + marked[last:], places


def count_call_marks(message: dict) -> int:
    """Return the number of marks that a message's tool calls get."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return sum(2 + _strings(function["arguments"]) for function in calls)


def _inside(text: str, opening: str, closing: str, said: str = "") -> str:
    """Put marks inside the surrounding white space: then a template that strips it gives the same text with them."""
    before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    thoughts, words = _THOUGHTS.fullmatch(text.strip()).groups() if said else ("", text.strip())
    return before + opening + (thoughts + said if thoughts else "") + words + closing + after


def _mark_end(content: str | list[dict], mark: str) -> str | list[dict]:
    """Put the mark behind a text, or behind the last one among its parts."""
    if isinstance(content, str):
        return _inside(content, "", mark)

    last = max(n for n, part in enumerate(content) if part.get("text", "").strip())
    return [*content[:last], content[last] | {"text": _inside(content[last]["text"], "", mark)}, *content[last + 1 :]]


def _mark_call(call: dict, mark: str) -> dict:
    function = call["function"]
    arguments = _mark_strings(function["arguments"], mark)
    return call | {"function": function | {"name": mark + function["name"] + mark, "arguments": arguments}}


def _mark_strings(value, mark: str):
    if isinstance(value, dict):
        return {key: _mark_strings(inner, mark) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mark_strings(inner, mark) for inner in value]
    return value + mark if isinstance(value, str) else value


def _strings(value) -> int:
    if isinstance(value, dict | list):
        return sum(map(_strings, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str)
