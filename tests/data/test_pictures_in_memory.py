"""Pictures of PIL in records of Python: shown as the file that they come from."""

import io
import logging

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from releases import skip_before
from tiny_vision import chat, picture, text, vision_processor

from hf_eagle.data.frames import as_png, load_picture
from hf_eagle.data.media import as_text, from_text
from hf_eagle.data.records import load_records
from hf_eagle.data.vision_dataset import build_vision_dataset


MODES = {"1": "png", "L": "png", "LA": "png", "P": "png", "RGBA": "png", "I;16": "png", "I": "tiff", "F": "tiff"}
MODES |= {"CMYK": "jpg", "YCbCr": "tiff", "LAB": "tiff", "RGB": "bmp"}


def of_mode(mode):
    if mode == "LAB":
        return Image.frombytes("LAB", (16, 8), picture(3).resize((16, 8)).tobytes())
    return picture(3).convert("L").convert(mode) if mode in ("I;16", "I", "F") else picture(3).convert(mode)


def loaded(source):
    (found,) = from_text(as_text([{"type": "image", "image": source}]))["image"]
    return found


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_shown_as_its_file(mode, tmp_path):
    path = tmp_path / f"a.{MODES[mode]}"
    of_mode(mode).save(path)
    if mode == "YCbCr":
        skip_before("pillow", "13.0")  # which is the first that reads what it wrote
    with Image.open(path) as opened:
        assert np.array_equal(loaded(opened), load_picture(str(path)))


def test_a_mode_that_no_file_has():
    assert np.array_equal(loaded(picture(3).convert("HSV")), picture(3).convert("HSV").convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_shown_as_its_file(orientation, tmp_path):
    """By path, bytes, PIL, and a table of `datasets`."""
    shown, path = picture(4, 16, 8), tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown.save(path, exif=exif)
    upright = load_picture(str(path))
    assert (upright.size == shown.size) == (orientation < 5)
    with Image.open(path) as opened:
        for found in (loaded(opened), loaded(path.read_bytes()), Image.open(io.BytesIO(as_png(opened)))):
            assert np.array_equal(found, upright)


def test_of_a_table_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(4, 16, 8).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as opened:
        table = Dataset.from_list([{"image": opened, "messages": chat("<image>hello", "the cat")}])
        table.save_to_disk(tmp_path / "table")
    processor = vision_processor()
    (found,) = build_vision_dataset(load_records(tmp_path / "table"), processor)
    (wanted,) = build_vision_dataset(
        [{"image": str(tmp_path / "a.jpg"), "messages": chat("<image>hello", "the cat")}], processor
    )
    assert found["media_fingerprint"] == wanted["media_fingerprint"]


class Unreadable(Image.Image):
    """Such as of a file that was cut off, which PIL reads only when its pixels are asked for."""

    def __init__(self, problem):
        super().__init__()
        self.problem = problem

    def load(self):
        raise self.problem


@pytest.mark.parametrize("problem", [OSError("image file is truncated"), ValueError("conversion not supported")])
def test_pixels_that_cannot_be_read_are_a_bad_medium(problem, caplog):
    def record(shown):
        return {"messages": chat([{"type": "image", "image": shown}, text("hello")], "the cat")}

    with pytest.raises(ValueError, match=f"Record 0: a medium cannot be loaded .*{problem}.*`skip_bad_media`"):
        build_vision_dataset([record(Unreadable(problem))], vision_processor())
    with caplog.at_level(logging.WARNING):
        records = [record(Unreadable(problem)), record(picture(1))]
        assert len(build_vision_dataset(records, vision_processor(), skip_bad_media=True)) == 1
    assert "1 because a medium cannot be loaded" in caplog.text


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2), (2, 2, 4), (2, 2, 2, 1)])
def test_an_array_of_another_shape_says_which_is_wanted(shape):
    record = {"image": np.zeros(shape, np.uint8), "messages": chat("<image>hello", "the cat")}
    with pytest.raises(ValueError, match=r"Record 0: .*(height, width, 3\), got uint8|for 1\.)"):
        build_vision_dataset([record], vision_processor())
