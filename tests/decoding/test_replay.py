"""Replaying known answers counts what decoding counts, round by round, whatever is drafted."""

import pytest
import torch
from chain_models import make_draft, make_target, random_prompts
from replayed import replayed

from hf_eagle.decoding import every_place, target_generate
from hf_eagle.decoding.continued import continued_answers


VARIANTS = {
    "eagle3": dict(draft_vocab_size=40, tap_ids=[0, 2, 3]),
    "eagle3.1": dict(tap_ids=[0, 2, 3], fc_norm=True, norm_output=True),
}
CHAINS = [{"num_speculative_tokens": count} for count in (1, 2, 3, 5)]
CHAINS += [{"num_speculative_tokens": 3, "draft_window": window} for window in (4, 9, 4096)]
TREES = [{"method": "tree", "depth": 3, "top_k": 3, "total_tokens": 9}, {"method": "tree", "draft_window": 6}]


@pytest.fixture(scope="module")
def pairs():
    target = make_target()
    return {name: (target, make_draft(target, **variant)) for name, variant in VARIANTS.items()}


def batch_of(prompts):
    longest = max(map(len, prompts))
    ids = torch.stack([torch.cat([prompt.new_zeros(longest - len(prompt)), prompt]) for prompt in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(prompt) for prompt in prompts]).long()
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("variant", VARIANTS)
def test_forty_prompts_count_as_decoding_does(pairs, variant, monkeypatch):
    """Prompts of many lengths in one batch; answers that end with a token, with the first one, and by their length."""
    monkeypatch.setattr(every_place, "_PLACES", 7)  # several parts, the last of which is shorter
    monkeypatch.setattr(every_place, "_CHUNK", 8)
    target, draft = pairs[variant]
    prompts = [prompt[: 1 + row % 17] for row, prompt in enumerate(random_prompts(40, 17, seed=3))]
    answers = [target_generate(target, prompt[None], max_new_tokens=20)[0] for prompt in prompts]
    eos = {answers[0][0], answers[1][4], answers[2][12]}

    found = replayed(target, draft, batch_of(prompts), CHAINS + TREES, 20, eos)
    for decoded, again in found:
        assert again == decoded
    assert {len(rounds) for rounds in found[0][0]} >= {0, 19}
    assert {0, 1, 3} <= {count for rounds in found[2][0] for count in rounds}


def test_a_single_prompt_without_padding(pairs):
    for prompt in random_prompts(4, 6, seed=11):
        for decoded, again in replayed(*pairs["eagle3"], {"input_ids": prompt[None]}, CHAINS, 24):
            assert again == decoded


def test_answers_are_continued_behind_their_ends(pairs):
    target, prompts = pairs["eagle3"][0], random_prompts(6, 5, seed=3)
    whole = target_generate(target, prompts, max_new_tokens=24)
    eos = {whole[0][3], whole[1][9]}
    answers, after = continued_answers(target, prompts, max_new_tokens=16, eos_token_ids=eos, beyond=4)
    assert answers == target_generate(target, prompts, max_new_tokens=16, eos_token_ids=eos)
    assert [a + b for a, b in zip(answers, after, strict=True)] == [
        x[: len(a) + 4] for x, a in zip(whole, answers, strict=True)
    ]
    assert len({len(answer) for answer in answers}) > 1
