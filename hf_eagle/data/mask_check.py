"""Check the loss mask against a second method."""

from .loss_mask import ConversationEncoder, MaskOptions
from .messages import TEXT
from .said import Said
from .token_mask import shared_length


def check_loss_mask(
    encoder: ConversationEncoder,
    conversations: list[list[dict]],
    indices: list[int],
    tools: list | None = None,
    said: list[Said | None] | None = None,
) -> None:
    """Compare the masks of `conversations` with those found by incremental rendering.

    Both must be equal; with `{% generation %}` blocks, which may leave part of an answer out on purpose, no token
    outside an answer may be marked. Whole answers are compared, whichever parts of them the encoder's options select.
    Conversations without an answer, and plain texts, are skipped. If a conversation's token ids are known (`said`),
    only these are checked against the conversation, since no template renders its answers.

    Raises:
        `ValueError`: if the methods differ, nothing at all is supervised, or a conversation does not match its `Said`;
            the rendered text is shown.
    """
    tools, said = tools or [None] * len(conversations), said or [None] * len(conversations)
    encoded = encoder.encode(conversations, indices=indices, tools=tools, options=MaskOptions(), said=said)

    for messages, index, offer, known, (ids, mask) in zip(conversations, indices, tools, said, encoded, strict=True):
        if messages[0]["role"] == TEXT or known is not None:
            continue

        expected = incremental_mask(encoder, messages, ids, mask, offer)
        wrong = any(m > e for m, e in zip(mask, expected, strict=True)) if encoder.has_marks else mask != expected
        if wrong:
            raise ValueError(
                f"Record {index}: two methods find different answers with the chat template of `tokenizer`; put "
                "`{% generation %}` and `{% endgeneration %}` around the answers in the template.\n"
                f"By marks:      {show_mask(encoder, ids, mask)!r}\n"
                f"By increments: {show_mask(encoder, ids, expected)!r}"
            )

    answered = [place for place, messages in enumerate(conversations) if _has_answer(messages)]
    if answered and not any(any(encoded[place][1]) for place in answered):
        ids, mask = encoded[answered[0]]
        raise ValueError(
            "The chat template of `tokenizer` marks no token as the assistant's; its `{% generation %}` blocks, or the "
            "way it renders answers, must be corrected. "
            f"Record {indices[answered[0]]}: {show_mask(encoder, ids, mask)!r}"
        )


def incremental_mask(
    encoder: ConversationEncoder, messages: list[dict], ids: list[int], mask: list[int], tools: list | None = None
) -> list[int]:
    """Return the mask found by rendering longer and longer parts of the conversation and comparing their token ids.

    An answer begins where the messages before it end, with the generation prompt. It ends where the messages up to it
    end, except for white space. A template may render a past answer differently (without reasoning, with a different
    end token). Then `mask`'s tokens are accepted if they are the end of the answer as first rendered, or marked on
    purpose.
    """
    found, floor = [0] * len(ids), 0
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or not (_says_something(message) or encoder.has_marks):
            continue

        after = encoder.render(messages[: place + 1], tools).removesuffix(encoder.tail)
        after = encoder.tokenise([after])["input_ids"][0]
        while after and not encoder.tokenizer.decode([after[-1]]).strip():
            after.pop()

        if place:
            prompt = encoder.token_ids(messages[:place], tools, add_generation_prompt=True)
            start = shared_length(prompt, ids)
            if start < len(prompt) - 1:  # the whole text differs before the answer
                own = next((n for n in range(floor, len(ids)) if mask[n]), start)
                start = own if _same_end(prompt, ids[max(0, own - 2) : own]) else start
        else:  # there is no prompt before the first message to compare with
            start = next((n for n, supervised in enumerate(mask) if supervised), len(ids))

        end = shared_length(after, ids)
        if end == len(after) - 1 and end < len(ids) and {ids[end], after[end]} <= encoder.special_ids:
            end += 1
        elif end < len(after):
            stop = next((n for n in range(start, len(ids)) if not mask[n]), len(ids))
            written = ids[start + 1 : stop]  # the first token may hold the end of the header
            if written and {written[-1], after[-1]} <= encoder.special_ids:  # turns may end with different ones
                after[-1] = written[-1]
            end = stop if encoder.has_marks or start < stop and _same_end(after, written) else end

        found[start:end] = [1] * max(0, end - start)
        floor = max(floor, end)
    return found


def show_mask(encoder: ConversationEncoder, ids: list[int], mask: list[int], limit: int = 1000) -> str:
    """Return the text of `ids` with the supervised parts in [[ ]]."""
    pieces, run = [], []
    for n, (token, supervised) in enumerate(zip(ids, mask, strict=True)):
        run.append(token)
        if n + 1 == len(ids) or mask[n + 1] != supervised:
            text = encoder.tokenizer.decode(run)
            pieces.append(f"[[{text}]]" if supervised else text)
            run = []

    text = "".join(pieces)
    return text if len(text) <= limit else text[:limit] + "..."


def _same_end(ids: list[int], end: list[int]) -> bool:
    return ids[len(ids) - len(end) :] == end


def _has_answer(messages: list[dict]) -> bool:
    return any(message["role"] == "assistant" and _says_something(message) for message in messages)


def _says_something(message: dict) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content", "").strip())
