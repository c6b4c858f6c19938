"""Taps, last hidden state and teacher distribution of a frozen target."""

import pytest
import torch
from tiny import pad_batch, random_chats, tiny_llama
from tiny_families import CONFIGS, tiny_family
from transformers import AutoModelForCausalLM

from hf_eagle import FrozenTarget


def inputs_of_layers(model, ids, mask):
    """Every layer's input and the final norm's, recorded by wrapping `forward` rather than by hooks."""
    seen, originals = [], []
    modules = [*model.model.layers, model.model.norm]
    for module in modules:
        original = module.forward
        originals.append(original)

        def recording(hidden_states, *args, _original=original, **kwargs):
            seen.append(hidden_states.clone())
            return _original(hidden_states, *args, **kwargs)

        module.forward = recording
    with torch.no_grad():
        output = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    for module, original in zip(modules, originals, strict=True):
        module.forward = original
    return seen, output.logits


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["right", "left", None])
def test_taps_are_the_inputs_of_the_layers(name, side):
    """And what follows the last hidden state (head, soft cap, scale) makes the model's own logits of it."""
    model = tiny_family(name)
    target = FrozenTarget(model, tap_ids=[0, 2, 5, 8])
    batch = pad_batch(random_chats(3), side or "right")
    if side is None:
        batch["attention_mask"].fill_(1)
    real = batch["attention_mask"] == 1
    inputs, logits = inputs_of_layers(model, batch["input_ids"], batch["attention_mask"])
    features = target(batch["input_ids"], batch["attention_mask"])
    taps = torch.cat([inputs[i] for i in (0, 2, 5, 8)], -1)
    if side is None:
        assert torch.equal(features.taps, taps)
    else:  # padding is not computed, which rounds differently
        torch.testing.assert_close(features.taps[real], taps[real], rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(target.logits(features.last_hidden)[real], logits[real], rtol=2e-5, atol=1e-5)
    assert not features.taps.requires_grad


def test_output_hidden_states_is_the_same_second_way():
    model = tiny_llama()
    batch = pad_batch(random_chats(3))
    by_hook = FrozenTarget(model, [2, 4, 7])(batch["input_ids"], batch["attention_mask"])
    by_output = FrozenTarget(model, [2, 4, 7], "output_hidden_states")(batch["input_ids"], batch["attention_mask"])
    assert torch.equal(by_hook.taps, by_output.taps)
    assert torch.equal(by_hook.last_hidden, by_output.last_hidden)


def test_a_compiled_target_says_the_same():
    """Traced by dynamo and run by its `eager` backend: whether hooks and segments survive needs no code generator."""
    plain, compiled = (FrozenTarget(tiny_llama(), tap_ids=[1, 4, 8]) for _ in range(2))
    compiled.compile(backend="eager")
    for seed in (1, 2):
        batch = pad_batch(random_chats(3, seed=seed))
        wanted = plain(batch["input_ids"], batch["attention_mask"])
        seen = compiled(batch["input_ids"], batch["attention_mask"])
        torch.testing.assert_close(seen.taps, wanted.taps)
        torch.testing.assert_close(seen.last_hidden, wanted.last_hidden)
    assert compiled.model._compiled_call_impl is not None


@pytest.mark.parametrize("tap_ids", [None, []])
@pytest.mark.parametrize("method", ["hooks", "output_hidden_states"])
def test_without_taps_there_is_the_last_hidden_state(tap_ids, method):
    model = tiny_llama()
    batch = pad_batch(random_chats(3), "left")
    wanted = FrozenTarget(model, [2, 4, 7])(batch["input_ids"], batch["attention_mask"]).last_hidden
    features = FrozenTarget(model, tap_ids, method)(batch["input_ids"], batch["attention_mask"])
    assert features.taps is None and torch.equal(features.last_hidden, wanted)


def test_an_eagle3_draft_asks_for_taps():
    from tiny import tiny_pair

    target, draft = tiny_pair()
    target.tap_ids = None
    with pytest.raises(ValueError, match="Set `tap_ids` of the target"):
        draft.select_features(target(torch.tensor([[3, 4]])))


def test_padding_does_not_change_features():
    target = FrozenTarget(tiny_llama(), [2, 4, 7])
    records = random_chats(3, seed=8)
    for side in ("left", "right"):
        batch = pad_batch(records, side)
        padded = target(batch["input_ids"], batch["attention_mask"])
        for i, record in enumerate(records):
            alone = target(torch.tensor([record["input_ids"]]))
            torch.testing.assert_close(padded.taps[i][batch["attention_mask"][i] == 1], alone.taps[0])


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_distribution_is_the_softmax(chunk):
    target = FrozenTarget(tiny_llama(), [2, 4, 7])
    hidden = target(torch.randint(3, 96, (1, 12))).last_hidden[0]
    logits = target.model.lm_head(hidden)
    ids = torch.tensor([1, 5, 40, 77])
    seen = target.distribution(hidden, ids, with_mass=True, chunk=chunk)
    torch.testing.assert_close(seen.probs, logits[:, ids].softmax(-1))
    torch.testing.assert_close(seen.mass, logits.softmax(-1)[:, ids].sum(-1))
    assert torch.equal(seen.argmax, logits[:, ids].argmax(-1))
    assert torch.equal(seen.in_draft, torch.isin(logits.argmax(-1), ids))
    whole = target.distribution(hidden, None, with_mass=True, chunk=chunk)
    torch.testing.assert_close(whole.probs, logits.softmax(-1))
    assert torch.equal(whole.mass, torch.ones(12)) and whole.in_draft.all()
    assert torch.equal(whole.argmax, logits.argmax(-1))
    assert target.distribution(hidden[:0], ids).probs.shape == (0, 4)


@pytest.mark.parametrize("chunk", [5, 256])
def test_a_known_head_summary_leaves_the_rest_of_the_head_out(chunk):
    """The same distribution of the draft vocabulary's rows alone; of equal logits the first is the target's token."""
    target = FrozenTarget(tiny_llama())
    hidden = target(torch.randint(3, 96, (1, 40))).last_hidden[0]
    with torch.no_grad():
        logits = target.model.lm_head(hidden)
        ids = torch.cat([logits.argmax(-1)[:20], torch.tensor([1, 5, 77])]).unique()
        twin = next(i for i in range(96) if i not in ids)
        target.model.lm_head.weight[ids[-1]] = 9 * target.model.lm_head.weight[twin]
        target.model.lm_head.weight[twin] = target.model.lm_head.weight[ids[-1]]
        logits = target.model.lm_head(hidden)
    head_summary = target.head_summary(hidden, chunk=chunk)
    assert torch.equal(head_summary.top, logits.argmax(-1))
    torch.testing.assert_close(head_summary.log_partition, logits.logsumexp(-1))

    seen = target.distribution(hidden, ids, with_mass=True, chunk=chunk, head_summary=head_summary)
    assert torch.equal(seen.in_draft, torch.isin(logits.argmax(-1), ids))
    assert seen.in_draft.any() and not seen.in_draft.all() and (head_summary.top == twin).any()
    wanted = target.distribution(hidden, ids, with_mass=True)
    assert all(torch.equal(getattr(seen, name), getattr(wanted, name)) for name in ("probs", "argmax", "in_draft"))
    torch.testing.assert_close(seen.mass, wanted.mass)
    head = target.teacher_head
    target.teacher_head = lambda ids=None: head(ids) if ids is not None else pytest.fail("the whole head is asked")
    target.distribution(hidden, ids, head_summary=head_summary)


def test_the_target_is_frozen_and_keeps_no_hook():
    target = FrozenTarget(tiny_llama(), [2, 4, 7])
    target(torch.randint(3, 96, (1, 5)))
    assert not any(p.requires_grad for p in target.model.parameters()) and not target.model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in target.model.modules())


