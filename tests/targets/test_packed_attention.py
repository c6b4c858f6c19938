"""Packed rows through a target and a training step: every document as if it were alone."""

from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from tiny import pad_batch, random_chats, tiny_pair
from tiny_families import CONFIGS, tiny_family
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_eagle import EagleDataCollator, EagleTrainer, EagleTrainingArguments, FrozenTarget, pack_dataset
from hf_eagle.targets.packed_attention import Segments


OWN = ["gpt-oss", "gemma2"]
ROWS = ["llama4"]  # chunks: a row for each document
FAST = [name for name in CONFIGS if name not in (*OWN, *ROWS)]
MOE = {"llama4", "mixtral", "qwen3-moe", "gpt-oss", "glm4-moe", "glm4-moe-lite", "deepseek-v2", "deepseek-v3"}
CHATS = random_chats(9, seed=5)


def make_target(name, **kwargs):
    return FrozenTarget(tiny_family(name, **kwargs), [0, 2, 4, 7])


def packed_batch(chats=CHATS, max_length=48, side="right"):
    rows = pack_dataset(Dataset.from_list(chats), max_length)
    return EagleDataCollator(0, padding_side=side)(list(rows))


def features_of(target, batch):
    return target(batch["input_ids"], batch["attention_mask"], batch["position_ids"], batch["documents"])


def each_document(batch):
    """Where each document is, found token by token."""
    for row, documents in enumerate(batch["documents"].tolist()):
        for document in sorted(set(documents) - {-1}):
            yield row, [place for place, d in enumerate(documents) if d == document]


def assert_documents_are_as_if_alone(target, batch, **close):
    features, documents = features_of(target, batch), list(each_document(batch))
    assert len(documents) > len(batch["input_ids"]) > 1  # several a row, several rows
    for row, places in documents:
        ids = batch["input_ids"][row, places][None]
        with torch.no_grad():  # the model itself, by no means of ours
            alone = target.decoder(ids, use_cache=False, output_hidden_states=True)
        taps = torch.cat([alone.hidden_states[i] for i in target.tap_ids], -1)[0]
        torch.testing.assert_close(features.taps[row, places], taps, **close)
        torch.testing.assert_close(features.last_hidden[row, places], alone.last_hidden_state[0], **close)
    return features


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [*FAST, *OWN, *ROWS])
def test_features_of_packed_documents_are_those_of_each_alone(name, side):
    target = make_target(name)
    batch = packed_batch(side=side)
    features = assert_documents_are_as_if_alone(target, batch, rtol=2e-5, atol=2e-5)
    assert target._by_segments == (name in FAST)
    if name not in OWN:
        assert not features.taps[batch["documents"] < 0].any()


@pytest.mark.parametrize("name", [*FAST, *OWN])
def test_features_in_bf16(name):
    """bf16 differs by rounding, which a second order of the same sums shows the size of."""
    target = make_target(name)
    exact = features_of(target, packed_batch()).last_hidden
    target.model.to(torch.bfloat16)
    batch = packed_batch()
    packed, real = features_of(target, batch).last_hidden, batch["documents"] >= 0
    alone = torch.zeros_like(packed)
    for row, places in each_document(batch):
        alone[row, places] = target(batch["input_ids"][row, places][None]).last_hidden[0]
    rounding = (alone.float() - exact)[real].norm()
    assert 0 < (packed.float() - exact)[real].norm() < 1.5 * rounding


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_models_own_attention_is_there_again(implementation):
    target = make_target("qwen3", attn_implementation=implementation)
    assert_documents_are_as_if_alone(target, packed_batch(), rtol=2e-5, atol=2e-5)
    assert target.model.config._attn_implementation == implementation
    batch = packed_batch()
    with pytest.raises(IndexError):
        target(batch["input_ids"] + 96, documents=batch["documents"])
    assert target.model.config._attn_implementation == implementation


def test_positions_and_masks_are_derived_when_left_out():
    target, batch = make_target("llama"), packed_batch()
    features = features_of(target, batch)
    assert torch.equal(target(batch["input_ids"], documents=batch["documents"]).taps, features.taps)
    ids = batch["documents"].clamp_min(0)  # padding is known from the mask alone
    assert torch.equal(target(batch["input_ids"], batch["attention_mask"], documents=ids).taps, features.taps)


