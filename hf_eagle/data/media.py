"""Read chats with images and videos: messages whose contents are lists of parts, and the media that parts name."""

import base64
import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from .forms import named
from .frames import as_pixels, as_png, load_film, load_picture
from .messages import read_record, text_of
from .picture_forms import KINDS, axes_of, has_media, kind_of, parts_of, source_of


__all__ = ["KINDS", "TYPES", "as_inputs", "as_text", "fingerprint", "from_text", "has_media", "kinds_of_tokens"]
__all__ += ["limit_media", "own_tokenizer", "processor_fingerprint", "read_media_record", "shown"]

# what a processor may call the argument that says which tokens stand for media
TYPES = ("mm_token_type_ids", "token_type_ids")


def own_tokenizer(processing):
    """Return the tokenizer of a processor, with the processor's chat template; a tokenizer is returned unchanged."""
    tokenizer = getattr(processing, "tokenizer", processing)
    template = getattr(processing, "chat_template", None)
    if template and template != tokenizer.chat_template:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def read_media_record(
    record: Mapping, index: int, media_root: str | None = None
) -> tuple[list[dict], list[dict], list[str] | None]:
    """Return messages, their media in order, and each answer's `finish_reason`.

    In a chat with media, a content that is a list stays a list, of `{"type": "text", "text": ...}`,
    `{"type": "image"}` and `{"type": "video"}`. Everything else is read as by `to_messages`. `picture_forms` says how a
    record may name its media.

    Returns:
        Messages; media, `{"type": "image", "image": source}` each; reasons.

    Raises:
        ValueError: names the record, if a part has no medium, a medium has no part, or an answer holds media.
    """
    where = named(record, index)
    messages, reasons = read_record(record, index, content_parts=True, media_root=media_root)

    media: list[dict] = []
    for place, message in enumerate(messages):
        parts = parts_of(message)
        if message["role"] == "assistant" and parts:
            if any(map(kind_of, parts)):
                raise ValueError(f"{where}: message {place} is an answer, which can hold text only.")
            message["content"] = text_of(parts)
        elif parts:  # kept separate: the template joins them in its way
            message["content"] = [_part(part, media, where, place) for part in parts]

    return messages, media, reasons


def _part(part: dict, media: list[dict], where: str, place: int) -> dict:
    kind = kind_of(part)
    if kind is None:
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: message {place} holds a part that is neither text, image nor video.")
        return {"type": "text", "text": part["text"]}

    media.append({"type": kind, kind: source_of(part, kind)})
    return {"type": kind}


# ---- media in a data set ----


def as_text(media: list[dict]) -> str:
    """Return media as JSON: names unchanged, media in memory as the content of a file; frames of a video as a list.

    Raises:
        ValueError: if a value is not a medium.
        OSError: if the pixels of an image cannot be read.
    """
    return json.dumps([{"type": m["type"], m["type"]: _written(m[m["type"]], m["type"])} for m in media])


def from_text(text: str, processor=None) -> dict[str, list[Any]]:
    """Load the media of `as_text`, by kind: images as PIL images, and videos as [`Film`].

    Args:
        text: text of `as_text`.
        processor: the target's processor, which selects the frames of a video; without it, all frames are used.

    Raises:
        OSError, ValueError: if a medium cannot be loaded.
        NoDecoder: if there is a video, but no decoder is installed.
    """
    found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for medium in json.loads(text):
        kind, source = medium["type"], medium[medium["type"]]
        if kind == "image":
            found[kind].append(load_picture(source))
        else:
            found[kind].append(load_film(source, getattr(processor, "video_processor", None)))
    return found