@pytest.mark.parametrize(
    ("tap_ids", "method", "message"),
    [
        ([2, 4, 9], "hooks", r"between 0 and 8 .* got \[2, 4, 9\]"),
        ([-1, 4, 7], "hooks", "between 0 and 8"),
        ([4, 2], "hooks", "ascending and unique"),
        ([2, 8], "output_hidden_states", "holds 8, the final norm's input"),
        ([2], "hook", "`tap_method` must be one of hooks, output_hidden_states, got 'hook'"),
    ],
)
def test_wrong_taps_are_refused(tap_ids, method, message):
    with pytest.raises(ValueError, match=message):
        FrozenTarget(tiny_llama(), tap_ids, method)


def test_weights_on_meta_are_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_llama().config)
    with pytest.raises(ValueError, match="meta device"):
        FrozenTarget(model)


def test_a_gguf_target_is_tapped_like_its_converted_twin(tmp_path):
    from tiny_gguf import LAYERS, write_tiny_gguf

    from hf_eagle.targets.gguf import convert_gguf

    write_tiny_gguf(tmp_path / "tiny.gguf")
    convert_gguf(tmp_path, "tiny.gguf", tmp_path / "converted")
    ids = torch.randint(3, 60, (2, 7))
    taps = list(range(LAYERS + 1))
    direct = FrozenTarget.from_pretrained(str(tmp_path), taps, dtype=torch.float32, gguf_file="tiny.gguf")
    converted = FrozenTarget.from_pretrained(str(tmp_path / "converted"), taps)
    assert torch.equal(direct(ids).taps, converted(ids).taps)
