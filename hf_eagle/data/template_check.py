"""Check whether a chat template takes the records, before a model is loaded; the error names the record."""

from itertools import islice, takewhile

from .forms import named
from .messages import TEXT, read_record, read_tools
from .rendering import ChatRenderer, TemplateLimit


_SAMPLE = 10  # first records to try: a template that refuses them all fits none


def check_template(tokenizer, records, template_kwargs: dict | None = None, **how) -> None:
    """Render the first prompts, each up to its record's first answer.

    Args:
        tokenizer: with a chat template.
        records: chat records of any form that `to_messages` reads.
        template_kwargs: further arguments of the template.
        how: as for `read_record`; a prompt with media is accepted, since only its processor renders it.

    Raises:
        ValueError: naming the first record, if the template refuses all of the first ones, or there is no template.
        TemplateLimit: if rendering does not end.
    """
    first = None
    for index, record in enumerate(islice(records, _SAMPLE)):
        messages = read_record(record, index, **how)[0]
        prompt = list(takewhile(lambda message: message["role"] != "assistant", messages))
        if not prompt or prompt[0]["role"] == TEXT or any(not isinstance(m["content"], str) for m in prompt):
            return

        try:
            ChatRenderer(tokenizer, template_kwargs).prompt(prompt, read_tools(record, index))
            return
        except TemplateLimit:
            raise
        except ValueError as problem:
            first = first or f"{named(record, index)} cannot be rendered by the chat template of `target`: {problem}"

    if first is not None:
        raise ValueError(first if first.endswith(".") else f"{first}.")
