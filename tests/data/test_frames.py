"""Films as people have them: files, bytes and lists of frames, at the processor's rate and within its limits."""

import base64
import logging
import struct
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_films import CODECS, FRAMES, write_film
from tiny_vision import NAMES, SamplingVideoProcessor, chat, film, image, picture, text, vision_processor

from hf_eagle.arguments.groups import DataArguments
from hf_eagle.data.frames import NoDecoder, load_film
from hf_eagle.data.media import as_inputs, as_text, fingerprint, from_text, limit_media, processor_fingerprint
from hf_eagle.data.vision_collator import DataCollatorForVisionEagle
from hf_eagle.data.vision_dataset import build_vision_dataset
from hf_eagle.hub.run_facts import changed_arguments


def shown(source):
    return {"messages": chat([{"type": "video", "video": source}, text("hello")], "the cat")}


@pytest.mark.parametrize("kind", CODECS)
def test_every_frame_of_a_file(kind, tmp_path):
    found = load_film(write_film(tmp_path / f"a.{kind}"))
    assert np.array_equal(found.frames, FRAMES) and found.indices == list(range(24))
    assert (found.total, found.fps) == (24, 12.0) and found.metadata().duration == 2.0


def test_what_was_cut_off_is_no_frame(tmp_path):
    """Of a trimmed film, whose header and packets still count it."""
    found = load_film(write_film(tmp_path / "a.mp4", cut=5))
    assert found.total == 19 and np.array_equal(found.frames, FRAMES[5:])


# quarter turns to the right -> the first four numbers of the matrix in an MP4's track header, by ISO 14496-12
TURNS = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}


