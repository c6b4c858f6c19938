"""The draft's one-forward unroll, masks, losses, accuracies and gradients against the row-by-row reference."""

import pytest
import torch
from reference import ReferenceDraft, reference_loss
from tiny import pad_batch, random_chats, tiny_llama, tiny_mapping, tiny_pair, unrolled

from hf_eagle.drafts import ttt_attention
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.eagle3.configuration import EagleConfig
from hf_eagle.losses.objectives import DraftObjective
from hf_eagle.losses.supervision import SupervisionPlan, supervised_steps
from hf_eagle.targets.target import FrozenTarget


STEPS = 4


# unequal, so that a step in the wrong place shows
WEIGHTS = torch.tensor([1.0, 0.7, 0.4, 0.2])


def unroll(target, draft, batch, supervision="serving", documents=None, position_ids=None, **objective):
    """What the trainer does with a batch, without a trainer."""
    labels = torch.zeros_like(batch["input_ids"]) if documents is None else documents
    labels = labels.masked_fill(batch["attention_mask"] == 0, -1)
    plan = SupervisionPlan.of(supervised_steps(batch["loss_mask"], labels, STEPS, supervision))
    features = target(batch["input_ids"], batch["attention_mask"])
    teacher = target.distribution(
        features.last_hidden.flatten(0, 1)[plan.positions], draft.draft_ids, with_mass=True, chunk=7
    )
    output = unrolled(
        draft,
        batch["input_ids"],
        features.taps,
        rows=plan.rows,
        num_steps=STEPS,
        objective=DraftObjective(**objective).bind(plan, teacher, WEIGHTS),
        attention_mask=batch["attention_mask"],
        documents=documents,
        position_ids=position_ids,
    )
    return output, plan.counts


def gradients(draft, loss):
    draft.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in draft.named_parameters() if p.requires_grad}


def assert_equal_to_reference(target, draft, records, side="right", reference=ReferenceDraft, **kinds):
    output, counts = unroll(target, draft, pad_batch(records, side), **kinds)
    sums, correct, rows = reference_loss(draft, target.model, records, STEPS, reference=reference, **kinds)
    assert counts.tolist() == rows and rows[-1] > 0
    assert output.correct.tolist() == correct
    torch.testing.assert_close(output.loss_sums, sums, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, WEIGHTS @ sums, rtol=2e-5, atol=1e-5)
    ours, theirs = gradients(draft, output.loss), gradients(draft, WEIGHTS @ sums)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("supervision", ["serving", "reference"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("draft_vocab_size", [40, None])
def test_unroll_equals_the_reference(supervision, side, draft_vocab_size):
    target, draft = tiny_pair(draft_vocab_size)
    assert_equal_to_reference(target, draft, random_chats(4, seed=3), side, supervision=supervision)


@pytest.mark.parametrize("loss", ["ce", "lk_alpha", "lk_lambda"])
@pytest.mark.parametrize("oov_rows", ["mask", "renormalize"])
def test_losses_equal_the_reference(loss, oov_rows):
    target, draft = tiny_pair(24, seed=5)
    assert_equal_to_reference(target, draft, random_chats(3, seed=1), loss=loss, oov_rows=oov_rows)


@pytest.mark.parametrize(
    "fields",
    [
        {"tap_ids": [0, 3, 5, 7]},
        {"fc_norm": True},
        {"norm_output": True},
        {"fc_norm": True, "norm_output": True, "tap_ids": [1, 2, 4, 6]},
    ],
)
def test_taps_and_eagle31_equal_the_reference(fields):
    target, draft = tiny_pair(**fields)
    assert_equal_to_reference(target, draft, random_chats(3, seed=2))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (2, 2)])
def test_head_layouts_equal_the_reference(heads, kv_heads):
    target = FrozenTarget(tiny_llama(heads=heads, kv_heads=kv_heads))
    config = EagleConfig.from_target(target.config, 40, initializer_range=0.2)
    target.tap_ids = config.tap_ids
    draft = new_draft(config, target.embedding_weight(), tiny_mapping())
    assert (draft.config.num_attention_heads, draft.config.num_key_value_heads) == (heads, kv_heads)
    assert_equal_to_reference(target, draft, random_chats(2, seed=4))


