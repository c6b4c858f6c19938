"""Load media as pixels: images by PIL; videos by PyAV, or from their frames."""

import base64
import io
import os
from dataclasses import dataclass
from typing import Any

import numpy as np


class NoDecoder(ImportError):
    """No video decoder is installed."""


@dataclass
class Film:
    """The frames of a video that a target is shown.

    Attributes:
        frames: `(frames, height, width, 3)`, whole numbers from 0 to 255.
        indices: their indices in the video.
        total: the number of frames in the video.
        fps: frames per second of the video; `None` for a list of frames if it is not given.
    """

    frames: np.ndarray
    indices: list[int]
    total: int
    fps: float | None

    def metadata(self):
        """Return the metadata that a video processor needs; new each time, since processors write into it."""
        from transformers.video_utils import VideoMetadata

        height, width = self.frames.shape[1:3]
        seconds = self.total / self.fps if self.fps else None
        return VideoMetadata(self.total, self.fps, width, height, duration=seconds, frames_indices=list(self.indices))


def load_picture(source: str):
    """Load an image from a file, an address or base64, as RGB.

    Raises:
        OSError, ValueError: if it is not an image.
    """
    from transformers.image_utils import load_image

    _check_there(source)
    return load_image(source)


def as_png(picture: Any) -> bytes:
    """A picture of PIL as a PNG file, seen as `load_picture` sees a file of it: upright by its EXIF data, and RGB.

    Raises:
        OSError: if its pixels cannot be read, or cannot become RGB.
    """
    from PIL import ImageOps

    held = io.BytesIO()
    try:
        upright = ImageOps.exif_transpose(picture) if hasattr(picture, "getexif") else picture
        upright.convert("RGB").save(held, format="PNG")
    except ValueError as problem:
        raise OSError(f"a picture of the mode {picture.mode} cannot be shown in RGB: {problem}") from problem
    return held.getvalue()


def load_film(source: str | list[str], video_processor: Any = None) -> Film:
    """Load a video from a file, an address or base64; or from the files of its frames, in order.

    The processor selects the frames of a video, by its `fps`, `num_frames`, `min_frames` and `max_frames`. A list of
    frames, or a `.npy` file of them, is used completely, with the processor's `fps` as its frames per second. If it
    has more than `max_frames` frames, that many are used, evenly spaced.

    Args:
        source: source as `as_text` writes it.
        video_processor: the target's video processor; without it, every frame is used.

    Raises:
        NoDecoder: if PyAV is missing.
        OSError, ValueError: if it is not a video, or its frames differ in size.
    """
    if isinstance(source, list):
        return _of_frames([_frame_of(name) for name in source], video_processor)

    _check_there(source)
    if source.endswith(".npy"):
        return _of_frames(np.load(source, allow_pickle=False), video_processor)
    return _decoded(source, video_processor)


def as_pixels(value: Any, axes: int) -> np.ndarray:
    """Return an array, a tensor or nested lists as pixels with `axes` axes; the last axis is red, green and blue.

    A grey picture, `(height, width)`, may stand for one with three equal colours.

    Raises:
        ValueError: if the value cannot be pixels.
    """
    found = np.asarray(value)
    if axes == 3 and found.ndim == 2:
        found = np.stack([found] * 3, axis=-1)
    if (
        found.ndim != axes
        or found.shape[-1] != 3
        or found.dtype.kind not in "iu"
        or found.min() < 0
        or found.max() > 255
    ):
        frames = "frames, " if axes == 4 else ""
        raise ValueError(
            f"an array must hold whole numbers from 0 to 255 and have the shape ({frames}height, width, 3), got "
            f"{found.dtype} of {found.shape}."
        )
    return found.astype(np.uint8)


