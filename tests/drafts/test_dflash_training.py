"""Training of a DFlash draft: loss and gradients are those of an independent reference, and nothing leaks."""

from dataclasses import replace

import pytest
import reference_dflash
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import pad_batch, random_chats
from tiny_blocks import MASK, tiny_block_pair

from hf_eagle.data.collators import EagleDataCollator
from hf_eagle.data.packing import pack_dataset
from hf_eagle.drafts.dflash import modeling
from hf_eagle.drafts.dflash.plan import BlockLayout, BlockPlan
from hf_eagle.drafts.dflash.training import BlockObjective, DFlashTraining
from hf_eagle.drafts.training_base import Draw
from hf_eagle.training.step import TrainingStep


SIZE, GAMMA, ANCHORS = 5, 2.0, 6
LOSSES = ("ce", "label", "dpace")
CHATS = random_chats(5, seed=4)


@pytest.fixture(scope="module")
def pair():
    return tiny_block_pair(draft_num_layers=2)


@pytest.fixture(scope="module")
def reference(pair, tmp_path_factory):
    """The same draft, read from its folder by the reference."""
    folder = tmp_path_factory.mktemp("draft")
    pair[1].save_pretrained(folder)
    return reference_dflash.Draft.load(folder)


def training(loss="ce", anchors=ANCHORS, mask=MASK):
    return DFlashTraining(BlockObjective(loss), SIZE, anchors, mask, GAMMA)


def batch_of(form: str, chats=CHATS):
    """The chats as a batch, and for each the row and column that it begins at."""
    if form in ("right", "left"):
        batch = pad_batch(chats, form)
        lengths = [len(chat["input_ids"]) for chat in chats]
        width = batch["input_ids"].shape[1]
        return batch, [(row, 0 if form == "right" else width - n) for row, n in enumerate(lengths)]

    batch = EagleDataCollator(pad_token_id=0)(list(pack_dataset(Dataset.from_list(chats), 60)))
    places = []
    for chat in chats:
        ids = torch.tensor(chat["input_ids"])
        windows = batch["input_ids"].unfold(1, len(ids), 1)
        places.append(tuple((windows == ids).all(-1).nonzero()[0].tolist()))
    return batch, places


def ours(pair, batch, loss="ce", total=None, draft=None):
    """Loss and gradients of a batch, and its plan."""
    target, own = pair
    draft, step = own if draft is None else draft, TrainingStep(target, training(loss))
    draft.train().zero_grad()
    plan = step.plan(batch)
    output, _ = step(draft, batch | {"plan": plan}, total=total)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in draft.named_parameters() if p.requires_grad}, plan


def anchors_of(plan, chats, places, width):
    """The anchors that were drawn in each chat, counted from its beginning."""
    flat = plan.layout.anchors
    found = [flat - (row * width + column) for row, column in places]
    return [x[(x >= 0) & (x < len(chat["input_ids"]))] for x, chat in zip(found, chats, strict=True)]


def by_reference(pair, reference, chats, anchors, loss="ce"):
    """What the reference makes of all chats: the weighted mean of all slots, and its gradients."""
    target = pair[0]
    embed, head = target.embedding_weight(), target.head_weight()
    reference.train().zero_grad()
    sums = []
    for chat, places in zip(chats, anchors, strict=True):
        if len(places):
            ids, supervised = torch.tensor(chat["input_ids"]), torch.tensor(chat["loss_mask"]).bool()
            features, last = reference_dflash.target_features(target.model.model, ids, reference.taps)
            given = (embed, head, ids, features, last, supervised, places, SIZE, GAMMA, loss)
            sums.append(torch.stack(reference_dflash.training_loss(reference, *given)))
    value, weight = torch.stack(sums).sum(0)
    (value / weight).backward()
    return (value / weight).detach(), {name: p.grad.clone() for name, p in reference.named_parameters()}


