"""Put the same questions behind different amounts of text, so that only the length of the context varies."""

import random
from collections.abc import Sequence

from ..data.messages import text_of
from .prompts import Prompt, holds_media


def prompts_behind(
    questions: Sequence[Prompt], texts: Sequence[str], lengths: Sequence[int], tokenizer, seed: int = 0
) -> list[dict]:
    """
    Return every question behind so many tokens of text, for each of `lengths`.

    Each question has texts of its own, drawn at random and joined by blank lines. The text right in front of it is the
    same at every length; a longer one only reaches further back. Later turns of a question are left out.

    Args:
        questions: prompts of text.
        texts: what may stand in front of them.
        lengths: tokens of text; 0 for the question alone.
        tokenizer: the target's.
        seed: of the choice of texts.

    Returns:
        Records for `load_prompts`, with `id` and `category` that name the length.

    Raises:
        ValueError: if a question holds media or has no user's message, or there is too little text.
    """
    for question in questions:
        if holds_media(question):
            raise ValueError(f"Prompt {question.id!r} holds media, which have no text in front of them: leave it out.")

    records = []
    for number, question in enumerate(questions):
        ids = _text_before(texts, max(lengths), tokenizer, random.Random(f"{seed} {number}"))
        for length in lengths:
            # a cut inside a character leaves marks of a broken one
            text = tokenizer.decode(ids[len(ids) - length :]).lstrip("\ufffd") if length else ""
            messages = _with_text(question, text)
            named = {"id": f"{question.id} behind {length}", "category": f"behind {length}"}
            records.append({"messages": messages, **named} | ({"tools": question.tools} if question.tools else {}))
    return records


def _text_before(texts: Sequence[str], length: int, tokenizer, rng: random.Random) -> list[int]:
    """Return at least `length` tokens of texts in a random order."""
    ids: list[int] = []
    for place in rng.sample(range(len(texts)), len(texts)):
        if len(ids) >= length:
            break
        text = texts[place] + "\n\n" * bool(ids)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + ids
    if len(ids) < length:
        raise ValueError(
            f"`texts` hold {len(ids):,} tokens, but `behind` asks for {length:,}: give more text, or a smaller number."
        )
    return ids


def _with_text(question: Prompt, text: str) -> list[dict]:
    place = next((place for place, message in enumerate(question.messages) if message["role"] == "user"), None)
    if place is None:
        raise ValueError(f"Prompt {question.id!r} has no user's message, in which text could be put: leave it out.")
    messages = [dict(message) for message in question.messages]
    messages[place]["content"] = "\n\n".join(filter(None, (text, text_of(messages[place]["content"]))))
    return messages
