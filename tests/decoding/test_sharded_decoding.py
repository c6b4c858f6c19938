"""Ranks that hold one target between them decode together: the same answers on each, whatever their last bits are."""

import json

import pytest
from tiny import tiny_llama
from workers import run_worker


MODES = ["fsdp2", "tensor"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("decoding")
    tiny_llama().save_pretrained(out / "model")
    run_worker(out, ranks=2, worker="decoding_worker.py", model=str(out / "model"), modes=MODES)
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("mode", MODES)
def test_ranks_answer_as_one_process_does(mode, results):
    for rank in results["ranks"][mode]:
        assert rank["as loaded"] == results["alone"]
    drawn = {way: answers for way, answers in results["alone"].items() if "drawn" in way}
    assert all(answers != results["alone"][way.removesuffix(", drawn")] for way, answers in drawn.items())


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_that_rounds_in_another_way_follows_the_first(mode, results):
    for rank in results["ranks"][mode]:
        assert rank["rounded in two ways"] == results["alone"]


@pytest.mark.parametrize("mode", MODES)
def test_drawing_without_a_generator_is_refused_on_every_rank(mode, results):
    for rank in results["ranks"][mode]:
        assert [said.split(":")[0] for said in rank["refused"]] == ["alone", "chain", "tree"]
        assert all("`generator` is None and `temperature` is 0.8" in said for said in rank["refused"])
