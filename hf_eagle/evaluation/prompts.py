"""Prompt files for measuring acceptance: read into `Prompt`s, rendered by the target's own chat template."""

import gzip
import json
from dataclasses import dataclass, replace
from pathlib import Path

from ..data.messages import to_messages


FORMS = '{"turns": [...]}, {"messages": [...]}, {"conversations": [...]} or {"prompt": ...}'


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer."""

    messages: list[dict]  # {"role": ..., "content": ...}, the last one not the assistant's
    category: str | None  # MT-Bench's category, where the file gives one
    id: str | int  # the record's own id, else its index in the file, from 0
    follow_ups: tuple[str, ...] = ()  # what the user says next, after each answer

    @property
    def asked(self) -> list[str]:
        """The texts of its last message and of all that follow it."""
        return [self.messages[-1]["content"], *self.follow_ups]

    def answered(self, answer: str) -> "Prompt":
        """The dialogue behind the target's answer, waiting for the next one; without a follow-up nothing is asked."""
        messages = [*self.messages, {"role": "assistant", "content": answer}]
        if self.follow_ups:
            messages.append({"role": "user", "content": self.follow_ups[0]})
        return replace(self, messages=messages, follow_ups=self.follow_ups[1:])


def load_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """
    Reads a file of prompts.

    Every record is one of
    * MT-Bench's form, `{"question_id": 81, "category": "writing", "turns": ["...", "..."]}`: the first turn is the
      prompt, the others follow up on the target's own answers;
    * `{"messages": [{"role": "user", "content": "..."}, ...]}`: the assistant's messages at the end, which are answers,
      are left off;
    * ShareGPT's form, `{"conversations": [{"from": "human", "value": "..."}, ...]}`: likewise;
    * `{"prompt": "..."}` or `{"prompt": [messages]}`, which is HumanEval's form too (`task_id` is its id).

    Args:
        path (`str` or `Path`):
            `.jsonl` (one record a line), `.json` (a list of records, or one a line), either also as `.gz`; or `.txt`,
            one prompt a line. Blank lines are skipped.
        limit (`int`, *optional*):
            Take the first `limit` prompts only.

    Raises:
        `ValueError`: the file is missing, is not text, not JSON, holds a record of another form, or holds no prompt.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, but is {limit}; leave it out to take every prompt.")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
    if kind not in (".jsonl", ".json", ".txt"):
        raise ValueError(f"`path` is {str(path)!r}; a prompt file ends in .jsonl, .json or .txt (.gz may follow).")

    text = _read_text(path)
    if kind == ".txt":
        records = [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
    else:
        records = _parse_json(text, path)
    prompts = [_to_prompt(record, index, path) for index, record in enumerate(records[:limit])]
    if not prompts:
        raise ValueError(f"The prompt file {str(path)!r} holds no prompt.")
    return prompts


def spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """`count` of the prompts at equal distances, so that a file sorted by category gives some of each."""
    count = min(count, len(prompts))
    return [prompts[index * len(prompts) // count] for index in range(count)]


def encode_prompt(prompt: Prompt, tokenizer) -> list[int]:
    """The prompt's token ids, up to and including the mark that opens the assistant's answer.

    Raises a `ValueError` when the tokenizer has no chat template, or the template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "`tokenizer` has no chat template, so prompts cannot be rendered; take the tokenizer of an "
            "instruction-tuned target, or set `tokenizer.chat_template`."
        )
    return tokenizer(render_prompt(prompt, tokenizer), add_special_tokens=False)["input_ids"]


def render_prompt(prompt: Prompt, tokenizer) -> str:
    """The prompt's text, as far as the mark that opens the answer; `ValueError` if the template refuses it."""
    try:
        return tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # jinja's own errors, and whatever a template raises by itself
        raise ValueError(f"The chat template of `tokenizer` refuses prompt {prompt.id!r}: {error}") from error


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"The prompt file {str(path)!r} does not exist.")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
        return content.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"The prompt file {str(path)!r} cannot be read as UTF-8 text: {error}.") from error


def _parse_json(text: str, path: Path) -> list:
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"The prompt file {str(path)!r} is not JSON: {error}.") from error
    records = []
    # not `splitlines`, which also cuts at characters that JSON allows inside a string
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"Line {number} of the prompt file {str(path)!r} is not JSON ({error}); write one record a line, or "
                "one list of records."
            ) from error
    return records


def _to_prompt(record, index: int, path: Path) -> Prompt:
    where = f"Record {index} of the prompt file {str(path)!r}"
    if not isinstance(record, dict):
        raise ValueError(f"{where} is of type {type(record).__name__}; write {FORMS}.")
    follow_ups = ()
    if "turns" in record:
        turns = record["turns"] if isinstance(record["turns"], list) and record["turns"] else [None]
        found, follow_ups = turns[0], tuple(turns[1:])
        if not all(isinstance(turn, str) and turn.strip() for turn in follow_ups):
            found = None
    elif "messages" in record:
        found = record["messages"] if isinstance(record["messages"], list) else None
    elif "conversations" in record:
        found = _share_gpt(record, where)
    elif "prompt" in record:
        found = record["prompt"]
    else:
        raise ValueError(f"{where} has the keys {sorted(record)}, none of which is a prompt; write {FORMS}.")

    messages = [{"role": "user", "content": found}] if isinstance(found, str) and found.strip() else found
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise ValueError(f"{where} has no readable prompt; write {FORMS}, messages with role and content.")
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError(f"{where} is empty: no message asks for an answer.")

    ids = (record.get(key) for key in ("question_id", "task_id", "id"))
    id_ = next((found for found in ids if found is not None), index)
    return Prompt(messages, record.get("category"), id_, follow_ups)


def _share_gpt(record: dict, where: str) -> list[dict]:
    try:
        return to_messages(record)
    except ValueError as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def _is_message(message) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
