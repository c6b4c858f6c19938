"""Drafts that were really trained on pictures: one that saw them beats one that saw black ones (`make easy-vqa`)."""

import json
from pathlib import Path

import pytest
from measure_easy_vqa import ROPES, drafts_of, load, measure, questions

from hf_eagle import load_draft


FOLDER = Path(__file__).resolve().parents[2] / "assets" / "easy-vqa"


@pytest.mark.skipif(not (FOLDER / "acceptance.json").exists(), reason="`make easy-vqa` makes what this looks at")
def test_a_draft_that_saw_the_pictures_is_better():
    """Measured again on every fifth of the 200 held-out questions; the record is of all of them."""
    recorded = json.loads((FOLDER / "acceptance.json").read_text())
    target, processor = load(FOLDER)
    held_out, lengths = questions(FOLDER / "test.jsonl", 200)[::5], {}
    for name in (name for name in drafts_of(ROPES) if name in recorded):
        found = measure(target, load_draft(FOLDER / f"draft-{name}", target), processor, held_out)
        assert found["identical_to_target"] is recorded[name]["identical_to_target"] is True
        lengths[name] = found["acceptance_length"]
    assert {"pictures", "black"} <= lengths.keys()
    for name in (name for name in lengths if name.startswith("pictures")):
        black = name.replace("pictures", "black")
        assert lengths[name] > lengths[black] + 0.5
        assert recorded[name]["acceptance_length"] > recorded[black]["acceptance_length"] + 0.5
