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
from tiny_blocks import options_of

from hf_eagle.drafts.dflash import configuration, modeling
from hf_eagle.drafts.dflash import plan as plan_module
from hf_eagle.drafts.dflash.attention import eager_block_attention
from hf_eagle.drafts.dflash.configuration import check_layers
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


# ---- taps that readers norm differently ----


def _unlike_the_layers_output(target, batch) -> list[int]:
    """Layers that a draft may tap, and whose tap is not what comes out of them."""
    layers, outputs = target.parts.layers, []
    hooks = [layer.register_forward_hook(lambda module, args, out: outputs.append(out)) for layer in layers]
    taps, found = target.tap_ids, []
    try:
        with torch.no_grad():
            states = target.model(**batch, output_hidden_states=True).hidden_states
    finally:
        for hook in hooks:
            hook.remove()

    for number, output in enumerate(outputs):
        try:
            config = configuration.config_for(target.config, options_of(tap_ids=[number + 1]))
        except ValueError:
            continue
        (tap,) = config.tap_ids
        if not torch.equal(states[tap], output):
            found.append(number)
    target.tap_ids = taps
    return found


def test_no_tap_is_behind_the_final_norm(pair, monkeypatch):  # noqa: F811
    """`hidden_states[N]` of transformers is, though vLLM taps that layer before it."""
    target, _ = pair
    batch, _ = batch_of("right")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert _unlike_the_layers_output(target, batch) == []

    def forgetful(layers, num_layers):
        check_layers(layers, None)

    monkeypatch.setattr(configuration, "check_layers", forgetful)
    assert _unlike_the_layers_output(target, batch) == [len(target.parts.layers) - 1]


# ---- which blocks there are ----


def _from_the_prompt(answered):
    return answered | answered.roll(-1, 1)


def _past_the_end(answered):
    return answered | answered.roll(1, 1)


def _without_the_end(answered):
    return answered & answered.roll(-1, 1)


def _as_planned(answered):
    return answered


def _every_block_is_the_references(pair, reference, fault=_as_planned) -> bool:  # noqa: F811
    """Of all anchors that the data have: an anchor is answered, and so is the token behind it."""
    target, draft = pair
    batch, _ = batch_of("right")
    step = TrainingStep(target, training(anchors=99))
    plan = step.plan({**batch, "loss_mask": fault(batch["loss_mask"].bool()).long()})
    draft.train().zero_grad()
    output, _ = step(draft, batch | {"plan": plan})
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in draft.named_parameters() if p.requires_grad}

    masks = [chat["loss_mask"] for chat in CHATS]
    anchors = [torch.tensor([a for a in range(1, len(m) - 1) if m[a] and m[a + 1]], dtype=torch.long) for m in masks]
    return equal((output, gradients), by_reference(pair, reference, CHATS, anchors))


@pytest.mark.parametrize("fault", [_from_the_prompt, _past_the_end, _without_the_end])
def test_blocks_that_begin_or_end_elsewhere_are_caught(pair, reference, fault):  # noqa: F811
    """Anchors begin with the answer, not with the prompt's last token, and the answer's last token is a label."""
    assert _every_block_is_the_references(pair, reference)
    assert not _every_block_is_the_references(pair, reference, fault)


def test_an_anchor_in_an_answer_of_one_token_is_caught(pair, reference, monkeypatch):  # noqa: F811
    assert any(mask[a - 1 : a + 2] == [0, 1, 0] for mask in (x["loss_mask"] for x in CHATS) for a in range(len(mask)))
    steps = plan_module.supervised_steps

    def with_single_tokens(loss_mask, documents, num_steps):
        counted = steps(loss_mask, documents, num_steps)
        counted[0, :, :-2] |= loss_mask[:, 1:-1].bool()
        return counted

    monkeypatch.setattr(plan_module, "supervised_steps", with_single_tokens)
    assert not _every_block_is_the_references(pair, reference)


def test_answers_of_one_token_alone_have_no_block_and_no_loss(pair):  # noqa: F811
    target, draft = pair
    batch, _ = batch_of("right")
    batch["loss_mask"] = (torch.arange(batch["input_ids"].shape[1]) % 3 == 1).long().expand_as(batch["input_ids"])
    step = TrainingStep(target, training())
    plan = step.plan(batch)
    draft.train().zero_grad()
    output, _ = step(draft, batch | {"plan": plan})
    output.loss.backward()
    assert plan.layout.rows == 0 and output.loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in draft.parameters() if p.requires_grad)
