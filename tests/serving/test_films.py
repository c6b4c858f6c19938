"""Films through transformers' own video processors, whose torchvision is in the server's environment alone.

`make test` decodes films and shows them by a plain processor (`tests/data/test_frames.py`); what it leaves out is this.
"""

import json
import os

import harness
import pytest


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    path = {"PYTHONPATH": os.pathsep.join(map(str, harness.WITHOUT_CUDA))}
    harness.call_fresh(harness.PROJECT_PYTHON, "tests/serving/show_films.py", folder, **path)
    return json.loads((folder / "shown.json").read_text())


@pytest.mark.parametrize("name", ["qwen3-vl", "qwen3-vl-moe", "qwen2.5-vl"])
@pytest.mark.parametrize("limits", ["own", "given"])
def test_a_film_is_shown_as_the_processor_shows_it(name, limits, shown):
    """The same frames, times, ids, pixels and logits; with limits, fewer of them."""
    found = shown[f"{name}, {limits}"]
    assert found["video processor"] == ("Qwen2VLVideoProcessor" if name == "qwen2.5-vl" else "Qwen3VLVideoProcessor")
    assert all(found["equal"].values()) and {"input_ids", "pixel_values_videos", "pixel_values"} <= set(found["equal"])
    assert found["logits"] is True
    frames = {"own": 12 if name == "qwen2.5-vl" else 2, "given": 2 if name == "qwen2.5-vl" else 3}[limits]
    assert [grid[0] for grid in found["grid"]] == [frames]
