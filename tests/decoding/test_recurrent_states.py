"""Speculative decoding with recurrent layers: the target's own output, whatever is accepted in a round."""

from types import SimpleNamespace

import pytest
import torch
from chain_models import make_draft, make_target
from oracle_draft import OracleDraft
from tiny_model_types import RECURRENT, exact_model_type, tiny_model_type

from hf_eagle import FrozenTarget
from hf_eagle.decoding import speculative_generate, target_generate
from hf_eagle.decoding.recurrent_states import _states
from hf_eagle.decoding.target_run import TargetRun


COUNT = 16
PROMPTS = [
    torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (7, 1, 12, 4)
]
LENGTHS = [len(prompt) for prompt in PROMPTS]
LONGEST = max(LENGTHS)
IDS = torch.tensor([[5] * (LONGEST - len(prompt)) + prompt for prompt in PROMPTS])
MASK = torch.tensor([[0] * (LONGEST - length) + [1] * length for length in LENGTHS])
every = pytest.mark.parametrize("name", [*RECURRENT, "gemma4_text"])


def target_of(name):
    return FrozenTarget(exact_model_type(name), [0, 2, 3])


def own_answers(target, eos=None):
    """Each prompt and its answer by the model's own `generate`, one by one."""
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        arguments = {"do_sample": False, "max_new_tokens": COUNT, "eos_token_id": eos, "pad_token_id": 0}
        answers.append(target.model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[0].tolist())
    return answers


@every
def test_greedy_decoding_is_the_models_own(name):
    """Alone and in a batch of other lengths, with drafts that are right about all, some and none of a round."""
    target = target_of(name)
    full = own_answers(target)
    # one answer ends early, so that its row leaves the batch
    eos = full[2][LENGTHS[2] + 4]
    wanted = [answer[length:] for answer, length in zip(full, LENGTHS, strict=True)]
    wanted = [answer[: answer.index(eos) + 1] if eos in answer else answer for answer in wanted]
    shape = {"max_new_tokens": COUNT, "num_speculative_tokens": 3, "eos_token_ids": [eos]}

    alone = speculative_generate(target, OracleDraft(target, full[:1]), torch.tensor(PROMPTS[:1]), **shape)
    assert alone.answers == wanted[:1]
    batch = speculative_generate(target, OracleDraft(target, full), IDS, MASK, **shape)
    assert batch.answers == wanted

    accepted = torch.tensor(batch.accepted_per_position).sum(0)
    assert sum(batch.drafts) > accepted[0] > accepted[1] > accepted[2] > 0
    assert target_generate(target, IDS, MASK, max_new_tokens=COUNT, eos_token_ids=[eos]) == wanted


@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1"])
def test_a_trained_kind_of_draft_that_is_never_right(name):
    target = FrozenTarget(exact_model_type(name, vocab_size=67, initializer_range=0.2), [0, 2, 3])
    draft = make_draft(make_target(), tap_ids=[0, 2, 3], steps=0).double()
    ids = IDS % 67
    out = speculative_generate(target, draft, ids, MASK, max_new_tokens=COUNT)
    assert out.answers == target_generate(target, ids, MASK, max_new_tokens=COUNT)


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [4, 4, 4, 4], [2, 1, 4, 3]], ids=["none", "all", "some"])
def test_states_are_those_of_the_accepted_tokens_alone(name, counts):
    target = target_of(name)
    run = TargetRun(target, IDS, MASK, room=8)
    window = torch.arange(20, 36).view(4, 4)
    run.read_prompt()
    run.verify(window)
    run.keep(counts, torch.tensor(counts))

    for row, count in enumerate(counts):
        prompt = torch.tensor([PROMPTS[row]])
        single = TargetRun(target, prompt, None, room=8)
        single.read_prompt()
        for token in window[row, :count]:
            single.verify(token.view(1, 1))
            single.keep([1], torch.ones(1, dtype=torch.long))
        for mixer in target.mixers.found:
            ours, theirs = (_states(x.states._caches[mixer]) for x in (run, single))
            assert len(ours) == len(theirs) > 0
            for state, wanted in zip(ours, theirs, strict=True):
                torch.testing.assert_close(state[row : row + 1], wanted, rtol=1e-5, atol=1e-6)


def test_padding_tokens_do_not_matter():
    target = target_of("bamba")
    full = own_answers(target)
    answers = [
        speculative_generate(target, OracleDraft(target, full), ids, MASK, max_new_tokens=8).answers
        for ids in (IDS, IDS.masked_fill(MASK == 0, 33))
    ]
    assert answers[0] == answers[1]


def test_in_bf16_a_draft_changes_only_what_rounding_decides():
    """The same layers in the same order: single tokens of a window are single steps, as without a draft."""
    target = FrozenTarget(tiny_model_type("qwen3_next").bfloat16(), [0, 2, 3])
    wanted = target_generate(target, torch.tensor(PROMPTS[:1]), max_new_tokens=COUNT)
    draft = OracleDraft(target, [PROMPTS[0] + wanted[0]], right=1.0)
    out = speculative_generate(target, draft, torch.tensor(PROMPTS[:1]), max_new_tokens=COUNT)
    assert out.answers[0][:4] == wanted[0][:4]


def test_trees_are_refused():
    target = FrozenTarget(tiny_model_type("lfm2"), [0, 2, 3])
    draft = OracleDraft(target, own_answers(target)[:1])
    with pytest.raises(
        ValueError,
        match="`method` is 'tree', but `target` is a Lfm2ForCausalLM, whose recurrent layers carry one state",
    ):
        speculative_generate(target, draft, torch.tensor(PROMPTS[:1]), max_new_tokens=4, method="tree", top_k=2)


def test_states_that_do_not_come_back_are_noticed(monkeypatch):
    """Each time a target is decoded with for the first time, it is tried."""
    target = FrozenTarget(tiny_model_type("jamba"), [0, 2, 3])
    draft = OracleDraft(target, own_answers(target))
    monkeypatch.setattr("hf_eagle.decoding.recurrent_states.RecurrentStates.keep", lambda *_: None)
    for ids, mask, said in ((IDS[:1], MASK[:1], "token, or"), (IDS, MASK, "token in a batch: decode one")):
        with pytest.raises(ValueError, match=f"recurrent layers could not be brought back .* a rejected {said}"):
            speculative_generate(target, draft, ids, mask, max_new_tokens=4)


def test_a_mask_for_each_part_of_a_layer():
    """What a hybrid of sliding attention and a state would get; none of transformers' causal models has one."""
    target = FrozenTarget(tiny_model_type("falcon_h1"), [0, 2, 3])
    run = TargetRun(target, IDS, MASK, room=4)
    config = SimpleNamespace(layer_types=["hybrid_sliding"], sliding_window=4, rope_parameters=None)
    target.config = config
    masks = run._place_window(2)["attention_mask"]
    assert masks["linear_attention"] is None and masks["sliding_attention"].shape == (4, 1, 2, LONGEST + 2)
    assert ((masks["sliding_attention"] == 0).sum(-1) <= 4).all()
