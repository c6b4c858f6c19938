"""Encode chats with images and videos to token ids and loss masks, with the processor's tokens for each medium."""

import logging
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from datasets import Dataset, Features, List, Value

from .carrying import as_records
from .encoding import with_origin
from .forms import named
from .frames import NoDecoder
from .loss_mask import ConversationEncoder, MaskOptions
from .mask_check import check_loss_mask
from .media import (
    KINDS,
    as_text,
    fingerprint,
    from_text,
    has_media,
    kinds_of_tokens,
    own_tokenizer,
    read_media_record,
    shown,
)
from .messages import read_record, read_tools
from .said import Said, encode_said, read_said
from .token_mask import mask_by_offsets
from .unread_media import MarksAsText, may_hold_marks


logger = logging.getLogger(__name__)

_CHECKED = 16  # conversations whose mask is compared with a second method's
_ROWS = Features(
    {
        "input_ids": List(Value("int32")),
        "loss_mask": List(Value("int8")),
        "media": Value("string"),
        "media_fingerprint": Value("string"),
    }
)


def build_vision_dataset(
    records,
    processor,
    max_length: int = 2048,
    options: MaskOptions | None = None,
    template_kwargs: dict | None = None,
    skip_bad_media: bool = False,
    skip_bad_records: bool = False,
    media_root: str | None = None,
) -> Dataset:
    """Tokenised conversations with images, videos, several, or none; columns `input_ids`, `loss_mask`, `media` and
    `media_fingerprint`.

    Every medium stands in `input_ids` with all of its tokens, none of which is supervised. A conversation longer than
    `max_length` is left out as a whole, since an image cannot be cut; the log says how many were.

    Args:
        records: chat records, with media in any form of `picture_forms`.
        processor: the target's, with a chat template.
        max_length: in tokens, including those of media.
        options: which parts of the answers are supervised; by default all.
        template_kwargs: further arguments of the template.
        skip_bad_media: leave out, and count, conversations with a medium that cannot be loaded, instead of stopping.
        skip_bad_records: the same for records that cannot be read or rendered, or have more or fewer places than media.
        media_root: where relative paths start; by default the folder of a record's file.

    Raises:
        ValueError: a record is malformed or names a medium that cannot be loaded; or nothing is left.
    """
    encoder = VisionEncoder(processor, options, template_kwargs)
    records = as_records(records.with_format(None)) if isinstance(records, Dataset) else records

    marks = MarksAsText()
    rows, counts, first = [], dict.fromkeys(("bad", "malformed", "long", "unanswered"), 0), None
    checked = max(1, len(records) // _CHECKED)

    for index, record in enumerate(records):
        try:
            written, loaded, encoded = _read(record, index, encoder, media_root, marks, check=index % checked == 0)
        except BadMedium as problem:
            if not skip_bad_media:
                raise
            counts["bad"], first = counts["bad"] + 1, first or problem
            continue
        except ValueError as problem:
            if not skip_bad_records:
                raise
            counts["malformed"], first = counts["malformed"] + 1, first or problem
            continue

        if len(encoded.input_ids) > max_length:
            counts["long"] += 1
        elif not any(encoded.loss_mask):
            counts["unanswered"] += 1
        else:
            row = {"input_ids": encoded.input_ids, "loss_mask": encoded.loss_mask}
            rows.append({**row, "media": written, "media_fingerprint": fingerprint(loaded)})

    marks.tell(len(records))
    if any(counts.values()):
        logger.warning(
            "Of %d conversations %d were left out whole because they are longer than `max_length`=%d tokens, %d "
            "because a medium cannot be loaded, %d because they cannot be read, %d because they hold no answer.",
            *(len(records), counts["long"], max_length, counts["bad"], counts["malformed"], counts["unanswered"]),
        )
    if not rows:
        raise _nothing_left(len(records), counts, max_length, first)
    return Dataset.from_list(rows, features=_ROWS)


def _nothing_left(number: int, counts: dict[str, int], max_length: int, first: ValueError | None) -> ValueError:
    """The error about data of which no conversation is left: what became of them, and what to do."""
    became = {
        "long": f"longer than `max_length` {max_length}: raise it",
        "bad": "with a medium that cannot be loaded: look at the first",
        "malformed": "that cannot be read: look at the first",
        "unanswered": "without an answer: add some",
    }
    told = "; ".join(f"{counts[name]} {why}" for name, why in became.items() if counts[name])
    return ValueError(f"None of the {number} conversations is left ({told})" + (f". {first}" if first else "."))


class BadMedium(ValueError):
    """A medium that cannot be loaded, or that the processor refuses."""


def _bad_medium(record, index: int, problem: Exception) -> BadMedium:
    return BadMedium(
        f"{named(record, index)}: a medium cannot be loaded ({str(problem)[:200]}): correct it, or leave such records "
        "out with `skip_bad_media`."
    )


def _read(
    record, index: int, encoder: "VisionEncoder", media_root: str | None, marks: MarksAsText, check: bool
) -> tuple[str, dict[str, list], "EncodedChat"]:
    """One record's media, as text and loaded, and its tokens; counts `marks`, and checks the mask if `check` is set."""
    messages, media, reasons = read_media_record(record, index, media_root)
    marks.look(messages, named(record, index))
    tools = read_tools(record, index)

    try:
        written = as_text(media)
    except ValueError as problem:
        raise ValueError(f"{named(record, index)}: {problem}") from None
    except Exception as problem:  # whatever PIL raises
        raise _bad_medium(record, index, problem) from problem

    try:
        loaded = from_text(written, encoder.processor)
    except NoDecoder:
        raise
    except Exception as problem:  # whatever a decoder of media raises
        raise _bad_medium(record, index, problem) from problem

    said = read_said(record, named(record, index))
    try:
        if check and said is None:  # tokens that were said are checked when they are encoded
            check_loss_mask(encoder.text, [messages], [index], [tools])
        return written, loaded, encoder.encode(messages, loaded, reasons, tools, index, said)
    except ValueError as problem:
        found = with_origin(problem, [record], [index])
        raise (BadMedium(str(found)) if isinstance(problem, BadMedium) else found) from problem.__cause__


def holds_media(records) -> bool:
    """Whether any record has an image or a video. If none has, a warning counts the marks that ask for one.

    In a stream only the first records are looked at, and none may have any.

    Raises:
        ValueError: for a stream with media.
    """
    in_stream, marks, index = not hasattr(records, "__len__"), MarksAsText(), -1
    for index, record in enumerate(islice(records, _CHECKED) if in_stream else records):
        if has_media(record) and in_stream:
            raise ValueError("`streaming` reads text, but the data hold images or videos: leave it out.")
        if has_media(record):
            return True

        if may_hold_marks(record):
            with suppress(ValueError):  # what cannot be read is told where it is encoded
                marks.look(read_record(record, index)[0], named(record, index))

    marks.tell(index + 1)
    return False


@dataclass
class EncodedChat:
    """Token ids, including those of media, and a mask of 1 for each that is supervised."""

    input_ids: list[int]
    loss_mask: list[int]


class VisionEncoder:
    """Token ids and loss mask of a conversation, by a processor and its chat template.

    Answers are found in the rendered text, as in any chat. Then each placeholder is replaced by the processor's text
    for it, and the places of the answers move along.

    Args:
        processor: of `transformers`, with a fast tokenizer.
        options, template_kwargs: as for [`ConversationEncoder`].
    """

    def __init__(self, processor, options: MaskOptions | None = None, template_kwargs: dict | None = None):
        self.processor, tokenizer = processor, own_tokenizer(processor)
        if not tokenizer.is_fast:
            raise ValueError("Media need a fast tokenizer, which knows the characters of its tokens.")

        self.text = ConversationEncoder(tokenizer, options, template_kwargs)
        tokens = (getattr(processor, f"{kind}_token", None) for kind in KINDS)
        self.placeholders = dict(zip(KINDS, tokens, strict=True))

    def encode(
        self,
        messages,
        loaded: dict[str, list],
        reasons=None,
        tools=None,
        index: int = 0,
        said: Said | None = None,
    ) -> EncodedChat:
        """One conversation.

        Args:
            messages: with parts, as `read_media_record` returns them.
            loaded: its media by kind, in order.
            reasons: why each answer ended.
            tools: JSON schemas on offer.
            index: number of the record, for errors.
            said: the tokens of its answers, if they are known.

        Raises:
            ValueError: if the text has other placeholders than there are media, the processor disagrees, or the
                conversation is not what was said.
        """
        if said is not None:

            def prompt_ids(prompt: list[dict]) -> list[int]:
                text = self.text.render(prompt, tools, add_generation_prompt=True)
                return self._tokens(text, [], loaded, index).input_ids

            own = self.text
            return EncodedChat(*encode_said(own.tokenizer, prompt_ids, messages, said, own.options, f"Record {index}"))

        (text,), (spans,) = self.text.supervised_spans([messages], [reasons], [index], [tools])
        return self._tokens(text, spans, loaded, index)

    def _tokens(self, text: str, spans: list[tuple[int, int]], loaded: dict[str, list], index: int) -> EncodedChat:
        """Encode a rendered text with its media; the characters `spans` are supervised."""
        for kind, token in self.placeholders.items():
            if token and text.count(token) != len(loaded[kind]):
                raise ValueError(
                    f"Record {index}: its text holds {text.count(token)} times {token}, but it has {len(loaded[kind])} "
                    f"{kind}s: the chat template writes one for each, and no message may hold that text itself."
                )

        replaced = []
        if any(loaded.values()):
            made = self._processed(text, loaded, index)
            replaced = made["text_replacement_offsets"][0]

        expanded, spans = _expand(text, spans, replaced)
        batch = self.text.tokenise([expanded], return_offsets_mapping=True)
        ids, mask = batch["input_ids"][0], mask_by_offsets(batch["offset_mapping"][0], spans)

        if replaced and [int(token) for token in made["input_ids"][0]] != ids:
            raise ValueError(f"Record {index}: the processor makes other tokens of the text than its tokenizer does.")
        kinds = kinds_of_tokens(self.processor, [ids])[0]
        return EncodedChat(ids, [0 if kind else supervised for kind, supervised in zip(kinds, mask, strict=True)])

    def _processed(self, text: str, loaded: dict[str, list], index: int):
        try:
            # tensors of pixels alone: InternVL's processor joins those of images with tensors of videos
            options = {"return_text_replacement_offsets": True, "images_kwargs": {"return_tensors": "pt"}}
            return shown(self.processor, [text], [loaded], **options)
        except ImportError:  # a package is missing
            raise
        except Exception as problem:  # whatever a processor raises
            raise BadMedium(
                f"Record {index}: the processor refuses its media ({str(problem)[:200]}): correct them, or leave such "
                "records out with `skip_bad_media`."
            ) from problem


def _expand(text: str, spans: list[tuple[int, int]], replaced: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """The text with its replacements, and the spans in it; no span holds a replacement."""
    pieces, last = [], 0
    for one in replaced:
        start, end = one["span"]
        pieces += [text[last:start], one["replacement"]]
        last = end

    longer = [(one["span"][1], len(one["replacement"]) - len(one["text"])) for one in replaced]

    def moved(place: int) -> int:
        return place + sum(by for end, by in longer if end <= place)

    return "".join([*pieces, text[last:]]), [(moved(start), moved(end)) for start, end in spans]
