"""The table of planted causes: a fault that changes the draft is planted in a copy, and what is missed stands out."""

import sys

import pytest
import torch
from tiny import tiny_pair
from warm_python import ROOT

from hf_eagle.diagnosis.case import Case
from hf_eagle.diagnosis.causes import CAUSES
from hf_eagle.drafts.probe import Probe


sys.path.insert(0, str(ROOT / "scripts" / "dev"))

from plant_causes import table  # noqa: E402
from planting.faults import FAULTS, lose_norm, permute_head, reorder, rotate  # noqa: E402


def test_every_fault_is_of_a_cause():
    assert {fault.cause for fault in FAULTS} <= set(CAUSES) and len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("change", [reorder(2, 1, 0), rotate(rope_theta=5.0), permute_head, lose_norm])
def test_a_fault_is_planted_in_a_copy(change):
    _, draft = tiny_pair()
    before = {name: x.clone() for name, x in draft.state_dict().items()}
    case = Case(Probe("", "", lambda draft: None).changed(draft), None)
    change(case.draft)
    assert all(torch.equal(x, before[name]) for name, x in draft.state_dict().items())
    changed = {name for name, x in case.draft.state_dict().items() if not torch.equal(x, before[name])}
    assert changed or case.draft.config.rope_parameters != draft.config.rope_parameters


def test_what_was_missed_stands_out():
    row = {"planted": "x", "cause": "tap_ids", "named": "tap_ids", "acceptance_length": 1.5, "foretold": 2.25}
    row |= {"bound": False, "sound": 2.25}
    found = table([row, row | {"named": None, "foretold": None}, row | {"cause": None, "named": None}])
    assert "| x | tap_ids | 1.500 | 2.250 | 2.250 |" in found
    assert "| x | **nothing found**, not tap_ids | 1.500 |  | 2.250 |" in found and found.count("nothing found |") == 1