def equal(found, wanted) -> bool:
    loss, gradients = found[0].loss.detach(), found[1]
    if not torch.allclose(loss, wanted[0], rtol=1e-5, atol=1e-6):
        return False
    assert set(gradients) == set(wanted[1])
    return all(
        torch.allclose(gradients[n], g, rtol=1e-4, atol=1e-5 * float(g.abs().max())) for n, g in wanted[1].items()
    )


def compare(pair, reference, form="right", loss="ce", draft=None) -> bool:
    batch, places = batch_of(form)
    found = ours(pair, batch, loss, draft=draft)
    anchors = anchors_of(found[2], CHATS, places, batch["input_ids"].shape[1])
    return equal(found, by_reference(pair, reference, CHATS, anchors, loss))


# ---- equality ----


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["right", "left", "packed"])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_are_the_references(pair, reference, form, loss, attention):
    pair[1].set_attn_implementation(attention)
    assert compare(pair, reference, form, loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_they_are_those_of_slots_that_are_computed_one_by_one(pair, reference, loss):
    """Another text of the same: a block alone, behind a context that ends before its anchor."""
    target, _ = pair
    batch, places = batch_of("right")
    found = ours(pair, batch, loss)
    embed, head = target.embedding_weight(), target.head_weight()
    reference.train().zero_grad()

    value = weight = 0
    for chat, anchors in zip(CHATS, anchors_of(found[2], CHATS, places, batch["input_ids"].shape[1]), strict=True):
        ids, mask = torch.tensor(chat["input_ids"]), [*chat["loss_mask"], 0]
        features, last = reference_dflash.target_features(target.model.model, ids, reference.taps)
        for a in anchors.tolist():
            tokens = torch.tensor([ids[a]] + [MASK] * (SIZE - 1))
            seen = torch.ones(SIZE, a + SIZE, dtype=torch.bool)
            hidden = reference(embed[tokens], a + torch.arange(SIZE), features[:a], torch.arange(a), seen)
            logs = (hidden @ head.T).log_softmax(-1)

            live = next(k for k in range(SIZE) if k + 1 == SIZE or not mask[a + k + 1 :][:1] == [1])
            label = [-logs[k, ids[a + k]] for k in range(1, live + 1)]
            reach = [(1 + float(torch.exp(-x.detach()))) / 2 for x in label]
            for k in range(1, live + 1):
                soft = -((last[a + k - 1] @ head.T).softmax(-1) * logs[k]).sum()
                decay = torch.exp(torch.tensor(-(k - 1) / GAMMA))
                rest = sum(torch.tensor(reach[:j]).prod() for j in range(k, live + 1))
                value = value + {"ce": decay * soft, "label": decay * label[k - 1], "dpace": rest * label[k - 1]}[loss]
                weight = weight + (1 if loss == "dpace" else decay)

    (value / weight).backward()
    assert equal(found, ((value / weight).detach(), {name: p.grad for name, p in reference.named_parameters()}))


@pytest.mark.parametrize("loss", LOSSES)
def test_accumulated_batches_are_one(pair, loss):
    whole = ours(pair, batch_of("right")[0], loss)
    parts = [batch_of("right", chats)[0] for chats in (CHATS[:1], CHATS[1:])]
    found = [ours(pair, part, loss, total=whole[2].counts) for part in parts]
    assert float(sum(x[0].loss for x in found)) == pytest.approx(float(whole[0].loss), rel=1e-5)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(sum(x[1][name] for x in found), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"share_k_norm": True}, {"draft_num_layers": 3, "tap_ids": [1, 7]}])
def test_other_shapes_are_the_references_too(fields, tmp_path):
    pair = tiny_block_pair(**{"draft_num_layers": 2, **fields})
    pair[1].save_pretrained(tmp_path)
    reference = reference_dflash.Draft.load(tmp_path)
    if "share_k_norm" in fields:
        first, second = (layer.self_attn for layer in reference.layers)
        second.k_norm = first.k_norm
    assert compare(pair, reference)


def test_gradient_checkpointing_changes_nothing(pair):
    batch = batch_of("right")[0]
    plain = ours(pair, batch)
    pair[1].gradient_checkpointing_enable({"use_reentrant": False})
    repeated = ours(pair, batch)
    pair[1].gradient_checkpointing_disable()
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, repeated[1][name]), name


