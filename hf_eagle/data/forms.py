"""Recognise the form of a chat record from its columns, and name the record in errors."""

import json
from collections.abc import Mapping


# form -> description of its records; the first form with a matching column is taken
FORMS = {
    "preference": "`chosen`, with or without `prompt`",
    "messages": "`messages` (role, content)",
    "sharegpt": "ShareGPT `conversations` (from, value)",
    "alpaca": "`instruction` with `input` and `output`",
    "prompt_completion": "`prompt` with `completion`",
    "text": "plain `text`",
}
COLUMNS = {
    "preference": ("chosen",),
    "messages": ("messages",),
    "sharegpt": ("conversations", "conversation", "data"),
    "alpaca": ("instruction",),
    "prompt_completion": ("prompt", "question", "query", "input"),
    "text": ("text",),
}
ANSWERS = ("completion", "response", "answer", "output")
SYSTEMS = ("system", "system_prompt")
# columns that hold texts, at any depth
READ_AS_TEXT = {
    *(name for columns in COLUMNS.values() for name in columns),
    *ANSWERS,
    *SYSTEMS,
    *("context", "history", "tools", "functions", "finish_reason"),
}
# columns that `load_records` adds to a record: its file with its number there, and the form to read it in
ORIGIN, FORM = "record_origin", "record_form"


def recognise_form(record: Mapping) -> str:
    """Return the form that `load_records` was given, else the form that a record's columns show, a key of `FORMS`.

    Raises a `ValueError` if they hold no conversation.
    """
    if record.get(FORM) in FORMS:
        return record[FORM]

    for form, columns in COLUMNS.items():
        if any(_speaks(column, record) for column in columns):
            return form

    raise ValueError(
        f"no conversation in the columns {column_names(record)}; a record needs {', or '.join(FORMS.values())}."
        + _hint_of_a_wrapper(record)
    )


def _speaks(column: str, record: Mapping) -> bool:
    """Whether a column shows the form of a record; the names `data` and `input` also have other uses."""
    value = record.get(column)
    if column == "data":  # from UltraChat: texts of user and assistant, alternating
        texts = isinstance(value, list) and value and all(isinstance(text, str) for text in value)
        return bool(texts) or isinstance(value, str) and value.lstrip().startswith('["')

    if column == "input" and not isinstance(value, list):
        return value is not None and any(record.get(name) is not None for name in ANSWERS)
    return value is not None


def _hint_of_a_wrapper(record: Mapping) -> str:
    """Return advice if the record looks like one object around all records of a file, else an empty string."""
    lists = [name for name, value in record.items() if isinstance(value, list) and value]
    lists = [name for name in lists if all(isinstance(inner, Mapping) for inner in record[name])]
    if len(lists) != 1 or not isinstance(lists[0], str):
        return ""

    return (
        f" Its `{lists[0]}` is a list of {len(record[lists[0]])} objects: if these are the records, let the file hold "
        f"the list alone, as `jq '.[{json.dumps(lists[0])}]' old.json > new.json` writes it."
    )


def named(record: Mapping, index: int) -> str:
    """Return the name of a record in errors: its file and number, if known."""
    return record.get(ORIGIN) or f"Record {index}"


def column_names(record: Mapping) -> list[str]:
    """Return the columns of a record, sorted, without those that `load_records` adds."""
    return sorted(str(name) for name in record if name not in (ORIGIN, FORM))
