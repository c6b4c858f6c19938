"""Rows that are drawn from a document: how many, where, when again, and what their loss is."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import pad_batch, random_chats, tiny_pair

from hf_eagle.drafts.drawn_rows import draw_apart, draw_together
from hf_eagle.drafts.eagle3.training import Eagle3Training
from hf_eagle.drafts.training_base import Draw
from hf_eagle.drafts.unroll_plan import UnrollPlan
from hf_eagle.losses.objectives import DraftObjective
from hf_eagle.losses.supervision import SupervisionPlan


def grid(lengths, seed):
    """Documents side by side in one row: their tokens, their ids, and which tokens may be drawn."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (1, sum(lengths)), generator=generator)
    documents = torch.cat([torch.full((1, length), n) for n, length in enumerate(lengths)], 1)
    return ids, documents, torch.rand(ids.shape, generator=generator) < 0.7


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), most=st.integers(1, 12), seed=st.integers(0, 999))
def test_of_each_document_so_many_are_kept_and_those_together_leave_none_out(lengths, most, seed):
    ids, documents, candidates = grid(lengths, seed)
    for draw in (draw_apart, draw_together):
        kept = draw(ids, documents, candidates, most, Draw(seed))
        assert not (kept & ~candidates).any()
        for document in range(len(lengths)):
            inside = documents == document
            chosen = kept[inside & candidates]
            if len(chosen) <= most:
                assert chosen.all()
            elif draw is draw_apart:
                assert chosen.sum() == most
            else:
                first, last = chosen.nonzero()[:, 0].aminmax()
                assert chosen[first : last + 1].all() and chosen.sum() <= most
                assert chosen.sum() == most or chosen[0] or chosen[-1]


@pytest.mark.parametrize("draw", [draw_apart, draw_together])
def test_an_epoch_draws_anew_and_a_document_alone_as_among_others(draw):
    ids, documents, candidates = grid([25, 30], seed=1)
    once, again, later = (draw(ids, documents, candidates, 5, Draw(7, epoch)) for epoch in (0, 0, 1))
    assert torch.equal(once, again) and not torch.equal(once, later)
    alone = draw(ids[:, 25:], documents[:, 25:], candidates[:, 25:], 5, Draw(7))
    assert torch.equal(alone, once[:, 25:])


@pytest.mark.parametrize("draw", [draw_apart, draw_together])
def test_every_row_is_as_likely_as_any_other(draw):
    ids, documents, _ = grid([20], seed=2)
    everything = torch.ones_like(documents, dtype=torch.bool)
    seeds = range(4000)
    drawn = sum(draw(ids, documents, everything, 6, Draw(seed)).long() for seed in seeds)
    share = 6 / 20 if draw is draw_apart else 6 / 25  # a run begins at one of 25 places
    expected = len(seeds) * share
    assert (drawn - expected).abs().max() < 5 * (expected * (1 - share)) ** 0.5


@pytest.mark.parametrize("window", [None, 9])
def test_rows_that_are_drawn_have_the_loss_that_they_have_among_all(window):
    target, draft = tiny_pair(draft_sliding_window=window)
    batch = pad_batch(random_chats(3, seed=5, longest=60), side="left")
    training = Eagle3Training(DraftObjective(), num_steps=4, window=window, loss_window=5)
    features = target(batch["input_ids"], batch["attention_mask"])

    plan, whole = training.plan(batch, Draw(3)), UnrollPlan.of(batch, 4, window=window)
    assert len(plan.layout.rows) < len(whole.layout.rows) and len(plan.layout.keys) < len(whole.layout.keys)
    among = torch.isin(whole.layout.rows, plan.layout.rows)
    apart = replace(whole, supervised=judged(whole.supervised, among))

    found = []
    for each in (plan, apart):
        lesson = training.teach(target, draft, features, each, training.step_factors(plan.counts), torch.float32)
        output = draft(batch["input_ids"], lesson.features, each, lesson.objective)
        draft.zero_grad()
        output.loss.backward()
        found.append((output.loss_sums, [p.grad.clone() for p in draft.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def judged(supervised: SupervisionPlan, rows: torch.Tensor) -> SupervisionPlan:
    """The same plan, in which only some of its rows count."""
    return replace(supervised, counted=supervised.counted & rows, indices=None)
