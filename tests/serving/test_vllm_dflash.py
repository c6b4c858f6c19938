"""A real, unmodified vLLM drafts with DFlash folders what the reference does, block by block, and counts what we do."""

import json

import harness
import pytest

from hf_eagle.serving.check import check_draft


WHOLE = ["random", "taught", "taught, 2 layers", "second form", "random, own k_norms"]
SILENT = {"no fc": "`fc.weight` is missing", "is_causal": "`is_causal` is true"}
REFUSED = {"verifier_norm": "loading fails", "no mask": "is refused"}
LENGTH = 24  # of an answer, as in teach_blocks.py


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Folder, what hf_eagle and the reference measured, and what vLLM did, all drafts in one process."""
    folder = tmp_path_factory.mktemp("dflash")
    harness.call(harness.project(), "tests/serving/teach_blocks.py", "--folder", folder)
    measured = json.loads((folder / "measured.json").read_text())
    drafts = [folder / name for name in (*WHOLE, *SILENT, *REFUSED)]
    values = {"target": folder / "target", "prompts": folder / "prompt_ids.json", "drafts": ["none", *drafts]}
    values |= {"num_speculative_tokens": 4, "max_tokens": LENGTH, "output": folder / "served.json"}
    harness.call(harness.server(), "tests/serving/run_blocks.py", *harness.options(values))
    found = json.loads((folder / "served.json").read_text())
    assert found["none"]["token_ids"] == measured["answers"]
    return folder, measured, {name: found[str(folder / name)] for name in (*WHOLE, *SILENT, *REFUSED)}


def by_prompt(blocks, prompts):
    """The blocks of each prompt: one begins behind its prompt, at a place no higher than the last."""
    found, lengths = [], iter(prompts)
    for place, tokens in blocks:
        if not found or place <= found[-1][-1][0]:
            found.append([])
            assert place == next(lengths)
        found[-1].append([place, tokens])
    return found


@pytest.mark.parametrize("name", WHOLE)
def test_every_block_is_the_references_and_answers_are_the_targets(name, served):
    folder, measured, found = served
    assert found[name]["token_ids"] == measured["answers"]
    prompts = [len(ids) for ids in json.loads((folder / "prompt_ids.json").read_text())]
    drafted = by_prompt(found[name]["blocks"], prompts)
    for blocks, wanted, length in zip(drafted, measured[name]["blocks"], prompts, strict=True):
        assert blocks[: len(wanted)] == wanted
        # one more may be drafted behind the last token, of which nothing is used
        assert all(place - length + 1 >= LENGTH for place, _ in blocks[len(wanted) :])


@pytest.mark.parametrize("name", WHOLE)
def test_counts_are_the_measured_ones(name, served):
    folder, measured, found = served
    assert found[name]["accepted_per_position"] == measured[name]["reference"]
    assert not [x for x in check_draft(folder / name) if x.level != "note"]
    if "own" not in name:  # there vLLM on a CPU runs another draft than a GPU, and than we
        harness.assert_counts_equal(found[name], measured[name])
    if name.startswith("taught"):  # what keeps this test strong: a draft that is right at several positions
        assert measured[name]["drafts"] > measured[name]["accepted_per_position"][1] > 0


def test_key_norms_of_their_own_are_known_to_the_check(served):
    folder, measured, found = served
    said = {name: any("on a CPU alone" in x.text for x in check_draft(folder / name)) for name in WHOLE}
    assert said == {name: "own" in name for name in WHOLE}


@pytest.mark.parametrize("name", SILENT)
def test_what_vllm_takes_silently_is_a_fault_of_the_check(name, served):
    """It starts, answers as the target does, and drafts something else."""
    folder, measured, found = served
    assert found[name]["token_ids"] == measured["answers"]
    assert found[name]["blocks"] != found["taught"]["blocks"]
    assert found[name]["accepted_tokens"] < measured["taught"]["accepted_tokens"]
    assert any(SILENT[name] in x.text and x.level == "fault" for x in check_draft(folder / name))


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_refuses_is_a_fault_of_the_check(name, served):
    folder, _, found = served
    assert "refused" in found[name]
    assert any(REFUSED[name] in x.text and x.level == "fault" for x in check_draft(folder / name))
