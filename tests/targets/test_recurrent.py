"""Targets with recurrent layers or sparse attention: packed and padded documents are as if each were alone."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model_types import RECURRENT, SPARSE, exact_model_type, tiny_model_type
from transformers import LlamaConfig, LlamaForCausalLM

from hf_eagle import FrozenTarget
from hf_eagle.targets.packed_attention import Segments
from hf_eagle.targets.recurrent import find_mixers


TAPS = [0, 2, 3]
# documents of many lengths and of one token, in rows padded on either side; two of them are as long as a chunk
DOCUMENTS = torch.tensor([[0] * 13 + [1] * 9 + [2] * 5 + [-1] * 3, [-1] * 2 + [0] * 1 + [1] * 17 + [2] * 10])
IDS = torch.randint(3, 96, DOCUMENTS.shape, generator=torch.Generator().manual_seed(1))
every = pytest.mark.parametrize("name", [*RECURRENT, *SPARSE, "gemma4_text"])


def target_of(name, **changes):
    return FrozenTarget(exact_model_type(name, **changes), TAPS)


def alone(target, ids):
    """Taps and last hidden states of one document, by the model itself."""
    with torch.no_grad():
        output = target.model.get_decoder()(ids[None], use_cache=False, output_hidden_states=True)
    return torch.cat([output.hidden_states[i] for i in TAPS], -1)[0], output.last_hidden_state[0]


def assert_alone(target, features, row, places, ids=IDS):
    taps, last = alone(target, ids[row, places])
    torch.testing.assert_close(features.taps[row, places], taps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.last_hidden[row, places], last, rtol=1e-5, atol=1e-5)


def each_document():
    for row, documents in enumerate(DOCUMENTS.tolist()):
        for document in sorted(set(documents) - {-1}):
            yield row, [place for place, d in enumerate(documents) if d == document]


@every
def test_packed_documents_are_as_if_alone(name):
    target = target_of(name)
    features = target(IDS, documents=DOCUMENTS)
    for row, places in each_document():
        assert_alone(target, features, row, places)

    # one of them changed, and what stands on padding: the others do not see it
    changed = IDS.clone()
    changed[0, :13], changed[DOCUMENTS < 0] = (IDS[0, :13] + 40) % 90, 7
    other = target(changed, documents=DOCUMENTS)
    kept = DOCUMENTS >= 0
    kept[0, :13] = False
    torch.testing.assert_close(other.last_hidden[kept], features.last_hidden[kept], rtol=1e-9, atol=1e-9)
    assert not torch.isclose(other.last_hidden[0, 1:13], features.last_hidden[0, 1:13]).all()


@every
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_as_if_alone(name, side):
    target, mask = target_of(name), torch.ones(3, 14, dtype=torch.long)
    mask[1, slice(0, 5) if side == "left" else slice(9, None)] = 0
    mask[2, slice(0, 13) if side == "left" else slice(1, None)] = 0
    ids = IDS.flatten()[:42].view(3, 14).masked_fill(mask == 0, 7)  # the embedding of token 0 is zero
    features = target(ids, mask)
    for row in range(3):
        assert_alone(target, features, row, mask[row].nonzero()[:, 0].tolist(), ids)


@every
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_documents_of_one_length_and_either_attention(name, attention):
    target = target_of(name, attn_implementation=attention)
    features = target(IDS, documents=torch.arange(3).repeat_interleave(10).expand(2, -1))
    for row in range(2):
        for start in (0, 10, 20):
            assert_alone(target, features, row, list(range(start, start + 10)))


@pytest.mark.parametrize("name", RECURRENT)
def test_mixers_are_the_modules_that_carry_a_state(name):
    model = tiny_model_type(name)
    mixers = find_mixers(model)
    kinds = getattr(model.config, "layer_types", None)
    assert len(mixers.found) == sum(kind in ("linear_attention", "conv", "hybrid") for kind in kinds)
    assert mixers.attending == sum(kind in ("full_attention", "hybrid") for kind in kinds)
    assert all(hasattr(mixer.module, "layer_idx") for mixer in mixers.found)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_attention_alone_is_not_looked_at(monkeypatch):
    model = tiny_model_type("gemma3_text")
    monkeypatch.setattr(type(model), "forward", None)
    assert not find_mixers(model)


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2"])
def test_the_model_runs_as_before_afterwards(name):
    target = target_of(name)
    before, places = alone(target, IDS[0]), [mixer.module for mixer in target.mixers.found]
    target(IDS, documents=DOCUMENTS)
    with pytest.raises(IndexError):
        target(IDS + 96, documents=DOCUMENTS)
    assert not any("forward" in module.__dict__ for module in places)
    assert all(torch.equal(x, y) for x, y in zip(alone(target, IDS[0]), before, strict=True))


def test_memory_that_runs_out_says_nothing_of_a_model(monkeypatch):
    model = tiny_model_type(RECURRENT[0])
    monkeypatch.setattr(model, "forward", raise_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        find_mixers(model)


def raise_out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("out of memory")


def test_a_mixers_own_forward_is_there_again():
    """Accelerate puts one there, for instance to move weights."""
    target = target_of("minimax")
    module = target.mixers.found[0].module
    own, calls = module.forward, []

    def watched(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    watched.__signature__ = inspect.signature(own)
    module.forward = watched
    assert_alone(target, target(IDS, documents=DOCUMENTS), 0, list(range(13)))
    assert module.forward is watched and calls


SMALL = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)


class Leaking(LlamaForCausalLM):
    """A model that counts on what it saw before, which no cache shows."""

    seen = 0.0

    def forward(self, *args, **kwargs):
        def add(module, args, output):
            Leaking.seen += 1.0
            return output + Leaking.seen

        handle = self.model.embed_tokens.register_forward_hook(add)
        try:
            return super().forward(*args, **kwargs)
        finally:
            handle.remove()


def test_a_target_that_keeps_nothing_apart_is_refused():
    torch.manual_seed(0)
    model = Leaking(SMALL).eval()
    model.model._is_stateful = True
    with pytest.raises(ValueError, match="`packing` needs a target that keeps documents apart, but in Leaking the fea"):
        FrozenTarget(model, TAPS)(IDS, documents=DOCUMENTS)


class Failing(LlamaForCausalLM):
    """A model that does not run packed documents, or whose features of them are no numbers."""

    by = None

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        output = super().forward(input_ids, position_ids=position_ids, **kwargs)
        if position_ids is not None:
            if self.by is None:
                raise RuntimeError("no positions")
            output.hidden_states[-1].fill_(self.by)
        return output


@pytest.mark.parametrize("by", [None, torch.nan, torch.inf, -torch.inf])
def test_a_target_that_cannot_run_packed_documents_is_refused_in_words(by):
    model = Failing(SMALL).eval()
    model.by, model.model._is_stateful = by, True
    with pytest.raises(ValueError, match="but Failing cannot run packed documents, or its features") as refused:
        FrozenTarget(model, TAPS)(IDS, documents=DOCUMENTS)
    assert not {"nan", "inf"} & set(str(refused.value).split())


def test_what_needs_a_row_for_each_document_says_so_once(caplog):
    target = target_of("deepseek_v32")
    for _ in range(2):
        target(IDS, documents=DOCUMENTS)
    assert caplog.text.count("DeepseekV32ForCausalLM gets a row for each document") == 1


# ---- documents as rows ----


@given(st.lists(st.integers(1, 70), min_size=1, max_size=12))
def test_rows_hold_every_token_once_and_less_padding_than_tokens(lengths):
    documents = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None]
    segments = Segments.of(documents)
    for groups in (segments.rows, [segments.all_rows]):
        assert torch.cat([rows.tokens for rows in groups]).sort().values.tolist() == list(range(sum(lengths)))
        for rows in groups:
            assert torch.equal(rows.index.flatten()[rows.places], rows.tokens)
            positions = segments.position_ids[rows.index] + rows.beyond
            assert torch.equal(positions, torch.arange(rows.index.shape[1]).expand_as(positions))
            assert (documents[0][rows.index] == documents[0][rows.index[:, :1]]).all()
    assert sum(rows.index.numel() for rows in segments.rows) < 2 * sum(lengths)


def test_padding_before_tokens_is_refused_where_nothing_keeps_it_out():
    target = target_of("lfm2")
    target.packing_gap = 0.5  # as if it had failed the check
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 20:] = 0
    assert_alone(target, target(IDS, mask), 1, list(range(20)))
    with pytest.raises(
        ValueError, match="`attention_mask` has zeros before tokens, which Lfm2ForCausalLM may see: pad"
    ):
        target(IDS, mask.flip(1))
