"""Convert one chat record, of any common form, to messages of one shape; and read the tools that it offers."""

import json
import re
from collections.abc import Mapping
from typing import Any

from .forms import ANSWERS, COLUMNS, FORM, FORMS, ORIGIN, SYSTEMS, column_names, named, recognise_form
from .picture_forms import folder_of, kind_of, with_media
from .reading import parse_json
from .roles import CALLS, ROLES, role_of, speaker
from .said import read_reasons


_OF_TOOLS = ("name", "tool_call_id")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_THOUGHT_PARTS = ("thinking", "reasoning")
_SPEAKERS = re.compile(r"\n\n(Human|Assistant): ?")
TEXT = "text"  # the role of a document that is not a chat


def text_of(content: str | list[dict]) -> str:
    """Return the text of a content, without its images and videos."""
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


def to_messages(
    record: Mapping, form: str | None = None, content_parts: bool = False, media_root: str | None = None
) -> list[dict]:
    """Return the conversation of a record as `[{"role": ..., "content": ...}]`, roles system, user, assistant and tool.

    An answer may also have `reasoning_content` and `tool_calls`, whose arguments are an object; a tool's message may
    have `name` and `tool_call_id`. An answer may be missing. A `system` or `system_prompt` text goes first. A document
    of plain text is one message of the role `text`. Numbers and booleans in place of a text become their JSON. Objects
    are kept unchanged, including their nulls.

    Args:
        record: record of any form in `FORMS`.
        form: key of its form; by default the form that its columns show.
        content_parts: keep contents that are lists of typed parts (text, images, videos), and add media of columns (see
            `picture_forms`), instead of refusing media.
        media_root: folder of relative media paths; by default the folder of the record's file.

    Raises:
        `ValueError`: if the record has none of these forms, no message, an unknown role, a content that is not text, or
            media that no part of a message shows.
    """
    if not isinstance(record, Mapping):
        raise ValueError(
            f"a record must be an object with {', or '.join(FORMS.values())}, got {type(record).__name__}."
        )

    whole, record = record, {key: value for key, value in record.items() if value is not None}
    form = form or recognise_form(record)
    column = next((name for name in COLUMNS[form] if name in record), None)
    if column is None:
        raise ValueError(
            f"`dataset_format` is {form}, which is read from `{COLUMNS[form][0]}`, but the columns are "
            f"{column_names(record)}."
        )

    turns = (_by_turns if column == "data" else _TURNS[form])(record, record[column])
    messages = [_message(turn, place, content_parts) for place, turn in enumerate(turns)]
    messages = [message for message in messages if message]
    if not messages:
        raise ValueError("the conversation is empty; remove the record, or give it at least one message.")

    messages = with_media(whole, messages, media_root or folder_of(record.get(ORIGIN)), content_parts)
    system = next((record[name] for name in SYSTEMS if isinstance(record.get(name), str) and record[name]), None)
    if system is not None and messages[0]["role"] not in ("system", TEXT):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def read_record(
    record: Mapping, index: int, form: str | None = None, content_parts: bool = False, media_root: str | None = None
) -> tuple[list[dict], list[str] | None]:
    """Return messages and, if regeneration wrote them, each answer's `finish_reason`.

    Raises a `ValueError` as `to_messages` does, and for an invalid `finish_reason`. It names the record by its file, or
    else by its index.
    """
    where = named(record, index) if isinstance(record, Mapping) else f"Record {index}"
    try:
        messages = to_messages(record, form, content_parts, media_root)
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}") from None

    answers = sum(message["role"] == "assistant" for message in messages)
    found = record.get("finish_reason")
    return messages, found if found == [] else read_reasons(found, answers, where)


