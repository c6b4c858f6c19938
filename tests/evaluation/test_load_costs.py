"""The model of costs: as many entries as a server would be measured with, and the arithmetic of rounds."""

import pytest

from hf_eagle.evaluation import load_costs
from hf_eagle.evaluation.load_costs import LOADS, modelled_speeds
from hf_eagle.evaluation.measurement import DecodingSettings
from hf_eagle.evaluation.prompts import Prompt
from hf_eagle.serving.schedule import told_model


LENGTHS = {1: 1.6, 4: 2.4}
SWEEP = [{"num_speculative_tokens": count, "acceptance_length": length} for count, length in LENGTHS.items()]


def prompts(contents=("w3 w4", "w3 w4 w5 w6", "w7 w8 w9")):
    return [Prompt([{"role": "user", "content": text}], None, number) for number, text in enumerate(contents)]


def test_speeds_follow_from_rounds(pair, tokenizer, monkeypatch):
    """A target that takes longer from 16 tokens on, and a draft that takes time by the token."""
    widths = []

    def seconds(width, drafted=0):
        widths.append(width)
        return max(1.0, width / 16) + 0.05 * drafted

    monkeypatch.setattr(load_costs, "seconds_alone", lambda target, rows: seconds(len(rows)))
    monkeypatch.setattr(
        load_costs, "seconds_of_round", lambda t, d, rows, count, s: seconds(len(rows) * (count + 1), count)
    )
    found = modelled_speeds(*pair, tokenizer, prompts(), SWEEP, DecodingSettings())
    assert [(x["batch_size"], x["num_speculative_tokens"]) for x in found] == [(n, k) for n in LOADS for k in (0, 1, 4)]
    (told,) = told_model({"modelled_speeds": found})
    assert told.endswith("1 to 5 requests: 4 tokens; 6 to 11: 1 token; from 12: no draft") and "model of costs" in told
    assert told_model({}) == []
    by = {(x["batch_size"], x["num_speculative_tokens"]): x for x in found}
    assert by[1, 4]["speedup"] == pytest.approx(2.4 / 1.2) and by[16, 4]["speedup"] == pytest.approx(2.4 / 5.2)
    assert all(by[n, 0]["speedup"] == 1 for n in LOADS)
    assert by[8, 1]["tokens_per_second"] == pytest.approx(8 * 1.6 / 1.05)


def test_rounds_are_timed(pair, tokenizer, monkeypatch):
    monkeypatch.setattr(load_costs, "LOADS", (1, 3))
    found = modelled_speeds(*pair, tokenizer, prompts(), SWEEP, DecodingSettings())
    assert len(found) == 6 and all(x["tokens_per_second"] > 0 and x["speedup"] > 0 for x in found)


def test_nothing_is_modelled_without_acceptance(pair, tokenizer):
    empty = [{"num_speculative_tokens": 1, "acceptance_length": None}]
    assert modelled_speeds(*pair, tokenizer, prompts(), empty, DecodingSettings()) == []