@pytest.mark.parametrize("name", [*FAST, *OWN, *ROWS])
def test_a_document_does_not_see_another(name):
    target, batch = make_target(name), packed_batch()
    documents = list(each_document(batch))
    row, places = next((r, p) for r, p in documents if p[0] > 0)  # one with another before it
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][row, places] = 3 + (batch["input_ids"][row, places] + 40) % 90
    before, after = features_of(target, batch), features_of(target, changed)
    others = batch["documents"] >= 0
    others[row, places] = False
    assert not torch.isclose(before.last_hidden[row, places], after.last_hidden[row, places]).all()
    for a, b in ((before.taps, after.taps), (before.last_hidden, after.last_hidden)):
        if name in MOE:  # an expert's batch, and so its rounding, may depend on all tokens
            torch.testing.assert_close(a[others], b[others], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(a[others], b[others])


class SquareTensors(TorchDispatchMode):
    """Shapes of all tensors made that are `(..., a, b)` with both `a` and `b` among `lengths`."""

    def __init__(self, *lengths):
        self.lengths, self.seen = lengths, []
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            if isinstance(x, torch.Tensor) and x.dim() > 1 and set(x.shape[-2:]) <= set(self.lengths):
                self.seen.append(tuple(x.shape))
        return output


@pytest.mark.parametrize("name", [*FAST, *OWN])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_no_mask_of_a_row_is_made(name, packed):
    chats = random_chats(12, seed=3, longest=30)
    target, batch = make_target(name), packed_batch(chats, 61) if packed else pad_batch(chats)
    length, tokens = batch["input_ids"].shape[1], int(batch["attention_mask"].sum())
    assert not {length, tokens} & {32, 48, 96}  # widths of the model
    with SquareTensors(length, tokens) as squares:
        features_of(target, batch) if packed else target(batch["input_ids"], batch["attention_mask"])
    assert bool(squares.seen) == (name in OWN), squares.seen


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batches_take_the_same_way(name, side):
    target = make_target(name)
    batch = pad_batch(CHATS, side)
    batch["input_ids"][batch["attention_mask"] == 0] = 7  # the embedding of token 0 is zero
    real = batch["attention_mask"] == 1
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        plain = target.model.get_decoder()(
            batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions, use_cache=False
        ).last_hidden_state
    ours = target(batch["input_ids"], batch["attention_mask"]).last_hidden
    assert not ours[~real].any() and plain[~real].any()  # padding was not computed
    torch.testing.assert_close(ours[real], plain[real], rtol=2e-5, atol=2e-5)


def test_an_attention_that_asks_for_more_keeps_its_own(caplog):
    """A model of which nothing tells beforehand that it passes a soft cap."""
    target = make_target("gemma2", attn_implementation="eager")
    target._by_segments = True
    assert_documents_are_as_if_alone(target, packed_batch(), rtol=2e-5, atol=2e-5)
    assert "attention asks for softcap" in caplog.text and not target._by_segments
    assert target.model.config._attn_implementation == "eager"


def test_a_layer_that_does_not_follow_the_switch_is_noticed(caplog):
    target = make_target("llama")
    target.model.model.layers[3].self_attn.config = deepcopy(target.model.config)
    assert_documents_are_as_if_alone(target, packed_batch(), rtol=2e-5, atol=2e-5)
    assert "a way around the attention interface" in caplog.text


def test_bounds_for_flash_kernels():
    """What transformers' flash attention calls `cu_seq_lens`, for two rows with padding on either side."""
    segments = Segments.of(torch.tensor([[0, 0, 1, -1, -1], [-1, 1, 1, 1, 0]]))
    assert segments.tokens.tolist() == [0, 1, 2, 6, 7, 8, 9]
    assert segments.position_ids.tolist() == [0, 1, 0, 0, 1, 2, 0]
    arguments = segments.flash_arguments()
    assert arguments["cu_seq_lens_q"].tolist() == [0, 2, 3, 6, 7] and arguments["cu_seq_lens_q"].dtype == torch.int32
    assert arguments["max_length_q"] == arguments["max_length_k"] == 3


# ---- what is refused ----


def test_documents_beside_a_cache_are_refused():
    target, batch = make_target("llama"), packed_batch()
    with pytest.raises(ValueError, match="`documents` packs plain text, but past_key_values, use_cache came with it"):
        target(batch["input_ids"], documents=batch["documents"], use_cache=True)


# ---- through the trainer ----


def step(tmp_path, batch, count, pair=None):
    """Loss and gradients of one batch, divided by `count`."""
    target, draft = pair or tiny_pair(40)
    args = EagleTrainingArguments(output_dir=str(tmp_path), ttt_steps=3, report_to="none", oov_rows="renormalize")
    trainer = EagleTrainer(model=draft, args=args, target=target, train_dataset=Dataset.from_list(CHATS))
    draft.zero_grad()
    loss = trainer.compute_loss(draft, batch, num_items_in_batch=count(trainer))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}


def assert_same_step(ours, wanted):
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-5, atol=0)
    assert ours[1].keys() == wanted[1].keys() and len(wanted[1]) > 10
    for name, gradient in wanted[1].items():
        assert gradient.norm() > 0
        assert (ours[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_packed_step_equals_the_padded_one(side, tmp_path):
    padded = pad_batch(CHATS)

    def count(trainer):
        return trainer._get_num_items_in_batch([padded], torch.device("cpu"))

    wanted = step(tmp_path, padded, count)
    batch = packed_batch(side=side)
    assert_same_step(step(tmp_path, batch, count), wanted)
    assert_same_step(step(tmp_path, batch, lambda t: t._get_num_items_in_batch([batch], torch.device("cpu"))), wanted)


def test_what_a_document_adds_to_a_step_does_not_depend_on_the_others(tmp_path):
    batch = packed_batch()
    row, places = next((r, p) for r, p in each_document(batch) if p[0] > 0)
    batch["loss_mask"][row, places] = 0
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][row, places] = 3 + (batch["input_ids"][row, places] + 40) % 90

    def count(trainer):
        return torch.tensor([50, 40, 30])

    ours, wanted = step(tmp_path, changed, count), step(tmp_path, batch, count)
    assert torch.equal(ours[0], wanted[0])
    assert_same_step(ours, wanted)
