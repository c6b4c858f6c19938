"""Images and videos in every form in which people have them: the same ids, masks and pixels as typed parts."""

import csv
import json
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_records import FILM, FORMS, IN_FILES, MORE, ONE, SAID, A, B, img, save_pictures, share
from tiny_tokenizer import tiny_tokenizer
from tiny_vision import NAMES, chat, picture, text, vision_processor

from hf_eagle.data.carrying import to_text
from hf_eagle.data.collators import EagleDataCollator
from hf_eagle.data.conversations import build_dataset
from hf_eagle.data.media import has_media, read_media_record
from hf_eagle.data.messages import to_messages
from hf_eagle.data.overlap import overlap_statistics
from hf_eagle.data.records import load_records
from hf_eagle.data.statistics import duplicate_statistics
from hf_eagle.data.vision_dataset import build_vision_dataset


@pytest.fixture
def folder(tmp_path):
    return save_pictures(tmp_path)


def assert_shown_alike(found, wanted, processor):
    assert found["input_ids"] == wanted["input_ids"] and found["loss_mask"] == wanted["loss_mask"]
    collate = EagleDataCollator.of(processor)
    found, wanted = collate(list(found)), collate(list(wanted))
    assert found.keys() == wanted.keys() and "mm_token_type_ids" in wanted
    for key, x in wanted.items():
        assert torch.equal(found[key], x), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_its_typed_parts(name, form, folder):
    """Pixels, ids and masks, of records in memory and of a table's."""
    parts, record = FORMS[form]
    processor, wanted = vision_processor(name), build_vision_dataset([{"messages": parts}], vision_processor(name))
    record = record(folder)
    assert has_media(record)
    assert_shown_alike(build_vision_dataset([record], processor, media_root=str(folder)), wanted, processor)


@pytest.mark.parametrize(("form", "name"), IN_FILES)
def test_of_files_too(form, name, folder):
    """Paths start at the folder of the file, JSON with all in text, or a table."""
    parts, record = FORMS[form]
    processor, record = vision_processor(), record(folder)
    wanted = build_vision_dataset([{"messages": parts}], processor)
    if name == "chats.jsonl":
        (folder / name).write_text(to_text(record, "the record"))
    else:
        Dataset.from_list([record]).to_parquet(folder / name)
    (records,) = (list(load_records(folder / name, content_parts=True)),)
    assert_shown_alike(build_vision_dataset(records, processor), wanted, processor)