def test_bf16_is_close(pair):
    batch = batch_of("packed")[0]
    plain = ours(pair, batch)
    with torch.autocast("cpu", torch.bfloat16):
        low = ours(pair, batch)
    assert float(low[0].loss) == pytest.approx(float(plain[0].loss), rel=0.02)
    for name, gradient in plain[1].items():
        assert torch.cosine_similarity(gradient.flatten(), low[1][name].flatten(), dim=0) > 0.98, name


# ---- attention ----


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(1, 6)), min_size=1, max_size=4),
    st.integers(2, 6),
    st.integers(1, 300),
)
def test_all_forms_of_attention_are_one(documents, size, rows):
    """Any documents, blocks and chunks; `flex_attention` has no backward on a CPU."""
    torch.manual_seed(rows)
    ids = torch.cat([torch.full((n,), number) for number, (n, _) in enumerate(documents)])[None]
    starts = torch.tensor([n for n, _ in documents]).cumsum(0) - torch.tensor([n for n, _ in documents])
    anchors = torch.cat(
        [start + 1 + torch.randperm(n - 1)[:count] for start, (n, count) in zip(starts, documents, strict=True)]
    )
    layout = BlockLayout.of(size, anchors.sort().values, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_eagle.drafts.dflash.plan._ROWS", rows)
        given = [torch.randn(layout.rows, 4, 8), *(torch.randn(len(layout.keys), 2, 8) for _ in range(2))]
        given += [torch.randn(layout.rows, 2, 8) for _ in range(2)]
        results = []
        for name in ("eager", "sdpa"):
            leaves = [x.clone().requires_grad_() for x in given]
            out = modeling.block_attention(name, torch.device("cpu"))(*leaves, layout, 0.3)
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
            results.append([out.detach(), *(x.grad for x in leaves)])
        with torch.no_grad():
            flex = modeling.block_attention("flex_attention", torch.device("cpu"))(*given, layout, 0.3)

    for found, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flex, results[0][0], rtol=1e-5, atol=1e-5)


def test_the_cost_grows_with_the_anchors_and_not_with_the_length():
    """Rows, keys and scores that are held at once, of one long document."""
    for length in (512, 2048, 8192):
        ids = torch.randint(1, 90, (1, length))
        chat = {"input_ids": ids, "loss_mask": torch.ones_like(ids)}
        plan = BlockPlan.of(chat, 8, 64, Draw())
        assert plan.layout.rows == 8 * 64 and len(plan.layout.keys) < length and len(plan.labels) <= 7 * 64
        assert len(plan.layout.chunks) == 2


# ---- leaks ----


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["right", "packed"])
def test_no_logit_depends_on_the_anchors_features_or_on_what_is_behind_it(pair, form, attention):
    target, draft = pair
    draft.set_attn_implementation(attention)
    batch, _ = batch_of(form)
    step = TrainingStep(target, training())
    plan = step.plan(batch)
    seen = step.target_features(batch, plan)
    taps = seen.taps.detach().requires_grad_()
    hidden = draft.train()(batch["input_ids"], replace(seen, taps=taps), plan).hidden_states  # (slots, A, hidden)

    documents, width = plan.documents, batch["input_ids"].shape[1]
    for block, anchor in enumerate(plan.layout.anchors.tolist()):
        row, column = divmod(anchor, width)
        own = documents[row] == documents[row, column]
        wanted = torch.zeros(documents.shape, dtype=torch.bool)
        wanted[row] = own & (torch.arange(width) < column)
        (gradient,) = torch.autograd.grad(hidden[:, block].square().sum(), taps, retain_graph=True)
        assert torch.equal(gradient.abs().sum(-1) > 0, wanted)


# ---- which blocks ----


