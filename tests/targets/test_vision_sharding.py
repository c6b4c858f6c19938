"""Targets that take images, spread over two ranks: what one process sees, whichever of the ranks has images."""

import json

import pytest
from tiny_vision import save_as_published, tiny_vision_model
from workers import run_worker


CASES = [("qwen3-vl", "fsdp2"), ("qwen2.5-vl", "fsdp2"), ("qwen3-vl-moe", "fsdp2"), ("qwen3-vl-moe", "expert")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All cases in one launch; a rank that waited for the other would run into the time limit."""
    folder = tmp_path_factory.mktemp("vision")
    for name in {name for name, _ in CASES}:
        save_as_published(tiny_vision_model(name), folder / name)
    run_worker(folder / "out", 2, worker="vision_worker.py", models=str(folder), cases=CASES)
    return json.loads((folder / "out" / "results.json").read_text())


@pytest.mark.parametrize(("name", "sharding"), CASES)
def test_two_ranks_see_what_one_process_sees(name, sharding, results):
    found = results[f"{name} {sharding}"]
    assert found.pop("held") < 0.55
    decoded = {what: found.pop(what) for what in ("picture: chain", "picture: tree", "batch: chain", "batch: tree")}
    assert not any(decoded.values()), decoded
    assert len(found) == 12
    for what, deviation in found.items():
        assert deviation <= (0 if sharding == "fsdp2" else 1e-5), (what, deviation)
