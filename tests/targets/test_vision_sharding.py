"""Targets that take images, spread over two ranks: what one process sees, whichever of the ranks has images."""

import json

import pytest
from tiny_vision import save_adapter, save_as_published, tiny_vision_model
from transformers import AutoModelForImageTextToText
from workers import run_worker

from hf_eagle.targets.merged_folder import save_merged
from hf_eagle.targets.shard_layout import layout_of
from hf_eagle.targets.turned_weights import refuse_turned_experts


def published(name, folder):
    save_as_published(tiny_vision_model(name), folder)


def saved(name, folder):
    """By the `save_pretrained` of today, from a model that was built."""
    tiny_vision_model(name).save_pretrained(folder)


def saved_again(name, folder):
    """By the same, from a model that was loaded as it was published."""
    published(name, folder)
    AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(folder)


def merged(name, folder):
    """As a run leaves an adapter on a published model."""
    base, adapter = folder.with_name(f"{folder.name}-base"), folder.with_name(f"{folder.name}-adapter")
    published(name, base)
    save_adapter(base, adapter)
    save_merged(str(adapter), folder)


FILES = {make.__name__: make for make in (published, saved, merged)}
CASES = [
    ("qwen3-vl", "published", "fsdp2"),
    ("qwen2.5-vl", "published", "fsdp2"),
    ("qwen2.5-vl", "published", "tensor"),
    ("qwen3-vl", "published", "tensor"),
    *(
        ("qwen3-vl-moe", files, mode)
        for files in FILES
        for mode in ("fsdp2", "expert", "tensor")
        if (files, mode) != ("published", "tensor")
    ),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    for name, files in dict.fromkeys((name, files) for name, files, _ in CASES):
        FILES[files](name, folder / f"{name}-{files}")
    return folder


@pytest.fixture(scope="module")
def results(models):
    """All cases in one launch; a rank that waited for the other would run into the time limit."""
    done = run_worker(models / "out", 2, worker="vision_worker.py", models=str(models), cases=CASES)
    return json.loads((models / "out" / "results.json").read_text()) | {"printed": done["printed"]}


@pytest.mark.parametrize(("name", "files", "sharding"), CASES)
def test_two_ranks_see_what_one_process_sees(name, files, sharding, results):
    found = results[f"{name} {files} {sharding}"]
    held = found.pop("held")
    # the plan for tensor leaves the vision tower whole, and of Qwen3-VL without experts all but the embedding
    assert held < (1 if (name, sharding) == ("qwen3-vl", "tensor") else 0.9 if sharding == "tensor" else 0.55)
    decoded = {what: found.pop(what) for what in list(found) if what.endswith((": chain", ": tree"))}
    assert len(decoded) == (4 if files == "published" else 0) and not any(decoded.values()), decoded
    assert len(found) == 12
    for what, deviation in found.items():
        assert deviation <= (0 if sharding == "fsdp2" else 1e-5), (what, deviation)


def test_nothing_is_said_of_rules_that_name_nothing(results):
    """transformers' plan for the language model alone: what is spread is spread by other rules, as seen above."""
    assert [line for line in results["printed"].splitlines() if "`fsdp_plan` rules" in line] == []


def test_experts_that_lie_as_published_are_refused_before_they_are_cut(models):
    folder = models / "qwen3-vl-moe-published"
    config = tiny_vision_model("qwen3-vl-moe").config
    with pytest.raises(ValueError, match="`target_sharding` is tensor, but `target` .* experts transposed, .*: use"):
        refuse_turned_experts(config, str(folder))
    saved_again("qwen3-vl-moe", models / "qwen3-vl-moe-saved_again")
    for files in ("saved", "saved_again", "merged"):
        refuse_turned_experts(config, str(models / f"qwen3-vl-moe-{files}"))
    refuse_turned_experts(tiny_vision_model("qwen3-vl").config, str(models / "qwen3-vl-published"))


def test_a_plan_without_layers_is_said(caplog):
    """transformers cuts the embedding of Qwen3-VL alone: each rank holds almost all of it."""
    layout_of(tiny_vision_model("qwen3-vl").config, "tensor", world=2)
    assert "tensor splits the embedding of Qwen3VLTextConfig alone" in caplog.text