def test_unrolling_all_rows_changes_nothing():
    """Rows without supervision are dropped because that is exact."""
    target, draft = tiny_pair()
    batch = pad_batch(random_chats(3, seed=6))
    features = target(batch["input_ids"], batch["attention_mask"])
    keys = {"num_steps": STEPS, "attention_mask": batch["attention_mask"]}
    every = unrolled(draft, batch["input_ids"], features.taps, **keys).hidden_states
    rows = torch.tensor([3, 4, 9, batch["input_ids"].shape[1] + 5])
    some = unrolled(draft, batch["input_ids"], features.taps, rows=rows, **keys).hidden_states
    for step in range(STEPS):
        torch.testing.assert_close(some[step], every[step][rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("setting", ["eager", "gradient_checkpointing", "whole_projections"])
def test_other_ways_to_compute_it_equal_the_default(setting, monkeypatch):
    target, draft = tiny_pair(norm_output=True)
    batch = pad_batch(random_chats(4, seed=8), side="left")
    output, _ = unroll(target, draft.train(), batch)
    wanted = gradients(draft, output.loss)
    if setting == "eager":
        draft.set_attn_implementation("eager")
        monkeypatch.setattr(ttt_attention, "flash_ttt_attention", None)  # so that it cannot be what runs
    elif setting == "gradient_checkpointing":
        draft.gradient_checkpointing_enable()
    else:  # as under an adapter, which is no plain linear layer
        attention = draft.midlayer.self_attn
        for name in ("q_proj", "v_proj"):
            setattr(attention, name, Wrapped(getattr(attention, name)))
    other, _ = unroll(target, draft, batch)
    torch.testing.assert_close(other.loss, output.loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(draft, other.loss).items():
        torch.testing.assert_close(gradient, wanted[name.replace("wrapped.", "")], rtol=1e-4, atol=1e-5)


class Wrapped(torch.nn.Module):
    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x):
        return self.wrapped(x)


def test_gradient_checkpointing_keeps_less_for_the_backward_pass():
    target, draft = tiny_pair()
    batch = pad_batch(random_chats(4, seed=8))
    kept = []
    for switch in (draft.gradient_checkpointing_disable, draft.gradient_checkpointing_enable):
        switch()
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, n=numbers: n.append(x.numel()) or x, lambda x: x):
            unroll(target, draft.train(), batch)
        kept.append(sum(numbers))
    assert kept[1] < 0.5 * kept[0]


def test_packed_documents_do_not_see_each_other():
    """Two conversations side by side in one row equal the same two padded, given their ids and positions."""
    target, draft = tiny_pair()
    records = random_chats(2, seed=7)
    padded, counts = unroll(target, draft, pad_batch(records))
    features = [target(torch.tensor([r["input_ids"]])) for r in records]

    packed = pad_batch([{name: records[0][name] + records[1][name] for name in ("input_ids", "loss_mask")}])
    lengths = [len(r["input_ids"]) for r in records]
    documents = torch.tensor([[0] * lengths[0] + [1] * lengths[1]])
    plan = SupervisionPlan.of(supervised_steps(packed["loss_mask"], documents, STEPS))
    hidden = torch.cat([f.last_hidden for f in features], 1).flatten(0, 1)
    teacher = target.distribution(hidden[plan.positions], draft.draft_ids)
    output = unrolled(
        draft,
        packed["input_ids"],
        torch.cat([f.taps for f in features], 1),
        rows=plan.rows,
        num_steps=STEPS,
        objective=DraftObjective().bind(plan, teacher, WEIGHTS),
        documents=documents,
        position_ids=torch.tensor([[*range(lengths[0]), *range(lengths[1])]]),
    )
    assert plan.counts.tolist() == counts.tolist()
    torch.testing.assert_close(output.loss_sums, padded.loss_sums, rtol=1e-5, atol=1e-5)


def test_a_batch_without_supervision_touches_every_parameter():
    target, draft = tiny_pair(fc_norm=True)
    batch = pad_batch(random_chats(2))
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    output, counts = unroll(target, draft, batch)
    assert counts.tolist() == [0] * STEPS
    for name, gradient in gradients(draft, output.loss).items():
        assert gradient is not None and not gradient.any(), name


def test_decoding_with_a_cache_equals_the_unroll():
    """Feeding a draft its own output through `decode` gives what training unrolled for that row."""
    from transformers import DynamicCache

    for fields in ({}, {"fc_norm": True, "norm_output": True}):
        target, draft = tiny_pair(**fields)
        ids = torch.randint(3, 96, (1, 20))
        features = target(ids)
        row = 11
        trained = unrolled(draft, ids, features.taps, rows=torch.tensor([row]), num_steps=STEPS).hidden_states

        cache = DynamicCache()
        hidden, tokens, positions = draft.combine_features(features.taps)[:, : row + 1], ids[:, 1 : row + 2], None
        positions = torch.arange(row + 1)[None]
        for step in range(STEPS):
            normed, feedback = draft.decode(tokens, hidden, positions, cache)
            torch.testing.assert_close(normed[0, -1:], trained[step], rtol=1e-4, atol=1e-5)
            hidden, tokens = feedback[:, -1:], ids[:, row + 2 + step][None]
            positions = torch.tensor([[row + 1 + step]])
