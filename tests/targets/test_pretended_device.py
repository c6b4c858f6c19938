"""Targets whose weights lie on an accelerator, pretended here: nothing that the code makes on the CPU meets them."""

import json

import pytest
from tiny_targets import MIXTURES, tiny_family
from tiny_vision import save_as_published, tiny_vision_model
from workers import run_worker


CASES = [
    (family, sharding)
    for family in ("llama", "qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3")  # the last but one keeps its own attention
    for sharding in ("none", "fsdp2", "tensor", "expert")
    if sharding != "expert" or family in MIXTURES
]
CASES += [("qwen3-vl", sharding) for sharding in ("none", "fsdp2", "tensor")]
CASES += [("qwen3-vl-moe", sharding) for sharding in ("none", "fsdp2", "expert")]
CASES += [(family, "offloaded") for family in ("llama", "qwen3_moe", "gpt_oss", "tied_llama")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks have found, which load each target in all ways; in processes of their own, see the device."""
    models, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("out")
    for family in {family for family, _ in CASES}:
        if "-vl" in family:
            save_as_published(tiny_vision_model(family), models / family)
            continue
        model = tiny_family(family.removeprefix("tied_"))
        model.config.tie_word_embeddings = family.startswith("tied_") or model.config.tie_word_embeddings
        model.save_pretrained(models / family)
    run_worker(out, 2, worker="pretended_device_worker.py", models=str(models), cases=CASES)
    return [json.loads((out / f"results-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("family", "sharding"), CASES)
def test_a_target_sees_on_the_device_what_it_sees_on_the_cpu(family, sharding, ranks):
    for rank in ranks:
        found = rank["cases"][f"{family} {sharding}"]
        assert found["device"] == "pretended:0"
        assert found["mode"] == ("fsdp2" if sharding == "offloaded" else sharding)
        assert found["places"] == ["cpu" if sharding == "offloaded" else "pretended"]
        # the CPU has a fused attention, the device has not
        assert {name: x for name, x in found["deviations"].items() if not x <= 1e-5} == {}


def test_the_device_refuses_what_an_accelerator_refuses(ranks):
    """Indices and numbers alone may come from the CPU, and what is to be copied."""
    refused = ["a sum", "a product", "places to take", "places in a CPU's tensor", "values put at places"]
    for rank in ranks:
        assert [name for name, done in rank["mixtures"].items() if not done] == refused
        assert [name for name, done in rank["mixtures"].items() if done] == ["places", "a number", "a copy"]
