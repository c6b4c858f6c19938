"""Training and decoding on an accelerator, pretended here: as on the CPU, and the host runs ahead of the device."""

import json

import pytest
from distributed.pretended_training_worker import BROKEN, DECODINGS
from pretended_forms import FORMS
from workers import run_worker


FLASH = "EAGLE-3, flash attention, packed"
# where a target places what its tower has seen by masks: waits of a batch
PICTURES = {"pictures and films": 16, "pictures, embedded": 9}
# operations of a batch, views aside: the draft's and the target's, the backward pass and the optimizer
OPERATIONS = {
    "EAGLE-3, padded": 1515,
    "EAGLE-3, packed": 2050,
    "EAGLE-3, rows of one length": 1445,
    "EAGLE-3, whole vocabulary, padded": 1510,
    "EAGLE-3, lk_lambda, packed": 2100,
    "EAGLE-3, LoRA": 1760,
    "EAGLE-3, gradient checkpointing": 1705,
    "latent attention, padded": 1670,
    "EAGLE-1, padded": 1060,
    "DFlash, padded": 1480,
    "DFlash, packed": 2020,
    "DFlash, dpace, packed": 2050,
    "DFlash, LoRA": 1640,
    "DFlash, gradient checkpointing": 1670,
    "DFlash, stored": 560,
    "EAGLE-3, stored": 865,
    "EAGLE-3, one kernel for all documents": 1490,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a process of its own has found, since a device in Python stays for as long as its process."""
    out = tmp_path_factory.mktemp("pretended")
    asked = {"forms": list(FORMS), "decodings": list(DECODINGS), "broken": list(BROKEN)}
    run_worker(out, worker="pretended_training_worker.py", **asked)
    return json.loads((out / "results.json").read_text())


def waits(form: dict, *parts: str) -> float:
    return sum(count for count, part, *_ in form["waits"] if not parts or part in parts)


@pytest.mark.parametrize("form", [form for form in FORMS if form.endswith(", eager")])
def test_a_form_has_the_attention_that_it_names(form, tmp_path):
    _, draft = FORMS[form][0](tmp_path)["pair"]
    assert draft.config._attn_implementation == "eager"


@pytest.mark.parametrize("form", FORMS)
def test_a_step_computes_what_it_computes_on_the_cpu(form, found):
    seen = found["forms"][form]
    assert seen["loss"] <= 1e-6
    assert {name: apart for name, apart in seen["gradients"].items() if not apart <= 5e-6} == {}


@pytest.mark.parametrize("form", [form for form in FORMS if form not in (*PICTURES, FLASH)])
def test_a_step_does_not_wait_for_the_device(form, found):
    """It reads what the batch before it found, and asks nothing between the target's forward and the backward pass."""
    seen = found["forms"][form]
    assert waits(seen) <= 2, seen["waits"]
    assert waits(seen, "within") == 0, seen["waits"]


def test_flash_attention_waits_once_in_transformers(found):
    """It looks for documents in the positions even if it is told where they begin."""
    (wait, *where), *others = sorted(found["forms"][FLASH]["waits"], key=lambda x: x[1] != "within")
    assert wait == 1 and where[-1].startswith("targets/tapped.py") and "transformers/masking_utils.py" in where[-1]
    assert {part for _, part, *_ in others} == {"before the target"} and sum(count for count, *_ in others) <= 1


@pytest.mark.parametrize("form", PICTURES)
def test_only_a_target_of_pictures_waits_in_its_own_forward(form, found):
    """transformers places features by masks, and looks for padding; its tower knows all sizes."""
    seen = found["forms"][form]
    ours = [where for where in seen["waits"] if " through transformers/" not in where[-1]]
    assert sum(count for count, *_ in ours) <= 2 and {part for _, part, *_ in ours} == {"before the target"}, ours
    assert {where[-1].split(":")[0] for where in seen["waits"] if where not in ours} == {"targets/tapped.py"}
    assert waits(seen) <= PICTURES[form]
    # neither the tower's attention nor what it computes of sizes
    assert not [where for where in seen["waits"] if where[2] == "tolist" or "vision_utils" in where[-1]]


@pytest.mark.parametrize(("form", "most"), OPERATIONS.items())
def test_a_step_asks_for_no_more_operations(form, most, found):
    assert found["forms"][form]["operations"] <= most
    assert found["forms"][form]["casts"] <= 17


@pytest.mark.parametrize("way", DECODINGS)
def test_decoding_gives_the_cpus_tokens_and_waits_once_a_round(way, found):
    seen = found["decodings"][way]
    assert seen["same"]
    in_rounds = [where for where in seen["waits"] if where[0] >= seen["rounds"]]
    assert in_rounds == [[seen["rounds"], "tolist", in_rounds[0][-1]]]
    assert "decoding/generate.py" in in_rounds[0][-1]


def test_what_makes_the_host_wait_is_recorded(found):
    """Reading a value, a size or a place; a copy, unless it was asked not to."""
    waits = [name for name, (count, *_) in found["operations"].items() if count]
    free = ["sent without waiting", "fetched without waiting", "places as an index", "masked_fill"]
    free += ["repeat_interleave of a known size", "a cast", "a view", "a product"]
    assert [name for name in found["operations"] if name not in waits] == free
    assert all(count <= 1 for count, *_ in found["operations"].values())

    operations = {name: x[1:] for name, x in found["operations"].items()}
    assert operations["a view"] == [0, 0] and operations["a product"] == [1, 0] and operations["a cast"] == [1, 1]


@pytest.mark.parametrize("where", BROKEN)
def test_a_number_that_is_none_is_found_late_and_named_with_its_records(where, found):
    """The device has gone on meanwhile, but nothing is kept: it is found before the next batch is trained on, or where
    the run logs, evaluates, saves or ends."""
    what, step, fields = BROKEN[where]
    seen, batches = found["broken"][where], fields.get("gradient_accumulation_steps", 1)
    if what == "loss":
        assert seen["said"].startswith(f"The loss is nan at step {step}: lower `learning_rate`")
    else:
        assert seen["said"].startswith(f"The norm of the gradient of step {step + 1} is nan")

    assert list(seen["left"]) == [f"broken-step-{step + 1}-rank-0.jsonl"]
    assert f"{seen['left'].popitem()[1]} records that rank 0 had in that step" in seen["said"]
    assert not [name for name in seen["kept"] if name.startswith("checkpoint") or "safetensors" in name]
    in_step = where == "the next batch, accumulated"
    late = 1 if what == "gradient" and "logging_steps" not in fields else 0
    assert seen["steps"] == step + (0 if in_step else 1) + late, batches
