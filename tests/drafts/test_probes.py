"""A probe undoes one fault exactly, and leaves the draft that it is tried on as it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import SCALED, flag, permute_head, reorder, rotate, shift, swap
from tiny import tiny_eagle1_pair, tiny_llama, tiny_mapping, tiny_pair
from tiny_blocks import options_of, shaken
from torch import nn

from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.dflash.configuration import config_for
from hf_eagle.drafts.probes import resembled_ids
from hf_eagle.targets.target import FrozenTarget


def with_targets_head(target, draft):
    """A head that was trained from the target's: it still resembles that."""
    rows = target.head_weight() if draft.d2t is None else target.head_weight()[draft.draft_ids]
    draft.lm_head.weight = nn.Parameter(rows + 0.02 * torch.randn_like(rows))
    return target, draft


def eagle3(**fields):
    return with_targets_head(*tiny_pair(tap_ids=[1, 4, 6], **fields))


def scaled():
    target = FrozenTarget(tiny_llama(rope_parameters=SCALED), tap_ids=[1, 4, 6])
    _, draft = eagle3(rope_parameters=SCALED)
    return target, draft


def dflash(**options):
    target = FrozenTarget(tiny_llama())
    given = {"mask_token_id": 5, "block_size": 4, "draft_num_layers": 2, "tap_ids": [1, 4, 6], **options}
    config = config_for(target.config, options_of(**given), initializer_range=0.2)
    target.tap_ids = config.tap_ids
    return target, shaken(new_draft(config, target.embedding_weight(), head_weight=target.head_weight()))


PAIRS = {
    "eagle1": tiny_eagle1_pair,
    "eagle3": eagle3,
    "eagle3, whole vocabulary": lambda: eagle3(draft_vocab_size=None),
    "eagle3.1": lambda: eagle3(fc_norm=True, norm_output=True),
    "eagle3, scaled": scaled,
    "dflash": dflash,
    "dflash, shared norm": lambda: dflash(share_k_norm=True),
}


def other_mapping(draft):
    """The mapping of another run of the same size."""
    draft.set_vocabulary(tiny_mapping(40, seed=9))


LAYER = "midlayer"
FAULTS = [
    ("eagle1", "fc_halves", reorder("fc", (1, 0))),
    ("eagle1", "rope_base", rotate(rope_theta=500_000.0)),
    ("eagle3", "tap_order", reorder("fc", (2, 0, 1))),
    ("eagle3", "tap_ids", shift(1)),
    ("eagle3", "tap_ids", shift(-1)),
    ("eagle3", "rope_base", rotate(rope_theta=1_000_000.0)),
    ("eagle3", "rope_scaling", lambda draft: draft.rotate_by(SCALED)),
    ("eagle3, scaled", "rope_scaling", lambda draft: draft.rotate_by({"rope_type": "default", "rope_theta": 10000.0})),
    ("eagle3", "norms", swap((f"{LAYER}.input_layernorm", f"{LAYER}.hidden_norm"))),
    ("eagle3", "norms", swap(("norm", f"{LAYER}.post_attention_layernorm"))),
    ("eagle3", "norm_output", flag("norm_output", True)),
    ("eagle3.1", "norm_output", flag("norm_output", False)),
    ("eagle3", "head_rows", permute_head),
    ("eagle3", "head_rows", other_mapping),
    ("eagle3, whole vocabulary", "head_rows", permute_head),
    ("dflash", "tap_order", reorder("fc", (0, 2, 1))),
    ("dflash", "tap_ids", shift(1)),
    ("dflash", "rope_base", rotate(rope_theta=500_000.0)),
    ("dflash", "norms", swap(("norm", "hidden_norm"))),
    ("dflash", "norms", swap(*((f"layers.{n}.self_attn.q_norm", f"layers.{n}.self_attn.k_norm") for n in (0, 1)))),
    (
        "dflash",
        "norms",
        swap(*((f"layers.{n}.input_layernorm", f"layers.{n}.post_attention_layernorm") for n in (0, 1))),
    ),
]


def state(draft):
    """All that a draft computes with: tensors, RoPE and fields."""
    tensors = {name: x.clone() for name, x in draft.state_dict().items()}
    fields = {name: x for name, x in draft.config.to_diff_dict().items() if name not in ("architectures", "dtype")}
    return tensors | {"inv_freq": draft.rotary_emb.inv_freq.clone()}, fields | {"taps": list(draft.config.tap_ids)}


def same(one, other):
    (tensors, fields), (others, other_fields) = one, other
    equal = tensors.keys() == others.keys() and all(torch.equal(x, others[name]) for name, x in tensors.items())
    return equal and fields == other_fields


@pytest.mark.parametrize(("pair", "cause", "plant"), FAULTS, ids=[f"{pair}: {cause}" for pair, cause, _ in FAULTS])
def test_a_probe_undoes_each_fault(pair, cause, plant):
    target, draft = PAIRS[pair]()
    sound = state(draft)
    plant(draft)
    faulty = state(draft)
    assert not same(sound, faulty)

    target.tap_ids = draft.config.tap_ids
    changed = [(probe, probe.changed(draft)) for probe in draft.probes(target)]
    undone = [probe for probe, other in changed if same(state(other), sound)]
    assert [probe.cause for probe in undone] == [cause]
    assert undone[0].tap_ids == (sound[1]["taps"] or None if cause == "tap_ids" else None)
    assert same(state(draft), faulty), "a probe changed the draft itself"


@pytest.mark.parametrize("pair", PAIRS)
def test_every_probe_changes_something_and_can_be_saved(pair, tmp_path):
    target, draft = PAIRS[pair]()
    target.tap_ids = draft.config.tap_ids
    sound, seen = state(draft), set()
    for number, probe in enumerate(draft.probes(target)):
        other = probe.changed(draft)
        assert not same(state(other), sound), probe.change
        assert probe.change not in seen
        seen.add(probe.change)

        other.save_pretrained(tmp_path / str(number))
        again = type(draft).from_pretrained(tmp_path / str(number))
        kept = set(other.state_dict()) - other.lent_tensors
        assert all(torch.equal(again.state_dict()[name], other.state_dict()[name]) for name in kept)
    assert same(state(draft), sound)


def test_a_head_in_its_order_and_one_without_resemblance():
    target, draft = eagle3()
    assert "head_rows" not in [probe.cause for probe in draft.probes(target)]
    draft.lm_head.weight = nn.Parameter(torch.randn_like(draft.lm_head.weight))
    probe = next(probe for probe in draft.probes(target) if probe.cause == "head_rows")
    probe.changed(draft).check_vocabulary()  # whatever the rows say, it is a mapping


def test_a_base_that_was_named_is_tried():
    target, draft = eagle3()
    assert "a RoPE base of 12,345" in [probe.change for probe in draft.probes(target, bases=(12345,))]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), vocabulary=st.integers(2, 30), noise=st.floats(0, 3))
def test_rows_get_different_tokens_whatever_they_resemble(data, vocabulary, noise):
    rows = data.draw(st.integers(1, vocabulary))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    theirs = nn.functional.normalize(torch.randn(vocabulary, 16, generator=generator), dim=-1)
    truth = torch.randperm(vocabulary, generator=generator)[:rows]
    told = torch.randperm(vocabulary, generator=generator)[:rows]
    own = nn.functional.normalize(theirs[truth] + noise * torch.randn(rows, 16, generator=generator), dim=-1)
    found = resembled_ids(own, theirs, told)
    assert len(found.unique()) == rows and 0 <= int(found.min()) <= int(found.max()) < vocabulary
    if noise == 0:
        assert torch.equal(found, truth)