def test_anchors_begin_at_the_first_answer_token_and_slots_end_with_the_answer():
    #             prompt     answer      user  one  user   answer
    mask = [0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1]
    ids = torch.arange(1, 14)[None]
    plan = BlockPlan.of({"input_ids": ids, "loss_mask": torch.tensor([mask])}, 4, 99, Draw())
    assert plan.layout.anchors.tolist() == [3, 4, 5, 11]  # a turn of one token has none, nor has the last token
    slots = sorted(zip(plan.block.tolist(), plan.slot.tolist(), plan.labels.tolist(), strict=True))
    assert slots == [(0, 0, 5), (0, 1, 6), (0, 2, 7), (1, 0, 6), (1, 1, 7), (2, 0, 7), (3, 0, 13)]
    teachers = plan.supervised.positions[plan.where].tolist()
    assert [t + 2 for t in teachers] == plan.labels.tolist()  # the target's row before the slot's token
    assert plan.where.tolist() == sorted(plan.where.tolist())


def test_a_document_that_begins_with_an_answer_has_no_anchor_without_context():
    ids = torch.arange(1, 7)[None]
    plan = BlockPlan.of({"input_ids": ids, "loss_mask": torch.ones_like(ids)}, 3, 99, Draw())
    assert plan.layout.anchors.tolist() == [1, 2, 3, 4]


def test_what_is_drawn_of_a_chat_depends_on_nothing_beside_it():
    found = {}
    for form in ("right", "left", "packed"):
        batch, places = batch_of(form)
        plan = BlockPlan.of(batch, SIZE, 3, Draw(7, 2))
        found[form] = [x.tolist() for x in anchors_of(plan, CHATS, places, batch["input_ids"].shape[1])]
    assert found["right"] == found["left"] == found["packed"]
    assert max(map(len, found["right"])) == 3
    other = BlockPlan.of(batch_of("right")[0], SIZE, 3, Draw(7, 3))
    assert (
        other.layout.anchors.tolist() != BlockPlan.of(batch_of("right")[0], SIZE, 3, Draw(7, 2)).layout.anchors.tolist()
    )


def test_a_batch_without_an_anchor_touches_all_parameters(pair):
    silent = [{**chat, "loss_mask": [0] * len(chat["input_ids"])} for chat in CHATS]
    output, gradients, plan = ours(pair, batch_of("right", silent)[0])
    assert float(output.loss) == 0 and plan.layout.rows == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())


def test_a_mask_token_in_a_batch_is_refused():
    batch, _ = batch_of("right")
    token = int(batch["input_ids"][1, 2])
    # only a stream comes as far as this, and then the draft is trained with it
    told = f"`mask_token_id` is {token}, but the data hold that token, .* leave out the records .* or train a new draft"
    with pytest.raises(ValueError, match=told):
        training(mask=token).plan(batch, Draw())
    training(mask=0).plan(batch, Draw())  # padding is no data
    with pytest.raises(ValueError, match="^`mask_token_id` of this DFlash draft is unset"):
        training(mask=None).plan(batch, Draw())


# ---- what is logged ----


def test_the_estimate_counts_blocks_that_are_right_up_to_a_slot():
    """Of made-up logits: slot by slot what a server would accept, of the blocks that have the slot."""
    mask = [0, 0, 1, 1, 1, 1]
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    plan = BlockPlan.of({"input_ids": ids, "loss_mask": torch.tensor([mask])}, 4, 99, Draw())
    head = torch.nn.Linear(16, 16, bias=False)
    head.weight.data = torch.eye(16)
    head.transform = None
    #          anchors 2, 3, 4: the second slot of the first is wrong, its third right again
    said = [[6, 7, 8], [9, 8, 0], [8, 0, 0]]
    hidden = torch.nn.functional.one_hot(torch.tensor(said), 16).float().transpose(0, 1).clone()
    hidden[0, 1] = torch.nn.functional.one_hot(torch.tensor(7), 16)
    hidden[1, 0] = torch.nn.functional.one_hot(torch.tensor(2), 16)
    output = BlockObjective("label").bind(plan, None, torch.ones(3))(hidden, head)
    assert plan.counts.tolist() == [3, 2, 1]
    assert output.correct.tolist() == [3, 1, 1] and output.leading.tolist() == [3, 1, 0]
