"""The EAGLE-1 draft's forward, its loss, accuracy and gradients against the row-by-row reference; feature noise."""

import pytest
import torch
from reference_eagle1 import ReferenceEagle1, last_hidden, reference_eagle1_loss
from tiny import VOCAB, pad_batch, random_chats, tiny_eagle1_pair, tiny_llama, unrolled
from tiny_families import SMALL
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, Qwen2Config, Qwen3Config

from hf_eagle.drafts.eagle1.training import FeatureObjective, add_feature_noise
from hf_eagle.drafts.training_base import HeadTeacher
from hf_eagle.losses import fused_head as fused_loss
from hf_eagle.losses.supervision import SupervisionPlan, supervised_steps


REGRESSION, CE = 0.7, 0.3  # unequal to the defaults and to each other
FACTOR = torch.tensor([0.4])


def forward(target, draft, batch, supervision="serving", documents=None, position_ids=None, features=None):
    """What the trainer does with a batch, without a trainer."""
    labels = torch.zeros_like(batch["input_ids"]) if documents is None else documents
    labels = labels.masked_fill(batch["attention_mask"] == 0, -1)
    plan = SupervisionPlan.of(supervised_steps(batch["loss_mask"], labels, 1, supervision))
    seen = target(batch["input_ids"], batch["attention_mask"]).last_hidden if features is None else features
    objective = FeatureObjective(REGRESSION, CE)
    teacher = HeadTeacher(seen.flatten(0, 1)[plan.positions], target.teacher_head(), torch.float32)
    output = unrolled(
        draft,
        batch["input_ids"],
        seen,
        rows=plan.rows,
        objective=objective.bind(plan, teacher, FACTOR),
        attention_mask=batch["attention_mask"],
        documents=documents,
        position_ids=position_ids,
    )
    return output, plan.counts


def gradients(draft, loss):
    draft.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in draft.named_parameters() if p.requires_grad}


def assert_equal_to_reference(target, draft, records, side="right", **kinds):
    supervision = kinds.get("supervision", "serving")
    output, counts = forward(target, draft, pad_batch(records, side), supervision)
    regression, ce, correct, rows = reference_eagle1_loss(draft, target.model, records, **kinds)
    assert counts.tolist() == [rows] and rows > 10
    assert output.correct.tolist() == [correct]
    close = {"rtol": 2e-5, "atol": 1e-5}
    torch.testing.assert_close(output.parts["regression_loss"][0], regression.detach(), **close)
    torch.testing.assert_close(output.parts["ce_loss"][0], ce.detach(), **close)
    wanted = REGRESSION * regression + CE * ce
    torch.testing.assert_close(output.loss_sums[0], wanted.detach(), **close)
    torch.testing.assert_close(output.loss, FACTOR[0] * wanted, **close)
    ours, theirs = gradients(draft, output.loss), gradients(draft, FACTOR[0] * wanted)
    assert ours.keys() == theirs.keys() and "fc.weight" in ours
    for name in ours:
        assert theirs[name].norm() > 0, name
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("supervision", ["serving", "reference"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("tied", [False, True])
def test_forward_equals_the_reference(supervision, side, tied):
    target, draft = tiny_eagle1_pair(tiny_llama(tied=tied))
    assert_equal_to_reference(target, draft, random_chats(4, seed=3), side, supervision=supervision)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (2, 2)])
def test_head_layouts_equal_the_reference(heads, kv_heads):
    target, draft = tiny_eagle1_pair(tiny_llama(heads=heads, kv_heads=kv_heads))
    assert (draft.config.num_attention_heads, draft.config.num_key_value_heads) == (heads, kv_heads)
    assert_equal_to_reference(target, draft, random_chats(3, seed=4))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config])
def test_targets_with_biases_and_other_norms_get_a_plain_llama_layer(config, tied):
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config(**SMALL, tie_word_embeddings=tied)).eval()
    target, draft = tiny_eagle1_pair(model)
    assert_equal_to_reference(target, draft, random_chats(3, seed=5), "left")


