"""What is said of media that cannot be used: file and record, what is wrong, and the option that leaves them out."""

import json

import pytest
from tiny_tokenizer import tiny_tokenizer
from tiny_vision import chat, image, picture, text, vision_processor

from hf_eagle.data.conversations import build_dataset
from hf_eagle.data.media import as_text
from hf_eagle.data.records import load_records
from hf_eagle.data.vision_dataset import build_vision_dataset
from hf_eagle.evaluation.prompts import load_prompts


def shown(source, said="a"):
    return {"messages": chat([{"type": "image", "image": source}, text(said)], "b")}


@pytest.fixture
def folder(tmp_path):
    """Three sound records with pictures, so that a later file's numbers differ from those over all files."""
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "film.png").write_bytes(b"no picture")
    (tmp_path / "sound.jsonl").write_text((json.dumps(shown("a.png")) + "\n") * 3)
    return tmp_path


def built(folder, *records, **how):
    (folder / "bad.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    loaded = load_records([str(folder / "sound.jsonl"), str(folder / "bad.jsonl")])
    return build_vision_dataset(loaded, vision_processor(), **how)


@pytest.mark.parametrize(
    ("record", "said", "flag"),
    [
        (shown("a.png", "<|image_pad|>"), "its text holds 2 times", None),
        (
            shown("none.png"),
            "there is no file none.png; relative paths start .* `media_root`",
            "skip_bad_media",
        ),
        (shown("film.png"), "a medium cannot be loaded", "skip_bad_media"),
        (shown(3), "an image must be a path.*got int", "skip_bad_records"),
        (shown({"name": "a.png"}), "an image must be a path.*got dict", "skip_bad_records"),
    ],
)
def test_the_file_and_the_record_in_it_are_named(record, said, flag, folder):
    with pytest.raises(ValueError, match=f"bad.jsonl: Record 1: .*{said}.*{flag or ''}"):
        built(folder, shown("a.png"), record)
    skips = {"skip_bad_media": True} if flag == "skip_bad_media" else {"skip_bad_records": True}
    assert len(built(folder, shown("a.png"), record, **skips)) == 4


def test_a_processor_that_refuses_a_medium_names_its_file_too(folder):
    """A picture too flat for Qwen's processor, which keeps its shape."""
    picture(1, 1000, 1).save(folder / "flat.png")
    with pytest.raises(ValueError, match="bad.jsonl: Record 0: the processor refuses its media"):
        built(folder, shown("flat.png"))
    assert len(built(folder, shown("flat.png"), skip_bad_media=True)) == 3


def test_what_became_of_all_conversations_is_said(folder):
    how = {"skip_bad_media": True, "skip_bad_records": True}
    (folder / "sound.jsonl").write_text(json.dumps(shown("none.png")) + "\n")
    with pytest.raises(ValueError) as told:
        built(folder, shown("none.png"), shown(3), **how)
    assert "2 with a medium that cannot be loaded" in str(told.value) and "1 that cannot be read" in str(told.value)
    assert "max_length" not in str(told.value) and "sound.jsonl: Record 0: a medium" in str(told.value)

    with pytest.raises(ValueError, match=r"\(1 longer than `max_length` 2: raise it\).$"):
        build_vision_dataset([shown(str(folder / "a.png"))], vision_processor(), max_length=2)
    asked = {"messages": chat([image(1), text("a")])}
    with pytest.raises(ValueError, match=r"\(1 without an answer: add some\).$"):
        build_vision_dataset([asked], vision_processor())


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (
            {"type": "IMAGE", "image": "a.png"},
            "the type 'IMAGE', which is not known: a medium is of the type image,",
        ),
        ({"type": "input_image", "image_url": "a.png"}, "the type 'input_image', which is not known"),
        ({"type": "input_audio", "input_audio": {}}, "the type 'input_audio', which is not known"),
        ({"image": "a.png"}, "a part without a `type`"),
        ({"type": "image", "image": "a.png"}, "need a target that takes them, and no `streaming`"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "need a target that takes them, and no `streaming`"),
    ],
)
def test_a_part_that_is_no_text_is_told_by_its_type(part, said):
    with pytest.raises(ValueError, match=said) as told:
        build_dataset([{"messages": chat([part, text("a")], "b")}], tiny_tokenizer())
    assert ("need a target" in said) == ("need a target" in str(told.value))


@pytest.mark.parametrize("source", [3, True, None, {"name": "a"}, 1.5])
def test_what_is_no_medium_names_the_option_that_leaves_it_out(source):
    with pytest.raises(ValueError, match="leave such records out with `skip_bad_records`"):
        as_text([{"type": "image", "image": source}])


def test_only_the_first_turn_of_a_prompt_shows_media(folder):
    (folder / "prompts.jsonl").write_text(
        json.dumps({"turns": ["<image>a", "<image>b"], "images": ["a.png", "a.png"]}) + "\n"
    )
    with pytest.raises(ValueError, match="Record 0 .*shows a medium in a later one of its `turns`: only the first"):
        load_prompts(folder / "prompts.jsonl")
    (folder / "prompts.jsonl").write_text(json.dumps({"turns": ["<image>a", "b"], "image": "a.png"}) + "\n")
    assert load_prompts(folder / "prompts.jsonl")[0].follow_ups == ("b",)
    (folder / "prompts.jsonl").write_text(json.dumps({"turns": ["a", "What is <image> in HTML?"]}) + "\n")
    assert load_prompts(folder / "prompts.jsonl")[0].follow_ups == ("What is <image> in HTML?",)