def test_cells_of_csv(folder):
    rows = [[name, json.dumps(share("<image>\nhello", SAID))] for name in ("a.png", '["a.png"]')]
    with open(folder / "chats.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "conversations"], *rows])
    data = build_vision_dataset(load_records(folder / "chats.csv"), vision_processor())
    wanted = build_vision_dataset([{"messages": ONE}] * 2, vision_processor())
    assert_shown_alike(data, wanted, vision_processor())


def test_where_paths_start(folder, tmp_path_factory, monkeypatch):
    """At `media_root`, at the file that names them, and else where the process is."""
    elsewhere, here = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("here")
    B.save(elsewhere / "a.png")
    picture(7, 8, 8).save(here / "a.png")
    picture(8, 8, 8).save(here / "c.png")
    monkeypatch.chdir(here)
    lines = [{"image": name, "prompt": "hello", "completion": SAID} for name in ("a.png", "c.png")]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for root, first in ((None, A), (str(elsewhere), B)):
        data = build_vision_dataset(load_records(folder / "chats.jsonl"), vision_processor(), media_root=root)
        shown = [{"messages": chat([img(x), text("hello")], SAID)} for x in (first, picture(8, 8, 8))]
        assert_shown_alike(data, build_vision_dataset(shown, vision_processor()), vision_processor())


TYPED = chat([{"type": "image"}, text("hello")], SAID)
REFUSED = {
    (
        "`images` holds more images than the messages have parts of the type image that name none, or `<image>` in "
        "texts.*: 2 for 1"
    ): {"images": [A, B], "messages": TYPED},
    "`images` holds fewer images than .*: 1 for 2": {"images": [A], "messages": chat("<image> and <image>", SAID)},
    "`image` holds fewer images than .*: 1 for 3": {
        "image": A,
        "messages": chat("<image>", SAID, "<image> <image>", MORE),
    },
    "`images` holds more images than .*: 2 for 0": {"images": [A, B], "messages": chat("hello", SAID)},
    "`images` holds fewer images than .*: 0 for 1": {"images": [], "messages": chat("<image>hello", SAID)},
    "`videos` holds fewer videos than .*: 0 for 1": {
        "image": A,
        "videos": [],
        "messages": chat("<image> <video>", SAID),
    },
    "`image` holds fewer images than .*: 0 for 1": {"image": None, "messages": chat("what is <image>", SAID)},
    "`videos` holds fewer videos than .*: 0 for 1 *": {"videos": None, "prompt": "<video>", "completion": SAID},
    "`video` holds fewer videos than .* `<image>` in texts.*: 1 for 2": {
        "video": FILM,
        "messages": chat("<image><image>hello", SAID),
    },
    "`image` holds more images than .*: 1 for 0": {"image": A, "messages": ONE},
    "`video` holds more videos than .*: 1 for 0": {"video": FILM, "messages": ONE},
    "both `image` and `images` name images": {"image": A, "images": [B], "messages": TYPED},
    "message 0 holds an image part that names no image": {"messages": TYPED},
    "message 0 holds a video part that names no video": {"messages": chat([{"type": "video"}], SAID)},
    "`images` holds more images than .*: 1 for 0 *": {"images": [A], "text": "hello"},
    "an image must be a path, .* got int": {"images": [7], "messages": TYPED},
    r"an array must hold whole numbers .* float64 of \(2, 2, 3\)": {"image": np.zeros((2, 2, 3)), "messages": TYPED},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_does_not_fit_is_refused_and_counted(said, caplog):
    wrong = REFUSED[said]
    with pytest.raises(ValueError, match=f"Record 0: .*{said}"):
        build_vision_dataset([wrong, {"messages": ONE}], vision_processor())
    with caplog.at_level(logging.WARNING):
        data = build_vision_dataset([wrong, {"messages": ONE}], vision_processor(), skip_bad_records=True)
    assert len(data) == 1 and "1 because they cannot be read" in caplog.text


@pytest.mark.parametrize("form", FORMS)
def test_a_target_of_text_is_never_trained_without_the_picture(form, folder, caplog):
    """Refused in a sentence that names the column or the part; counted where asked for."""
    record = FORMS[form][1](folder)
    column = next((name for name in ("image", "images", "video", "videos") if record.get(name) is not None), "content")
    told = f"Record 0: .*(`{column}` names|the content of message 0).*leave such records out"
    with pytest.raises(ValueError, match=told):
        build_dataset([record], tiny_tokenizer())
    plain = {"prompt": "hello", "completion": SAID}
    with caplog.at_level(logging.WARNING):
        assert len(build_dataset([record, plain], tiny_tokenizer(), skip_bad_records=True)) == 1


def test_what_names_no_medium_is_text():
    """Tags of HTML in chats about it, empty columns, and marks in answers."""
    tags = chat("<video> and <image>?", "<image>")
    assert to_messages({"messages": tags}) == to_messages({"messages": tags}, content_parts=True) == tags
    empty = {"image": None, "images": [], "video": "", "videos": "[]", "messages": chat("hello", "<image>")}
    assert to_messages(empty) == chat("hello", "<image>") and not has_media(empty)
    with_picture = {"image": A, "messages": chat("<image>a <video> b", "<image>")}
    messages, media, _ = read_media_record(with_picture, 0)
    assert messages == chat([{"type": "image"}, text("a <video> b")], "<image>") and media == [img(A)]


def test_test_prompts_are_found_beside_pictures(folder):
    """In the texts of the messages."""
    asked = "what is the tall bird that stands by the old mill pond waiting for?"
    record = {"image": "a.png", "conversations": share(f"<image>\n{asked}", SAID)}
    assert overlap_statistics([record], [asked])["conversations_found"] == 1


def test_conversations_about_other_pictures_are_no_duplicates():
    records = [{"image": shown, "prompt": "hello", "completion": SAID} for shown in (A, A, picture(9))]
    assert duplicate_statistics(build_vision_dataset(records, vision_processor())) == {"duplicates": 1}


PIECES = st.lists(st.sampled_from(["<image>", "<video>", "a", " b\n", "<", "image>"]), max_size=6)


@settings(deadline=None)
@given(turns=st.lists(PIECES, min_size=1, max_size=4), more=st.sampled_from([-1, 0, 1]), typed=st.booleans())
def test_a_medium_for_each_place_in_order(turns, more, typed):
    """However texts, marks and turns alternate: as many media as marks stand in their places, no other number does."""
    spoken = ["".join(turn) or "x" for turn in turns]
    contents = [[text(said)] for said in spoken] if typed else spoken
    messages = [message for said in contents for message in chat(said, SAID)]
    numbers = {kind: sum(said.count(f"<{kind}>") for said in spoken) for kind in ("image", "video")}
    given_media = {"images": [f"{n}.png" for n in range(numbers["image"] + more)]}
    given_media["videos"] = [f"{n}.mp4" for n in range(numbers["video"])]
    record = {"messages": messages, **given_media}

    alone = more == 1 and not any(numbers.values())
    if more and (numbers["image"] + more > -1) and not alone:
        with pytest.raises(ValueError, match="`images` holds (more|fewer) images than"):
            to_messages(record, content_parts=True)
        return
    found = to_messages(record, content_parts=True)
    parts = [p for m in found if isinstance(m["content"], list) for p in m["content"]]
    for kind in ("image", "video"):
        assert [p[kind] for p in parts if p["type"] == kind] == given_media[f"{kind}s"]
    if alone:
        assert found[0]["content"][0] == img("0.png")
        return
    # a mark back in each place: the texts as they were
    contents = [m["content"] if isinstance(m["content"], list) else [text(m["content"])] for m in found]
    written = ["".join(part.get("text", f"<{part['type']}>") for part in content) for content in contents]
    assert written == [said for turn in spoken for said in (turn, SAID)]