@pytest.mark.parametrize("turns", TURNS)
def test_a_film_that_was_taken_sideways_is_shown_upright(turns, tmp_path):
    """As players and vLLM's reader show it; its limits and its size are those of what is shown."""
    path = tmp_path / "a.mp4"
    raw = bytearray(Path(write_film(path)).read_bytes())
    place = raw.index(b"tkhd") + 44  # behind the header's times, number, length, layer and volume
    a, b, c, d = (number * 65536 for number in TURNS[turns])
    raw[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(raw)
    found = load_film(str(path))
    assert np.array_equal(found.frames, np.rot90(FRAMES, -turns, axes=(1, 2)))
    assert (found.metadata().height, found.metadata().width) == found.frames.shape[1:3]


def animated(folder, kind: str) -> str:
    first, *rest = map(Image.fromarray, FRAMES[:4])
    first.save(folder / f"a.{kind}", save_all=True, append_images=rest, duration=500, lossless=True)
    return str(folder / f"a.{kind}")


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_a_frame_that_moves_is_never_cut_to_its_first_picture(kind, tmp_path):
    """In a list of frames, by its path or its content."""
    path = animated(tmp_path, kind)
    for source in ([path], [path, path], [Path(path).read_bytes()]):
        with pytest.raises(ValueError, match="a medium cannot be loaded .*is itself a film of 4 frames: name it"):
            build_vision_dataset([shown(source)], vision_processor())


@settings(deadline=None, max_examples=20)
@given(
    frames=st.integers(1, 30),
    rate=st.sampled_from([1, 5, 24]),
    fps=st.sampled_from([0.5, 2, 24]),
    most=st.integers(2, 9),
)
def test_the_frames_that_the_processor_takes(frames, rate, fps, most, tmp_path_factory):
    """Their pixels and their times; of one frame alone, two."""
    folder, processor = tmp_path_factory.mktemp("film"), SamplingVideoProcessor()
    processor.fps, processor.max_frames = fps, most
    whole = film(2, frames, 8, 8)
    found = load_film(write_film(folder / "a.mkv", whole, rate), processor)
    wanted = min(max(int(frames / rate * fps), 2), most, frames)
    indices = np.linspace(0, frames - 1, wanted).round().astype(int).tolist() if frames > 1 else [0, 0]
    assert found.indices == indices and np.array_equal(found.frames, whole[indices])
    assert found.metadata().timestamps == [n / rate for n in indices] and len(indices) <= most


def ways(folder) -> dict:
    path = write_film(folder / "a.mp4")
    held = (folder / "a.mp4").read_bytes()
    return {
        "its address": (folder / "a.mp4").as_uri(),
        "bytes": held,
        "as `datasets` has it": {"bytes": held, "path": None},
        "base64": base64.b64encode(held).decode(),
        "data": "data:video/mp4;base64," + base64.b64encode(held).decode(),
        "a path": path,
    }


@pytest.mark.parametrize("name", NAMES)
def test_ways_to_name_a_film(name, tmp_path):
    """A part, a column and OpenAI's form: the same ids, pixels and fingerprint; and the frames alone, at that rate."""
    processor = vision_processor(name, SamplingVideoProcessor())
    sources = ways(tmp_path)
    records = [shown(source) for source in sources.values()]
    records += [{"video": sources["bytes"], "prompt": "<video>hello", "completion": "the cat"}]
    address = {"type": "video_url", "video_url": {"url": sources["data"]}}
    records += [{"messages": chat([address, text("hello")], "the cat")}]
    data = build_vision_dataset(records, processor)
    collate = DataCollatorForVisionEagle(processor)
    batches = [collate([row]) for row in data]
    for batch in batches[1:]:
        assert batch.keys() == batches[0].keys() and all(torch.equal(batch[key], x) for key, x in batches[0].items())
    assert len(set(data["media_fingerprint"])) == 1
    assert batches[0]["video_grid_thw"].tolist() == [[2, 2, 4]]  # four frames, two of which are a row of tokens

    (row,) = build_vision_dataset([shown(list(FRAMES[[0, 8, 15, 23]]))], processor)
    assert torch.equal(collate([row])["pixel_values_videos"], batches[0]["pixel_values_videos"])


@pytest.mark.parametrize("name", NAMES)
def test_a_list_of_frames_in_every_form(name, tmp_path):
    """PIL's, arrays, paths and tensors; at most `max_frames` of them."""
    processor, frames = vision_processor(name, SamplingVideoProcessor()), film(3, 12)
    for n, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{n}.png")
    np.save(tmp_path / "film.npy", frames)
    forms = [
        frames,
        list(frames),
        [Image.fromarray(x) for x in frames],
        [str(tmp_path / f"{n}.png") for n in range(12)],
    ]
    forms += [torch.as_tensor(frames), frames.tolist(), str(tmp_path / "film.npy")]
    data = build_vision_dataset([shown(form) for form in forms], processor)
    collate = DataCollatorForVisionEagle(processor)
    batches = [collate([row]) for row in data]
    for batch in batches:
        assert all(torch.equal(batch[key], x) for key, x in batches[0].items())
    kept = frames[np.linspace(0, 11, 8).round().astype(int)]
    assert torch.equal(batches[0]["pixel_values_videos"], processor.video_processor([kept])["pixel_values_videos"])


def test_limits_reach_what_is_shown(tmp_path):
    """Pixels of images, frames of films, ids, the fingerprint of the processor, and the card."""
    records = [{"messages": chat([image(1, 32, 32), text("hello")], "the cat")}, shown(write_film(tmp_path / "a.mkv"))]
    limits = {"min_pixels": 64, "max_pixels": 256, "fps": 4.0, "max_frames": 6}
    shapes, prints = [], []
    for given_ in ({}, limits):
        processor = vision_processor(videos=SamplingVideoProcessor())
        processor.video_processor.size = processor.image_processor.size
        processor.video_processor.to_dict = lambda it=processor.video_processor: dict(vars(it), to_dict=None)
        limit_media(processor, **given_)
        data = build_vision_dataset(records, processor)
        batch = DataCollatorForVisionEagle(processor)(list(data))
        shapes.append((batch["image_grid_thw"].tolist(), batch["video_grid_thw"].tolist()))
        prints.append(processor_fingerprint(processor))
    assert shapes == [([[1, 8, 8]], [[2, 2, 4]]), ([[1, 4, 4]], [[3, 2, 4]])] and prints[0] != prints[1]
    assert processor.video_processor.size["longest_edge"] == 256
    told = changed_arguments(DataArguments(train_data=["x"], media_root="somewhere", **limits))
    assert told == limits and DataArguments(train_data=["x"], **limits).media_limits == limits


def test_limits_that_are_refused():
    processor = vision_processor()
    with pytest.raises(ValueError, match="`min_pixels` 2,048 is more than `max_pixels` 1,024"):
        limit_media(processor, min_pixels=2048)
    with pytest.raises(ValueError, match="`min_pixels` 64 is more than `max_pixels` 8 "):
        limit_media(processor, max_pixels=8)
    with pytest.raises(ValueError, match="`fps` must be above 0"):
        DataArguments(train_data=["x"], fps=0)
    processor.image_processor = type("Squares", (), {"size": {"height": 8, "width": 8}})()
    with pytest.raises(ValueError, match="processors that count pixels.*Squares does not"):
        limit_media(processor, max_pixels=4096)


def bad_films(folder) -> dict:
    whole = (folder / "good.mkv").read_bytes()
    picture(1).save(folder / "small.png")
    picture(2, 24, 24).save(folder / "large.png")
    files = {"empty.mkv": b"", "text.mkv": b"no film", "head.mkv": whole[:40]}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with av.open(str(folder / "sound.wav"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.rate = 8000
        file.mux([*stream.encode(sound), *stream.encode(None)])
    paths = {name: str(folder / name) for name in (*files, "nowhere.mp4", "sound.wav")}
    sizes = [str(folder / name) for name in ("small.png", "large.png")]
    return paths | {"sizes": sizes, "no base64": "ab*c", "frames": [str(folder / "gone.png")] * 2}


def test_bad_films_stop_or_are_counted(tmp_path, caplog):
    """Broken, missing, without frames, of frames that do not fit: each stops with its record, or is left out."""
    good = write_film(tmp_path / "good.mkv")
    bad = bad_films(tmp_path)
    for source in bad.values():
        with pytest.raises(ValueError, match="Record 0: a medium cannot be loaded .*`skip_bad_media`"):
            build_vision_dataset([shown(source)], vision_processor())
    with caplog.at_level(logging.WARNING):
        data = build_vision_dataset([*map(shown, bad.values()), shown(good)], vision_processor(), skip_bad_media=True)
    assert len(data) == 1 and f"{len(bad)} because a medium cannot be loaded" in caplog.text


def test_what_the_processor_refuses_is_a_bad_medium(caplog):
    """Such as a picture 300 times as wide as it is high."""
    wide = {"messages": chat([image(1, 1200, 4), text("hello")], "the cat")}
    with pytest.raises(ValueError, match="Record 0: the processor refuses its media .*aspect ratio"):
        build_vision_dataset([wide], vision_processor())
    plain = {"messages": chat([image(1), text("hello")], "the cat")}
    with caplog.at_level(logging.WARNING):
        assert len(build_vision_dataset([wide, plain], vision_processor(), skip_bad_media=True)) == 1
    assert "1 because a medium cannot be loaded" in caplog.text


def test_without_a_decoder_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    """It is no fault of the records, so none is left out for it; lists of frames need none."""
    path = write_film(tmp_path / "a.mkv")
    (row,) = build_vision_dataset([shown(path)], vision_processor())
    monkeypatch.setitem(sys.modules, "av", None)
    skip = {"skip_bad_media": True, "skip_bad_records": True}
    with pytest.raises(NoDecoder, match="`pip install av`"):
        build_vision_dataset([shown(path)], vision_processor(), **skip)
    with pytest.raises(NoDecoder, match="`pip install av`"):
        DataCollatorForVisionEagle(vision_processor())([row])
    assert len(build_vision_dataset([shown(list(FRAMES))], vision_processor())) == 1


def test_without_a_video_processor_nothing_is_left_out_for_it():
    """As transformers has none where torchvision is missing: what is to be installed is told."""

    def missing(*args, **kwargs):
        raise ImportError("install it")

    skip = {"skip_bad_media": True, "skip_bad_records": True}
    processor = vision_processor(videos=missing)
    limit_media(processor, max_pixels=512, fps=1.0, max_frames=4)  # what is not there has no limits
    with pytest.raises(ImportError, match="install it"):
        build_vision_dataset([shown(list(FRAMES))], processor, **skip)


def test_other_films_have_other_fingerprints(tmp_path):
    """Of one pixel, of another rate; not of another name."""
    other = FRAMES.copy()
    other[5, 0, 0, 0] ^= 1
    paths = [write_film(tmp_path / "a.mkv"), write_film(tmp_path / "b.mkv"), write_film(tmp_path / "c.mkv", other)]
    paths.append(write_film(tmp_path / "d.mkv", fps=24))
    prints = [fingerprint(from_text(as_text([{"type": "video", "video": path}]))) for path in paths]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_what_a_processor_is_given_is_new_each_time(tmp_path):
    """They write into the metadata."""
    loaded = from_text(as_text([{"type": "video", "video": write_film(tmp_path / "a.mkv")}]))
    first = as_inputs(loaded)
    first["video_metadata"][0].frames_indices.append(99)
    first["video_metadata"][0].fps = 1
    again = as_inputs(loaded)["video_metadata"][0]
    assert again.frames_indices == list(range(24)) and again.fps == 12.0