def _frame_of(source: str) -> np.ndarray:
    """A frame of a film that is named by its frames; `ValueError` if it moves by itself, which would be cut off."""
    from PIL import Image

    _check_there(source)
    if "://" not in source[:16]:
        with Image.open(source if os.path.isfile(source) else io.BytesIO(_bytes_of(source))) as opened:
            frames = getattr(opened, "n_frames", 1)
        if frames > 1:
            raise ValueError(
                f"a frame of a film is itself a film of {frames} frames: name it as the film, in place of the list; "
                "what is no GIF, as a film file such as .mp4."
            )
    return np.asarray(load_picture(source))


def _of_frames(frames: list[np.ndarray] | np.ndarray, video_processor: Any) -> Film:
    sizes = sorted({frame.shape[:2] for frame in frames})
    if len(sizes) != 1:
        raise ValueError(f"all frames of a video must have the same size, got {len(sizes)} sizes: {sizes[:3]}.")

    frames = as_pixels(np.stack(list(frames)), 4)
    indices = _enough(_spread(len(frames), video_processor), video_processor)
    return Film(frames[indices], indices, len(frames), getattr(video_processor, "fps", None))


def _decoded(source: str, video_processor: Any) -> Film:
    try:
        import av
    except ImportError as problem:
        raise NoDecoder(
            "The data hold videos, but no video decoder is installed: `pip install av`, which includes FFmpeg's "
            "libraries, or leave such records out."
        ) from problem

    opened = source if os.path.isfile(source) or "://" in source[:16] else io.BytesIO(_bytes_of(source))
    with av.open(opened) as container:
        if not container.streams.video:
            raise ValueError("the file holds no video.")
        stream = container.streams.video[0]
        # a header's count may be missing or wrong, so count packets, without decoding them
        total = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
        fps = float(stream.average_rate or stream.guessed_rate or 0) or None
        size = {"width": stream.width, "height": stream.height}
        indices = _enough(_sampled(total, fps, size, video_processor), video_processor)

    if hasattr(opened, "seek"):
        opened.seek(0)
    wanted, found = set(indices), {}
    with av.open(opened) as container:
        for place, frame in enumerate(container.decode(video=0)):
            if place in wanted:
                found[place] = _upright(frame)
            if len(found) == len(wanted):
                break

    if len(found) < len(wanted):
        raise ValueError(f"the video ends before its frame {min(wanted - found.keys())} of {total}.")
    return Film(np.stack([found[place] for place in indices]), indices, total, fps)


def _upright(frame: Any) -> np.ndarray:
    """The pixels of PyAV's frame, turned as its film says (phones film sideways), as players and servers show it."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _sampled(total: int, fps: float | None, size: dict, video_processor: Any) -> list[int]:
    """Return the indices of the frames that the processor selects."""
    from transformers.video_utils import VideoMetadata

    if total == 0:
        raise ValueError("the video has no frames.")
    if total == 1 or not getattr(video_processor, "do_sample_frames", False):
        return _spread(total, video_processor)

    seconds = total / fps if fps else None
    return [int(n) for n in video_processor.sample_frames(VideoMetadata(total, fps, duration=seconds, **size))]


def _spread(total: int, video_processor: Any) -> list[int]:
    """Return the indices of all frames, or of `max_frames` of them, evenly spaced."""
    limit = getattr(video_processor, "max_frames", None) or total
    return np.linspace(0, total - 1, min(total, limit)).round().astype(int).tolist()


def _enough(indices: list[int], video_processor: Any) -> list[int]:
    """Repeat the last frame until there are as many frames as one token covers."""
    missing = getattr(video_processor, "temporal_patch_size", 1) - len(indices)
    return indices + indices[-1:] * max(0, missing)


def _check_there(source: str) -> None:
    """Raise an error for the name of a file that does not exist; otherwise it would be taken for base64."""
    is_name = len(source) < 4096 and "." in source and "://" not in source and not source.startswith("data:")
    if is_name and not os.path.isfile(source):
        raise ValueError(f"there is no file {source}; relative paths start beside the data file, or in `media_root`")


def _bytes_of(source: str) -> bytes:
    """Return the bytes of a base64 text, with or without a prefix such as `data:video/mp4;base64,`."""
    return base64.b64decode(source.partition(",")[2] if source.startswith("data:") else source, validate=True)