def read_tools(record: Mapping, index: int) -> list[dict] | None:
    """Return the tools of a record as JSON schemas, from the column `tools` (or `functions`).

    The column holds a list, its JSON text, or a list of JSON texts. Anything else raises a `ValueError` that names the
    record.
    """
    found = next((record[name] for name in ("tools", "functions") if record.get(name)), None)
    where = f"{named(record, index)}: `tools`"
    found = parse_json(found, where) if isinstance(found, str) else found
    if found is not None and not isinstance(found, list):
        raise ValueError(f"{where} must be a list of JSON schemas, got {type(found).__name__}.")

    tools = [parse_json(tool, where) if isinstance(tool, str) else tool for tool in found or ()]
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where} must be a list of objects, each the JSON schema of a tool.")
    # templates expect OpenAI's envelope
    return [t if "function" in t or "type" in t else {"type": "function", "function": t} for t in tools] or None


def _preference(record: dict, chosen) -> list:
    """Return the turns of a preference record: prompt and `chosen`, which may also hold the whole conversation."""
    if isinstance(chosen, str) and _SPEAKERS.match(chosen):  # "\n\nHuman: ...\n\nAssistant: ..."
        pieces = _SPEAKERS.split(chosen)[1:]
        return [{"from": who.lower(), "value": said} for who, said in zip(pieces[::2], pieces[1::2], strict=True)]

    answer = [chosen] if isinstance(chosen, dict) else _side(chosen, "assistant")
    first = answer[0] if answer and isinstance(answer[0], dict) else {}
    if role_of(first) != "assistant":
        return answer

    question = {key: value for key, value in record.items() if key not in ("chosen", FORM, *ANSWERS)}
    form = recognise_form(question)
    column = next(name for name in COLUMNS[form] if name in question)
    return _TURNS[form](question, question[column]) + answer


def _alpaca(record: dict, instruction) -> list:
    turns, history = [], record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("`history` must be a list of pairs, each a question and its answer.")

    for question, answer in history:
        turns += _side(question, "user") + _side(answer, "assistant")

    parts = [instruction] + [record[key] for key in ("input", "context") if not _is_empty(record.get(key))]
    asked = parts[0] if len(parts) == 1 else "\n".join(_text(part, len(turns)) for part in parts)
    return turns + _side(asked, "user") + _answer(record)


def _conversation(record: dict, turns) -> list:
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # in CSV, for example
        turns = parse_json(turns, "the conversation")
    if not isinstance(turns, list):
        raise ValueError(f"the conversation must be a list of messages, got {type(turns).__name__}.")
    return turns


def _by_turns(record: dict, texts) -> list:
    """Texts without names, said in turn by the user and the assistant."""
    texts = parse_json(texts, "`data`") if isinstance(texts, str) else texts

    if not isinstance(texts, list):
        raise ValueError(f"`data` must be a list of texts, got {type(texts).__name__}.")
    return [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts)]


_TURNS = {
    "preference": _preference,
    "messages": _conversation,
    "sharegpt": _conversation,
    "alpaca": _alpaca,
    "prompt_completion": lambda record, prompt: _side(prompt, "user") + _answer(record),
    "text": lambda record, text: [{"role": TEXT, "content": text}],
}


def _answer(record: dict) -> list:
    return _side(next((record[name] for name in ANSWERS if not _is_empty(record.get(name))), None), "assistant")


def _is_empty(value) -> bool:
    return value is None or value == "" or value == []


def _side(text, role: str) -> list:
    """Return one side of a record, a text, messages or nothing, as messages."""
    if _is_empty(text):
        return []
    return text if isinstance(text, list) else [{"role": role, "content": text}]


