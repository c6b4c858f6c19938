"""Show token ids and masks, in the terminal and as a page."""

from html import escape
from itertools import groupby


_SUPERVISED, _OTHER, _RESET = ("\x1b[30;42m", "\x1b[30;102m"), ("\x1b[2m", "\x1b[2;4m"), "\x1b[0m"
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px/1.6 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: 1em; border-radius: 6px; }}
pre span {{ border-radius: 3px; color: #777; }}
pre span.s {{ color: #000; background: #a6e3a1; }}
pre span.s:nth-child(even) {{ background: #c9f0c5; }}
pre span:hover {{ outline: 1px solid #333; }}
</style>
<h1>{title}</h1>
<p>Green tokens are supervised, grey ones are not. The token's id shows under the pointer.</p>
{rows}
</html>
"""


def token_texts(tokenizer, ids: list[int], mask: list[int]) -> list[tuple[str, int, list[int]]]:
    """Return `(text, supervised, ids)` of each token; tokens that share a character are merged."""
    texts, waiting = [], []
    for place, token in enumerate(ids):
        waiting.append(token)
        text = tokenizer.decode(waiting)
        last = place + 1 == len(ids) or mask[place + 1] != mask[place]
        if last or not text.endswith("\ufffd") or len(waiting) == 4:  # a character has at most four bytes in UTF-8
            texts.append((text, mask[place], waiting))
            waiting = []
    return texts


def to_terminal(tokenizer, ids: list[int], mask: list[int], limit: int = 2000) -> str:
    """Return the text for a terminal, supervised tokens on green, others dim; neighbours differ in shade."""
    shown, length = [], 0
    for number, (text, supervised, _) in enumerate(token_texts(tokenizer, ids, mask)):
        colour = (_SUPERVISED if supervised else _OTHER)[number % 2]

        # a background must not run to the end of the line
        shown.append("\n".join(f"{colour}{line}{_RESET}" if line else "" for line in text.split("\n")))
        length += len(text)
        if length > limit:
            shown.append(" ...")
            break
    return "".join(shown)


def to_html(tokenizer, rows: list[dict], title: str) -> str:
    """Return an HTML page of rows with `input_ids` and `loss_mask`; it loads no other files."""
    shown = []
    for number, row in enumerate(rows):
        tokens = token_texts(tokenizer, row["input_ids"], row["loss_mask"])
        spans = "".join(
            f'<span class="{"s" if supervised else "u"}" title="{" ".join(map(str, ids))}">{escape(text)}</span>'
            for text, supervised, ids in tokens
        )

        answers = sum(supervised for supervised, _ in groupby(row["loss_mask"]))
        told = f"{len(row['input_ids'])} tokens, {sum(row['loss_mask'])} supervised in {answers} answers"
        shown.append(f"<h2>Conversation {number}</h2>\n<p>{told}</p>\n<pre>{spans}</pre>")
    return _PAGE.format(title=escape(title), rows="\n".join(shown))
