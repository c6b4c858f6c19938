"""Faults that are planted in the training of a DFlash draft: each makes it differ from the reference."""

from dataclasses import replace

import pytest
import torch
from test_dflash_training import (  # noqa: F401 - fixtures too
    CHATS,
    SIZE,
    anchors_of,
    batch_of,
    by_reference,
    compare,
    equal,
    pair,
    reference,
    training,
)

from hf_eagle.drafts.dflash import modeling
from hf_eagle.drafts.dflash.attention import eager_block_attention
from hf_eagle.drafts.dflash.training import DFlashTraining
from hf_eagle.training.step import TrainingStep


def _later_context(plan, draft, monkeypatch):
    plan.layout.end += 1  # the anchor's own features


def _earlier_teacher(plan, draft, monkeypatch):
    plan.where -= 1
    plan.where.clamp_min_(0)


def _later_block(plan, draft, monkeypatch):
    plan.anchor_positions += 1


def _row_numbers_as_positions(plan, draft, monkeypatch):
    plan.key_positions = torch.arange(len(plan.key_positions))


def _causal_block(plan, draft, monkeypatch):
    def causal(query, key, value, own_key, own_value, layout, scaling):
        outs = []
        for last in range(1, SIZE + 1):  # row by row: with only the slots up to its own
            rows = torch.arange(layout.rows).view(-1, SIZE)[:, :last].flatten()
            part = replace(layout, size=last)
            out = eager_block_attention(query[rows], key, value, own_key[rows], own_value[rows], part, scaling)
            outs.append(out.unflatten(0, (-1, last))[:, -1])
        return torch.stack(outs, 1).flatten(0, 1)

    monkeypatch.setattr(modeling, "block_attention", lambda *_: causal)


def _normed_context(plan, draft, monkeypatch):
    def context(self, seen, cos_sin):
        return self.self_attn.key_value(self.self_attn.project_key_value(self.input_layernorm(seen)), cos_sin)

    monkeypatch.setattr(modeling.DFlashLayer, "context", context)


def _no_hidden_norm(plan, draft, monkeypatch):
    def combine_features(self, taps):
        return self.fc(taps) + 0 * self.hidden_norm.weight

    monkeypatch.setattr(modeling.DFlashDraftModel, "combine_features", combine_features)


def _other_eps(plan, draft, monkeypatch):
    monkeypatch.setattr(draft.norm, "variance_epsilon", 1.0)


def _slot_0_learns(plan, draft, monkeypatch):
    plan.slot -= 1
    plan.slot.clamp_min_(0)


@pytest.mark.parametrize(
    "fault",
    [
        *(_later_context, _earlier_teacher, _later_block, _row_numbers_as_positions, _causal_block),
        *(_normed_context, _no_hidden_norm, _other_eps, _slot_0_learns),
    ],
)
def test_a_planted_fault_is_caught(pair, reference, fault, monkeypatch):  # noqa: F811
    target, draft = pair
    draft.set_attn_implementation("eager")
    batch, places = batch_of("packed")
    step = TrainingStep(target, training())
    plan = step.plan(batch)
    anchors = anchors_of(plan, CHATS, places, batch["input_ids"].shape[1])
    fault(plan, draft, monkeypatch)
    plan.where_on_host = plan.where

    draft.train().zero_grad()
    output, _ = step(draft, batch | {"plan": plan})
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in draft.named_parameters() if p.requires_grad}
    assert not equal((output, gradients), by_reference(pair, reference, CHATS, anchors))


def test_taps_of_another_layer_are_caught(pair, reference):  # noqa: F811
    target, _ = pair
    taps = target.tap_ids
    try:
        target.tap_ids = [number + 1 for number in taps]
        assert not compare(pair, reference)
    finally:
        target.tap_ids = taps
    assert compare(pair, reference)


def test_a_mean_of_means_is_caught(pair, reference, monkeypatch):  # noqa: F811
    monkeypatch.setattr(
        DFlashTraining,
        "step_factors",
        lambda self, total, processes=1: self.step_weights / self.step_weights.sum() / total.clamp_min(1),
    )
    assert not compare(pair, reference)