def _message(turn, place: int, content_parts: bool = False) -> dict | None:
    if not isinstance(turn, Mapping):
        raise ValueError(f"message {place} must be an object with role and content, got {type(turn).__name__}.")
    if turn.get("role") == TEXT:
        return None if _is_empty(turn.get("content")) else {"role": TEXT, "content": _text(turn["content"], place)}

    said, content = speaker(turn), turn.get("content")
    role = ROLES.get(said) if isinstance(said, str) else None
    content = turn.get("value") if content is None else content
    if role is None:
        said = turn.get("role") or turn.get("from")  # in its original spelling
        raise ValueError(f"message {place} has the unknown role {said!r}; known are {', '.join(ROLES)}.")

    calls = _tool_calls(turn.get("tool_calls") or turn.get("function_call"), place)
    if said in CALLS and not calls:
        calls = _call_in_text(content)
        content = "" if calls else content

    content = "" if content is None and calls else content
    thoughts = next((turn[name] for name in _THOUGHTS if turn.get(name)), None)
    if role == "assistant" and isinstance(content, list):
        thoughts, content = _thoughts_apart(content, thoughts, place)

    read = _parts if content_parts and content and isinstance(content, list) else _text
    message = {"role": role, "content": read(content, place)}
    if thoughts and role == "assistant":
        message["reasoning_content"] = _text(thoughts, place)
    if calls:
        message["tool_calls"] = calls
    return message | {key: _text(turn[key], place) for key in _OF_TOOLS if role == "tool" and turn.get(key)}


def _thoughts_apart(content: list, thoughts, place: int) -> tuple[Any, list]:
    """Separate an answer's reasoning parts, if it has any, from its other parts."""
    inside = [part for part in content if isinstance(part, Mapping) and part.get("type") in _THOUGHT_PARTS]
    if not inside:
        return thoughts, content

    texts = [next((part[name] for name in (*_THOUGHT_PARTS, "text") if part.get(name)), "") for part in inside]
    return "\n".join(_text(text, place) for text in texts), [part for part in content if part not in inside]


def _parts(content: list, place: int) -> list[dict]:
    if not all(isinstance(part, Mapping) and part.get("type") for part in content):
        raise ValueError(f"every part of the content of message {place} must be an object with a `type`.")
    return [dict(part) for part in content]


def _text(content, place: int) -> str:
    """Return a content as text; typed parts are joined by line breaks, as servers do for templates of text only."""
    if isinstance(content, list) and all(isinstance(part, str | Mapping) for part in content):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        for part in parts:
            if not isinstance(part.get("text"), str):
                raise ValueError(f"the content of message {place} must be text, but holds {_no_text(part)}")
        return "\n".join(part["text"] for part in parts)

    if isinstance(content, bool | int | float):
        return json.dumps(content)
    if not isinstance(content, str):
        raise ValueError(f"the content of message {place} must be text, got {type(content).__name__}.")
    return content


def _no_text(part: Mapping) -> str:
    """What a part is that holds no text, and what to do, as the end of a sentence."""
    kind = part.get("type")
    if kind_of(part):
        way = "images and videos need a target that takes them, and no `streaming`; leave such records out."
        return f"a part of the type {kind!r}: {way}"
    if kind is None:
        return "a part without a `type` and a text: name its type, or leave such records out."
    return (
        f"a part of the type {kind!r}, which is not known: a medium is of the type image, video, image_url or "
        "video_url; correct it, or leave such records out."
    )


def _tool_calls(calls, place: int) -> list[dict]:
    """Return OpenAI's tool calls, with arguments as objects, as templates expect them."""
    try:
        calls = _parsed(calls)
        calls = [calls] if isinstance(calls, Mapping) else calls
        return [_call(_parsed(call)) for call in calls or ()]
    except (TypeError, KeyError, AttributeError, ValueError) as problem:
        raise ValueError(
            f"the `tool_calls` of message {place} cannot be read ({problem!r}); each is an object with a `function` "
            "that has a `name` and `arguments`."
        ) from None


def _call(call: Mapping) -> dict:
    function = call.get("function") or call
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str) and arguments.strip():
        arguments = parse_json(arguments, "`arguments`")
    found = {"type": "function", "function": {"name": str(function["name"]), "arguments": arguments or {}}}
    return {"id": call["id"], **found} if call.get("id") else found


def _call_in_text(content) -> list[dict]:
    """Return the tool calls that ShareGPT's `function_call` holds as JSON; none if it holds something else."""
    try:
        calls = parse_json(content, "the call")
        return [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    except (TypeError, KeyError, AttributeError, ValueError):
        return []


def _parsed(value):
    return parse_json(value, "its text") if isinstance(value, str) else value
