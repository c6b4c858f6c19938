"""Prompt files for measuring acceptance: read into `Prompt`s, rendered by the target's chat template.

Records are read and rendered by the same code as training data.
"""

import io
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from ..data.forms import recognise_form
from ..data.media import has_media, read_media_record
from ..data.messages import TEXT, read_tools, text_of, to_messages
from ..data.picture_forms import COLUMNS
from ..data.reading import Bad, check_surrogates, opened, read_json_records
from ..data.rendering import ChatRenderer
from ..data.unread_media import MarksAsText, unread_media


logger = logging.getLogger(__name__)

FORMS = '{"turns": [...]}, {"messages": [...]}, {"conversations": [...]} or {"prompt": ...}'
_CHATS = ("chosen", "messages", "conversations", "conversation", "instruction", "prompt", "question", "query")
_CHATS += ("data", "input")
_IDS = ("question_id", "task_id", "id")
MEDIA_COLUMNS = tuple(name for names in COLUMNS.values() for name in names)


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer."""

    messages: list[dict]  # as `to_messages` returns them, the last one not the assistant's
    category: str | None  # MT-Bench's category, if the file gives one
    id: str | int  # the record's id, else its index in the file, from 0
    follow_ups: tuple[str, ...] = ()  # the user's later messages, one after each answer
    tools: list[dict] | None = None  # JSON schemas of the tools offered

    @property
    def asked(self) -> list[str]:
        """The texts of its last message and of all follow-ups."""
        return [text_of(self.messages[-1]["content"]), *self.follow_ups]

    def answered(self, answer: str) -> "Prompt":
        """Return the dialogue extended by the target's answer and by the next follow-up, if there is one."""
        messages = [*self.messages, {"role": "assistant", "content": answer}]
        if self.follow_ups:
            messages.append({"role": "user", "content": self.follow_ups[0]})
        return replace(self, messages=messages, follow_ups=self.follow_ups[1:])