CAP, SCALE = 2.0, 0.25
TRANSFORMS = {
    "soft_cap": (Gemma2Config, {"final_logit_softcapping": CAP, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "multiplied": (CohereConfig, {"logit_scale": SCALE}),
    "divided": (GraniteConfig, {"logits_scaling": 1 / SCALE}),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_what_a_target_does_to_its_logits_is_done_to_the_drafts(kind):
    config, fields = TRANSFORMS[kind]
    torch.manual_seed(2)
    fields = SMALL | {"tie_word_embeddings": True} | fields
    target, draft = tiny_eagle1_pair(AutoModelForCausalLM.from_config(config(**fields)).eval())

    def transform(logits):
        return CAP * torch.tanh(logits / CAP) if kind == "soft_cap" else logits * SCALE

    assert_equal_to_reference(target, draft, random_chats(3, seed=6), transform=transform)
    hidden = torch.randn(5, 32)
    torch.testing.assert_close(draft.compute_logits(hidden), target.logits(hidden))


def test_a_perfect_draft_has_no_regression_and_the_targets_entropy():
    """The teacher is the head behind the very features that are compared: falsified ones show in both parts."""
    target, draft = tiny_eagle1_pair()
    batch = pad_batch(random_chats(3, seed=7))
    seen = target(batch["input_ids"], batch["attention_mask"]).last_hidden
    plan = SupervisionPlan.of(supervised_steps(batch["loss_mask"], batch["attention_mask"] - 1, 1))
    objective = FeatureObjective(REGRESSION, CE)
    truth = seen.flatten(0, 1)[plan.positions]
    bound = objective.bind(plan, HeadTeacher(truth, target.teacher_head(), torch.float32), FACTOR)
    output = bound(truth[plan.position_of[0]][None], draft.lm_head)
    p = target.logits(truth).softmax(-1)
    entropy = -(p * p.log()).sum(-1)[plan.position_of[0]].sum()
    assert output.parts["regression_loss"].item() == 0 and output.correct.tolist() == plan.counts.tolist()
    torch.testing.assert_close(output.parts["ce_loss"][0], entropy, rtol=1e-5, atol=1e-5)


def test_chunks_of_rows_change_nothing_and_no_tensor_of_all_rows_is_made(monkeypatch):
    target, draft = tiny_eagle1_pair()
    batch = pad_batch(random_chats(6, seed=8))
    whole, counts = forward(target, draft, batch)
    wanted = gradients(draft, whole.loss)
    monkeypatch.setattr(fused_loss, "CHUNK_ELEMENTS", 8 * VOCAB)
    monkeypatch.setattr(fused_loss, "BLOCK_ELEMENTS", 3 * VOCAB)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]
            sizes.extend(t.numel() // VOCAB for t in tensors if t.dim() > 1 and t.shape[-1] == VOCAB)
            return out

    features = target(batch["input_ids"], batch["attention_mask"]).last_hidden
    draft.zero_grad()
    with Sizes():
        output, _ = forward(target, draft, batch, features=features)
        output.loss.backward()
    assert counts.item() > 50
    assert max(size for size in sizes if size != draft.config.hidden_size) == 8  # the other is the head, transposed
    torch.testing.assert_close(output.loss, whole.loss)
    for name, parameter in draft.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("setting", ["eager", "gradient_checkpointing"])
def test_other_ways_to_compute_it_equal_the_default(setting):
    target, draft = tiny_eagle1_pair()
    batch = pad_batch(random_chats(4, seed=8), side="left")
    output, _ = forward(target, draft.train(), batch)
    wanted = gradients(draft, output.loss)
    if setting == "eager":
        draft.set_attn_implementation("eager")
    else:
        draft.gradient_checkpointing_enable()
    other, _ = forward(target, draft, batch)
    torch.testing.assert_close(other.loss, output.loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(draft, other.loss).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


def test_rows_that_are_not_asked_for_change_nothing():
    target, draft = tiny_eagle1_pair()
    batch = pad_batch(random_chats(3, seed=6))
    features = target(batch["input_ids"], batch["attention_mask"]).last_hidden
    every = unrolled(draft, batch["input_ids"], features, attention_mask=batch["attention_mask"]).hidden_states[0]
    rows = torch.tensor([3, 4, 9, batch["input_ids"].shape[1] + 5])
    some = unrolled(
        draft, batch["input_ids"], features, rows=rows, attention_mask=batch["attention_mask"]
    ).hidden_states[0]
    torch.testing.assert_close(some, every[rows], rtol=1e-5, atol=1e-5)


def test_packed_documents_do_not_see_each_other():
    target, draft = tiny_eagle1_pair()
    records = random_chats(2, seed=7)
    padded, counts = forward(target, draft, pad_batch(records))
    features = torch.cat([target(torch.tensor([r["input_ids"]])).last_hidden for r in records], 1)
    packed = pad_batch([{name: records[0][name] + records[1][name] for name in ("input_ids", "loss_mask")}])
    lengths = [len(r["input_ids"]) for r in records]
    output, packed_counts = forward(
        target,
        draft,
        packed,
        documents=torch.tensor([[0] * lengths[0] + [1] * lengths[1]]),
        position_ids=torch.tensor([[*range(lengths[0]), *range(lengths[1])]]),
        features=features,
    )
    assert packed_counts.tolist() == counts.tolist()
    torch.testing.assert_close(output.loss, padded.loss, rtol=1e-5, atol=1e-5)


def test_a_batch_without_supervision_touches_every_parameter():
    target, draft = tiny_eagle1_pair()
    batch = pad_batch(random_chats(2))
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    output, counts = forward(target, draft, batch)
    assert counts.tolist() == [0] and output.loss.item() == 0
    for name, gradient in gradients(draft, output.loss).items():
        assert gradient is not None and not gradient.any(), name


def test_a_second_step_is_refused():
    target, draft = tiny_eagle1_pair()
    ids = torch.randint(3, VOCAB, (1, 6))
    with pytest.raises(ValueError, match="`num_steps` of an EAGLE-1 draft must be 1, got 2"):
        unrolled(draft, ids, target(ids).last_hidden, num_steps=2)


def test_decoding_with_a_cache_equals_the_forward_and_the_reference():
    """A row's prediction from the target's features, then two on the draft's own."""
    from transformers import DynamicCache

    target, draft = tiny_eagle1_pair()
    ids = torch.randint(3, VOCAB, (1, 20))
    features = target(ids).last_hidden
    row = 11
    trained = unrolled(draft, ids, features, rows=torch.tensor([row])).hidden_states[0]
    truth, _ = last_hidden(target.model, ids[0].tolist())
    reference, seen = ReferenceEagle1(draft, target.model), list(truth[: row + 1])

    cache, hidden = DynamicCache(), draft.combine_features(features)[:, : row + 1]
    tokens, positions = ids[:, 1 : row + 2], torch.arange(row + 1)[None]
    for step in range(3):
        normed, feedback = draft.decode(tokens, hidden, positions, cache)
        if step == 0:
            torch.testing.assert_close(normed[0, -1:], trained, rtol=1e-4, atol=1e-5)
        seen.append(reference.predict(ids[0, 1 : row + 2 + step].tolist(), seen))
        torch.testing.assert_close(normed[0, -1], seen[-1], rtol=1e-4, atol=5e-5)
        hidden, tokens = feedback[:, -1:], ids[:, row + 2 + step][None]
        positions = torch.tensor([[row + 1 + step]])


class TestNoise:
    def test_uniform_noise_is_wider_in_shorter_documents(self):
        """0.2 * 512 / tokens of the document, padding and neighbours not counted."""
        documents = torch.tensor([[0] * 64 + [1] * 128 + [-1] * 64, [-1] * 128 + [0] * 128])
        features = torch.randn(2, 256, 512)
        noise = add_feature_noise(features, documents, "uniform") - features
        for row, start, length in ((0, 0, 64), (0, 64, 128), (1, 128, 128)):
            piece, width = noise[row, start : start + length], 0.2 * 512 / length
            assert piece.abs().max() <= width / 2 + 1e-6
            assert piece.abs().max() > 0.99 * width / 2
            assert piece.std() == pytest.approx(width / 12**0.5, rel=0.02)
            assert abs(piece.mean()) < 0.01 * width

    def test_gaussian_noise_does_not_depend_on_the_length(self):
        features = torch.randn(2, 256, 512)
        noise = add_feature_noise(features, torch.zeros(2, 256, dtype=torch.long), "gaussian") - features
        assert noise.std() == pytest.approx(0.2, rel=0.01) and abs(noise.mean()) < 0.002

    def test_none_is_none(self):
        features = torch.randn(1, 4, 8)
        assert torch.equal(add_feature_noise(features, torch.zeros(1, 4, dtype=torch.long), "none"), features)