def as_inputs(loaded: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the arguments that pass the media of `from_text` to a processor."""
    given: dict[str, Any] = {"images": loaded["image"]} if loaded["image"] else {}

    films = loaded["video"]
    if films:  # their frames are already chosen
        given |= {"videos": [film.frames for film in films], "video_metadata": [film.metadata() for film in films]}
        given["do_sample_frames"] = False
    return given


def shown(processor, texts: list[str], media: list[dict[str, list[Any]]], **options: Any) -> dict[str, Any]:
    """Return what a processor makes of rendered texts with a place for each of their media.

    Of `TYPES` it keeps what says which tokens stand for media: some tokenizers return others that say nothing.

    Args:
        processor: the processor.
        texts: as a chat template renders them, with its special tokens.
        media: of each text, by kind, as `from_text` returns them.
        options: further arguments of the processor.

    Raises:
        ValueError: if the processor takes no images, or no videos.
    """
    given = as_inputs({kind: [medium for one in media for medium in one[kind]] for kind in KINDS})
    for kind in KINDS:
        if f"{kind}s" in given and getattr(processor, f"{kind}_token", None) is None:
            raise ValueError(f"{type(processor).__name__} takes no {kind}s, but there are {len(given[f'{kind}s'])}")
    if "images" in given:
        given["images"] = [one["image"] for one in media]  # Gemma's processors count those of each text

    made = dict(processor(text=list(texts), **given, add_special_tokens=False, **options))
    kinds = processor.create_mm_token_type_ids(_as_lists(made["input_ids"]))
    idle = [name for name in TYPES if name in made and _as_lists(made[name]) != kinds]
    return {name: x for name, x in made.items() if name not in idle}


def kinds_of_tokens(processor, ids: list[list[int]]) -> list[list[int]]:
    """Return what each token of these rows stands for: 1 for an image, 2 for a video, 0 for neither."""
    kinds = processor.create_mm_token_type_ids(ids)
    if getattr(processor, "img_patch_token", None) is None:
        return kinds

    # Llama 4's processor leaves out most tokens of an image
    patch = own_tokenizer(processor).convert_tokens_to_ids(processor.img_patch_token)
    rows = zip(kinds, ids, strict=True)
    return [[1 if i == patch else kind for kind, i in zip(*row, strict=True)] for row in rows]


def _as_lists(rows: Any) -> list[list[int]]:
    return [[int(x) for x in row] for row in rows]


def fingerprint(loaded: dict[str, list[Any]]) -> str:
    """Return a hash of the pixels of `from_text`'s media, 32 hex digits; `""` if there are none."""
    if not any(loaded.values()):
        return ""

    found = hashlib.blake2b(digest_size=16)
    for picture in loaded["image"]:
        found.update(f"image {picture.mode} {picture.size}".encode() + picture.tobytes())
    for film in loaded["video"]:
        said = (film.frames.shape, film.indices, film.total, film.fps)
        found.update(f"video {said}".encode() + film.frames.tobytes())

    return found.hexdigest()


def limit_media(
    processor,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
) -> None:
    """Change how many pixels and frames a target's processor uses; a limit of `None` changes nothing.

    Args:
        processor: the processor, whose parts for images and videos are changed.
        min_pixels, max_pixels: limits of an image, and of a video as its processor counts: per frame in Qwen2.5-VL, for
            all frames together in Qwen3-VL. Smaller or larger media are resized.
        fps: frames per second to take from a video.
        max_frames: maximum number of frames to take from a video.

    Raises:
        ValueError: if the processor has no such limits, or a minimum exceeds a maximum.
    """
    images, videos = (getattr(processor, f"{kind}_processor", None) for kind in KINDS)
    given = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    given = {name: value for name, value in given.items() if value is not None}

    for part in (images, videos) if given else ():
        size = getattr(part, "size", None)
        if size is None and part is videos:  # without torchvision there is no video processor
            continue
        if not hasattr(part, "merge_size") or not (size and size["shortest_edge"] and size["longest_edge"]):
            raise ValueError(
                "`min_pixels` and `max_pixels` are for processors that count pixels, as those of Qwen's models do; "
                f"{type(part).__name__} does not: leave them out."
            )

        least, most = (given.get(name) or size[name] for name in ("shortest_edge", "longest_edge"))
        if least > most:
            raise ValueError(
                f"`min_pixels` {least:,} is more than `max_pixels` {most:,} for {type(part).__name__}: give both, the "
                "minimum first."
            )
        part.size = type(size)(shortest_edge=least, longest_edge=most)

    if fps is not None and videos is not None:
        videos.fps, videos.num_frames, videos.do_sample_frames = fps, None, True
    if max_frames is not None and videos is not None:
        videos.max_frames = max_frames
        videos.min_frames = min(getattr(videos, "min_frames", 1), max_frames)


def processor_fingerprint(processor) -> str:
    """Return a hash, 16 hex digits, of the settings by which a processor prepares images and videos."""
    parts = [getattr(processor, f"{kind}_processor", None) for kind in KINDS]
    said = [part.to_dict() if hasattr(part, "to_dict") else type(part).__name__ for part in parts]
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _written(source: Any, kind: str) -> Any:
    if isinstance(source, Mapping) and source.get("bytes") is not None:  # as `datasets` stores images
        source = source["bytes"]  # in a carried record, it is already base64
    if isinstance(source, Mapping) and isinstance(source.get("path"), str):
        source = source["path"]

    if isinstance(source, bytes):
        return base64.b64encode(source).decode()
    if hasattr(source, "save"):  # an image
        return base64.b64encode(as_png(source)).decode()

    axes = axes_of(source)
    if axes and kind == "video":
        return [_written(frame, "image") for frame in as_pixels(source, 4)]
    if axes:
        from PIL import Image

        return _written(Image.fromarray(as_pixels(source, 3)), kind)

    if isinstance(source, str):
        return source
    if isinstance(source, list | tuple) and source and kind == "video":
        return [_written(frame, "image") for frame in source]
    raise ValueError(
        f"{'an image' if kind == 'image' else 'a video'} must be a path, an address, base64, bytes, an array or "
        f"{'a picture' if kind == 'image' else 'a list of frames'}, got {type(source).__name__}: correct it, or leave "
        "such records out with `skip_bad_records`."
    )