def load_prompts(
    path: str | Path, limit: int | None = None, media_root: str | None = None, skip_bad_records: bool = False
) -> list[Prompt]:
    """
    Reads a file of prompts.

    Every record is one of
    * MT-Bench's form, `{"question_id": 81, "category": "writing", "turns": ["...", "..."]}`: the first turn is the
      prompt, the others follow up on the target's answers;
    * `{"messages": [{"role": "user", "content": "..."}, ...]}`, or any other form of a chat that training data may
      have (see `to_messages`): ShareGPT's, `question`, `instruction`, with `tools`, reasoning, tool calls and media.
      Assistant messages at the end are answers, and are dropped;
    * `{"prompt": "..."}` or `{"prompt": [messages]}`, which is HumanEval's form too (`task_id` is its id).

    Args:
        path (`str` or `Path`):
            `.jsonl` (one record per line), `.json` (a list of records, or one per line), either also as `.gz`; or
            `.txt`, one prompt per line. Blank lines are skipped.
        limit (`int`, *optional*):
            Take the first `limit` prompts only.
        media_root (`str`, *optional*):
            Folder of relative image and video paths; by default the folder of the file.
        skip_bad_records (`bool`, *optional*, defaults to `False`):
            Leave out records that are no prompts, instead of raising an error; a warning counts them.

    Raises:
        `ValueError`: if the file is missing, is not text or JSON, holds a record of an unknown form, or no prompt.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, but is {limit}; leave it out to take every prompt.")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    ending = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
    if ending not in (".jsonl", ".json", ".txt"):
        raise ValueError(f"`path` is {str(path)!r}; a prompt file ends in .jsonl, .json or .txt (.gz may follow).")
    if not path.is_file():
        raise ValueError(f"The prompt file {str(path)!r} does not exist.")

    root, bad = media_root or str(path.parent), []
    records = _lines(path) if ending == ".txt" else _records(path, bad.append if skip_bad_records else None)
    if skip_bad_records:
        records = _sound(records, path, root, bad)

    records = list(islice(records, limit))
    if bad and not records:
        raise bad[0]
    if bad:
        logger.warning("%d records of %s are no prompts and were left out; the first: %s", len(bad), path, bad[0])
    if not records:
        raise ValueError(f"The prompt file {str(path)!r} holds no prompt.")

    # if any record has media, all records keep their parts, as in training
    parts = any(has_media(record) for _, record in records)
    prompts = [_to_prompt(record, index, path, root if parts else None) for index, record in records]

    marks = MarksAsText()
    for (index, _), prompt in zip(records, prompts, strict=True):
        marks.look(prompt.messages, f"Record {index} of the prompt file {str(path)!r}")
    marks.tell(len(prompts))
    return prompts


def _sound(
    records: Iterator[tuple[int, dict]], path: Path, root: str, bad: list[ValueError]
) -> Iterator[tuple[int, dict]]:
    """The records that are prompts; what is wrong with the others goes to `bad`."""
    for index, record in records:
        try:
            _to_prompt(record, index, path, root if has_media(record) else None)
        except ValueError as problem:
            bad.append(problem)
        else:
            yield index, record


def spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """Return `count` of the prompts, evenly spaced, so that a file sorted by category gives some of each."""
    count = min(count, len(prompts))
    return [prompts[index * len(prompts) // count] for index in range(count)]


def holds_media(prompt: Prompt) -> bool:
    """Whether a prompt shows an image or a video."""
    return has_media({"messages": prompt.messages})


def encode_prompt(prompt: Prompt, tokenizer, template_kwargs: dict | None = None) -> list[int]:
    """Return the prompt's token ids, up to and including the header that opens the assistant's answer.

    Args:
        prompt: a prompt without media.
        tokenizer: a tokenizer with a chat template.
        template_kwargs: extra keyword arguments for the template, as in training: `{"enable_thinking": False}`.

    Raises a `ValueError` when the tokenizer has no chat template, or the template refuses the messages.
    """
    text = render_prompt(prompt, tokenizer, template_kwargs)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def render_prompt(prompt: Prompt, tokenizer, template_kwargs: dict | None = None) -> str:
    """Return the text that `encode_prompt` tokenizes."""
    if holds_media(prompt):
        raise ValueError(
            f"Prompt {prompt.id!r} holds images or videos, but the target takes text only: use a target that takes "
            "them, with its processor."
        )
    messages = [message | {"content": text_of(message["content"])} for message in prompt.messages]
    return render_chat(replace(prompt, messages=messages), ChatRenderer(tokenizer, template_kwargs))


def render_chat(prompt: Prompt, renderer: ChatRenderer) -> str:
    """Return a prompt's text, its contents unchanged; raise a `ValueError` if template or tokenizer refuses it."""
    check_surrogates([prompt.messages, prompt.tools], f"Prompt {prompt.id!r}")
    try:
        return renderer.prompt(prompt.messages, prompt.tools)
    except Exception as error:  # jinja's errors, and whatever a template itself raises
        raise ValueError(f"The chat template of `tokenizer` refuses prompt {prompt.id!r}: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield one prompt per line, read when it is requested."""
    number = 0
    with opened(path) as file:
        try:
            for text in io.TextIOWrapper(file, encoding="utf-8-sig"):
                for line in filter(None, map(str.strip, text.splitlines())):
                    yield number, {"prompt": line}
                    number += 1
        except UnicodeDecodeError as error:
            raise ValueError(f"The prompt file {str(path)!r} cannot be read as UTF-8 text: {error}.") from error


def _records(path: Path, bad: Bad | None = None) -> Iterator[tuple[int, dict]]:
    """Yield the records of a JSON file; an error says that it is a prompt file. `bad` is as for `read_json_records`."""
    try:
        yield from read_json_records(path, bad)
    except (OSError, ValueError) as error:
        raise ValueError(f"A prompt file cannot be read: {error}") from None


def _to_prompt(record: Mapping, index: int, path: Path, root: str | None) -> Prompt:
    """Return one record's prompt; raise a `ValueError` that names file and record if it has none."""
    where = f"Record {index} of the prompt file {str(path)!r}"
    try:
        chat, follow_ups = _first_turn(record) if record.get("turns") is not None else (record, ())
        _check_form(chat)
        _check_contents(chat)
        messages, tools = _read_messages(chat, index, root), read_tools(record, index)
        _check_asks(messages)
    except _NotAPrompt as error:
        raise ValueError(f"{where} {error}") from None
    except ValueError as error:
        raise ValueError(f"{where} cannot be read: {str(error).removeprefix(f'Record {index}: ')}") from None
    category = record.get("category")
    found = next((record[key] for key in _IDS if record.get(key) is not None), index)
    id_ = found if isinstance(found, int) else _as_text(found)
    return Prompt(messages, None if category is None else _as_text(category), id_, follow_ups, tools)


class _NotAPrompt(ValueError):
    """The end of an error's sentence, which begins with the record."""


def _first_turn(record: Mapping) -> tuple[dict, tuple[str, ...]]:
    """Split a record of MT-Bench's form into a chat of its first turn, and the later turns."""
    turns = record["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise _NotAPrompt(f"has no readable prompt; write {FORMS}, every turn a text.")
    if has_media(record) and any(f"<{kind}>" in turn for kind in COLUMNS for turn in turns[1:]):
        raise _NotAPrompt("shows a medium in a later one of its `turns`: only the first turn can, so move it there.")
    other = unread_media(record)  # is told of where a mark asks for it
    kept = {name: record[name] for name in ("system", *MEDIA_COLUMNS, other) if name in record}
    return kept | {"messages": [{"role": "user", "content": turns[0]}]}, tuple(turns[1:])


def _check_form(record: Mapping) -> None:
    """Raise if no column holds a chat; a document of text asks for nothing."""
    try:
        form = recognise_form({key: value for key, value in record.items() if value is not None})
    except ValueError:
        form = TEXT
    if form == TEXT:
        raise _NotAPrompt(f"has the keys {sorted(record)}, none of which is a prompt; write {FORMS}.")


def _check_contents(record: Mapping) -> None:
    """Raise for a number in place of a prompt: in training data it may be an answer, but it is no question."""
    column = next(record[name] for name in _CHATS if record.get(name) is not None)
    for place, turn in enumerate(column if isinstance(column, list) else [{"content": column}]):
        said = turn if isinstance(turn, Mapping) else {}
        content = said.get("value") if said.get("content") is None else said["content"]
        if isinstance(content, bool | int | float):
            raise ValueError(f"the content of message {place} must be text, got {type(content).__name__}.")


def _read_messages(record: Mapping, index: int, root: str | None) -> list[dict]:
    """Return messages as training reads them, without answers at the end, and with each medium at its position.

    Args:
        root: folder of relative media paths, `None` if no prompt of the file has media.
    """
    if root is not None:
        messages, media, _ = read_media_record(record, index, root)
        shown = iter(media)
        for message in messages:
            if isinstance(message["content"], list):
                message["content"] = [p if p["type"] == "text" else next(shown) for p in message["content"]]
    else:
        messages = to_messages(record)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def _check_asks(messages: list[dict]) -> None:
    if not messages:
        raise _NotAPrompt("is empty: no message asks for an answer.")
    last = messages[-1]
    if last["role"] == "user" and isinstance(last["content"], str) and not last["content"].strip():
        raise _NotAPrompt(f"has no readable prompt: its last message is blank; write {FORMS}.")


def _as_text(value) -> str:
    """Return a category or an id as text, whatever its type in the file."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
