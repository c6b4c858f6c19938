"""Chain decoding: lossless, and with the counts of a simulation that keeps no cache and shares no code with it."""

import pytest
import torch
from chain_models import VOCAB, generate, make_draft, make_target, random_prompts
from decoding_reference import reference_chain
from transformers import MistralConfig

from hf_eagle.decoding import speculative_generate


VARIANTS = {
    "eagle3": dict(draft_vocab_size=40, tap_ids=[0, 2, 3]),
    "full_vocabulary": dict(tap_ids=[0, 2, 3]),
    "eagle3.1": dict(draft_vocab_size=40, tap_ids=[0, 2, 3], fc_norm=True, norm_output=True),
    "four_taps": dict(draft_vocab_size=40, tap_ids=[0, 1, 2, 3], norm_output=True),
}


@pytest.fixture(scope="module")
def pairs():
    """variant -> target and draft, made once."""
    found = {}

    def get(name):
        if name not in found:
            target = make_target(tap_ids=VARIANTS[name]["tap_ids"])
            found[name] = target, make_draft(target, **VARIANTS[name])
        return found[name]

    return get


@pytest.fixture
def pair(pairs):
    return pairs("eagle3")


@pytest.mark.parametrize(
    ("variant", "num_speculative_tokens"),
    [*(("eagle3", number) for number in (1, 2, 5)), *((variant, 3) for variant in VARIANTS)],
)
def test_output_and_counts_equal_a_simulation_without_caches(pairs, variant, num_speculative_tokens):
    target, draft = pairs(variant)
    seen = []
    for prompt in random_prompts(6, 5, seed=3):
        out = speculative_generate(
            target, draft, prompt[None], num_speculative_tokens=num_speculative_tokens, max_new_tokens=24
        )
        answer, drafts, counts, rounds = reference_chain(target, draft, prompt.tolist(), num_speculative_tokens, 24)
        assert out.sequences[0].tolist() == prompt.tolist() + answer
        assert len(out.answers[0]) == 24
        assert (out.drafts, out.accepted_per_position) == ([drafts], [counts])
        assert torch.equal(out.sequences, generate(target, prompt[None], 24))
        seen += rounds
    # a draft that is never, or always, right would leave the roll-back untested
    assert {0, 1, num_speculative_tokens} <= set(seen)


def test_every_max_new_tokens_cuts_like_generate_and_counts_whole_rounds(pair):
    target, draft = pair
    prompt = random_prompts(6, 5, seed=3)[:1]
    for max_new_tokens in range(1, 13):
        out = speculative_generate(target, draft, prompt, num_speculative_tokens=4, max_new_tokens=max_new_tokens)
        answer, drafts, counts, _ = reference_chain(target, draft, prompt[0].tolist(), 4, max_new_tokens)
        assert torch.equal(out.sequences, generate(target, prompt, max_new_tokens))
        assert (out.answers, out.drafts, out.accepted_per_position) == ([answer], [drafts], [counts])


def test_stops_at_every_end_of_sequence_token_like_generate(pair):
    target, draft = pair
    prompt = random_prompts(1, 5, seed=4)
    whole = generate(target, prompt, 24)[0, 5:].tolist()
    for token in set(whole):
        out = speculative_generate(
            target, draft, prompt, num_speculative_tokens=3, max_new_tokens=24, eos_token_ids={token, VOCAB - 1}
        )
        assert torch.equal(out.sequences, generate(target, prompt, 24, {token, VOCAB - 1}))
        assert len(out.answers[0]) == out.sequences.shape[1] - 5 <= whole.index(token) + 1
        answer, drafts, counts, _ = reference_chain(
            target, draft, prompt[0].tolist(), 3, 24, eos_token_ids={token, VOCAB - 1}
        )
        assert (out.drafts, out.accepted_per_position) == ([drafts], [counts])


def test_tokens_accepted_behind_the_cut_are_counted():
    target = make_target()
    draft = make_draft(target, tap_ids=[0, 2, 3])
    found = 0
    for prompt in random_prompts(8, 5, seed=5):
        out = speculative_generate(target, draft, prompt[None], num_speculative_tokens=5, max_new_tokens=2)
        assert (len(out.answers[0]), out.drafts) == (2, [1])
        found += sum(out.accepted_per_position[0]) > 1
    assert found > 0


def test_prompt_of_one_token(pair):
    target, draft = pair
    for token in (1, 17, 40):
        prompt = torch.tensor([[token]])
        out = speculative_generate(target, draft, prompt, num_speculative_tokens=3, max_new_tokens=20)
        _, drafts, counts, _ = reference_chain(target, draft, [token], 3, 20)
        assert torch.equal(out.sequences, generate(target, prompt, 20))
        assert (out.drafts, out.accepted_per_position) == ([drafts], [counts])


def test_sliding_window_target_is_lossless_past_its_window():
    target = make_target(MistralConfig, sliding_window=8)
    draft = make_draft(target, tap_ids=[0, 2, 3])
    for prompt in random_prompts(4, 11, seed=6):
        out = speculative_generate(target, draft, prompt[None], num_speculative_tokens=3, max_new_tokens=30)
        assert torch.equal(out.sequences, generate(target, prompt[None], 30))
        assert sum(out.accepted_per_position[0]) > 0
