"""Find prompts of an evaluation in training data, in scripts with and without spaces between words."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache

from .messages import read_record, text_of


# 13 consecutive words are an overlap, as the GPT-3 paper counts them for test sets. In scripts without spaces, these
# numbers of characters stand for 13 words: a Chinese word has one or two characters, a Japanese word, with its grammar
# in kana, two or three, and a Thai or Khmer word three or four, not counting marks.
_COUNTS = (13, 20, 26, 40)
_OVERLAP = 520  # the size of an overlap, chosen so that each unit's share is a whole number
_WORD, _IDEOGRAPH, _KANA, _LETTER = (_OVERLAP // count for count in _COUNTS)

# the same rule in words, to print next to a count of overlaps
RULE = (
    "{0} words in a row, or all of a prompt of {4} to {5} words; a still shorter prompt only if it is the whole "
    "message; in scripts without spaces {1} Chinese characters, {2} kana or {3} letters count as {0} words"
).format(*_COUNTS, (_COUNTS[0] + 1) // 2, _COUNTS[0] - 1)

# Unicode blocks: Han, Bopomofo and Yi; kana; then Thai, Lao, Burmese, Khmer, Tai, Balinese and Javanese
_BLOCKS = {
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3100-\u312f\u31a0-\u31bf\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua48f"
    "\uf900-\ufaff\U00020000-\U000323af": _IDEOGRAPH,
    "\u3031-\u3035\u3041-\u30ff\u31f0-\u31ff\U0001b000-\U0001b16f": _KANA,
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\ua9ff\uaa60-\uaadf": _LETTER,
}
_ASCII = re.compile(r"\w+", re.ASCII)
# invisible characters: soft hyphens, joiners, marks of direction, variation selectors
_UNSEEN = re.compile(
    "[\u00ad\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]"
)


class HeldOut:
    """Prompts kept for evaluation, to be searched for in training data.

    A prompt counts as found if a message holds 13 consecutive words of it, in lower case and without punctuation; or,
    if it has 7 to 12 words, all of it. A still shorter prompt would be found inside messages by chance, so it counts
    only if it is a whole message. A prompt without words, such as an emoji, is compared with whole messages.

    In scripts without spaces between words, 20 Chinese characters stand for 13 words, or 26 kana, or 40 letters of
    Thai, Lao, Khmer or Burmese, each with its marks, and half as many for 7 words; mixed texts are added up.

    Args:
        prompts (`list[str]`): user messages of the evaluation.
    """

    def __init__(self, prompts: list[str]):
        self._runs: dict[tuple, set[int]] = {}
        self._whole: dict[tuple, set[int]] = {}
        self._signs: dict[str, set[int]] = {}

        # by first word or character: the lengths of the runs that begin with it
        self._lengths: dict[str, set[int]] = {}

        for number, prompt in enumerate(prompts):
            units = units_of(prompt)
            runs = overlap_runs(units)
            for run in runs:
                self._runs.setdefault(run, set()).add(number)
                self._lengths.setdefault(run[0], set()).add(len(run))
            if units and not runs:
                self._whole.setdefault(tuple(units), set()).add(number)
            if not units and _signs_of(prompt):
                self._signs.setdefault(_signs_of(prompt), set()).add(number)
        self._longest_whole = max(map(len, self._whole), default=0)

    def found_in(self, texts: Iterable[str]) -> set[int]:
        """Return the numbers of the prompts that occur in the messages of one conversation."""
        found: set[int] = set()
        for text in texts:
            units = units_of(text)
            if not units and self._signs:
                found |= self._signs.get(_signs_of(text), set())
            if len(units) <= self._longest_whole:
                found |= self._whole.get(tuple(units), set())
            for start, unit in enumerate(units):
                for length in self._lengths.get(unit, ()):
                    found |= self._runs.get(tuple(units[start : start + length]), set())
        return found


def overlap_statistics(records: Iterable[dict], prompts: list[str], form: str | None = None) -> dict[str, int]:
    """Count how many test prompts occur in the conversations, as `HeldOut` finds them.

    Returns `prompts`, `prompts_found`, and `conversations_found`, those that hold any of them.
    """
    held_out = HeldOut(prompts)

    found: set[int] = set()
    conversations = 0
    for index, record in enumerate(records):
        messages = read_record(record, index, form, content_parts=True)[0]
        here = held_out.found_in(text_of(message["content"]) for message in messages)
        found |= here
        conversations += bool(here)

    return {"prompts": len(prompts), "prompts_found": len(found), "conversations_found": conversations}


def units_of(text: str) -> list[str]:
    """Return the words of a text; in scripts without spaces, the characters, each with its marks.

    Letters become lower case, and compatible forms are merged (NFKC): full-width letters, half-width kana, ligatures.
    Punctuation, spaces and invisible characters are left out.
    """
    if text.isascii():
        return _ASCII.findall(text.lower())

    text = unicodedata.normalize("NFKC", _UNSEEN.sub("", text)).lower()
    return _pattern().findall(text)


def _signs_of(text: str) -> str:
    """Return a text without words, such as an emoji, in a form to compare: no spaces or invisible characters."""
    return "".join(unicodedata.normalize("NFKC", _UNSEEN.sub("", text)).split())


def overlap_runs(units: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the runs of a prompt's units that count as an overlap wherever they occur, each as short as possible.

    A prompt shorter than an overlap is a single run if it has at least half the size of one; else it has no run.
    """
    sizes = [_size(unit[0]) for unit in units]
    runs, end, size = [], 0, 0

    for start in range(len(units)):
        while size < _OVERLAP and end < len(units):
            size += sizes[end]
            end += 1
        if size < _OVERLAP:
            break
        runs.append(tuple(units[start:end]))
        size -= sizes[start]
    return runs or ([tuple(units)] if 2 * sum(sizes) >= _OVERLAP else [])


@cache
def _size(first: str) -> int:
    """Return the size of a unit, which depends on its first character."""
    return next((size for block, size in _BLOCKS.items() if re.match(f"[{block}]", first)), _WORD)


@cache
def _pattern() -> re.Pattern:
    """Return the pattern of one unit with its marks, which Python's `\\w` does not include."""
    marks, first = [], None
    for code in range(0x20000):  # above are only ideographs, and selectors that are left out
        is_mark = unicodedata.category(chr(code))[0] == "M"
        if is_mark and first is None:
            first = code
        elif not is_mark and first is not None:
            marks.append(f"{chr(first)}-{chr(code - 1)}")
            first = None

    alone, marks = "".join(_BLOCKS), "".join(marks)
    return re.compile(rf"(?=\w)[{alone}][{marks}]*|[^\W{alone}](?:[^\W{alone}]|[{marks}])*")
