"""A draft decoded with a window: what it drafts is that of a simulation which drops the keys behind the window."""

import pytest
import torch
from chain_models import make_draft, make_target, random_prompts
from decoding_reference import reference_chain, reference_tree
from torch.nn.functional import scaled_dot_product_attention

from hf_eagle.decoding import speculative_generate


TREE = {"method": "tree", "depth": 3, "top_k": 3, "total_tokens": 9}


@pytest.fixture(scope="module")
def pair():
    target = make_target()
    return target, make_draft(target, draft_vocab_size=40, tap_ids=[0, 2, 3])


@pytest.mark.parametrize("window", [4, 7, 16])
def test_counts_of_chains_and_trees_equal_a_simulation(pair, window):
    for prompt in random_prompts(3, 9, seed=3):
        given = {"draft_window": window, "max_new_tokens": 20}
        chain = speculative_generate(*pair, prompt[None], num_speculative_tokens=3, **given)
        answer, _, counts, rounds = reference_chain(*pair, prompt.tolist(), 3, 20, window=window)
        assert (chain.answers, chain.accepted_by_round, chain.accepted_per_position) == ([answer], [rounds], [counts])

        tree = speculative_generate(*pair, prompt[None], **given, **TREE)
        answer, _, _, rounds = reference_tree(*pair, prompt.tolist(), 3, 3, 9, 20, window=window)
        assert (tree.answers, tree.accepted_by_round) == ([answer], [rounds])


def test_rows_of_a_batch_each_have_a_window_of_their_own(pair):
    prompts = [prompt[-length:] for prompt, length in zip(random_prompts(4, 17, seed=5), (3, 17, 9, 17), strict=True)]
    ids = torch.stack([torch.cat([prompt.new_zeros(17 - len(prompt)), prompt]) for prompt in prompts])
    mask = torch.stack([torch.arange(17) >= 17 - len(prompt) for prompt in prompts]).long()
    found = {}
    for window in (None, 5, 4096):
        given = {"draft_window": window, "num_speculative_tokens": 3, "max_new_tokens": 20}
        alone = [speculative_generate(*pair, prompt[None], **given) for prompt in prompts]
        batch = speculative_generate(*pair, ids, mask, **given)
        found[window] = batch.accepted_by_round
        assert batch.accepted_by_round == [out.accepted_by_round[0] for out in alone]
        assert batch.answers == [out.answers[0] for out in alone]
    assert found[None] == found[4096] != found[5]


@pytest.mark.parametrize("shape", [{"num_speculative_tokens": 3}, TREE])
def test_a_window_that_is_not_wider_than_what_is_drafted_is_refused(pair, shape):
    with pytest.raises(ValueError, match="`draft_window` is 3, but must be above the 3"):
        speculative_generate(*pair, random_prompts(1, 4, seed=1), max_new_tokens=4, draft_window=3, **shape)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", [{"num_speculative_tokens": 3}, TREE], ids=["chain", "tree"])
def test_no_key_behind_all_windows_is_read(pair, rows, shape, monkeypatch):
    """So a long context costs the draft no more than a short one."""
    read = []

    def attend(query, key, value, **how):
        read.append((key.shape[2], query.shape[2]))
        return scaled_dot_product_attention(query, key, value, **how)

    monkeypatch.setattr("hf_eagle.drafts.attention.scaled_dot_product_attention", attend)
    prompts = random_prompts(rows, 40, seed=7)
    given = {"draft_window": 8, "max_new_tokens": 12, **shape}
    speculative_generate(*pair, torch.stack(list(prompts)), **given)
    prompt, *later = read
    assert prompt == (40, 40) or prompt[0] <= 41
    # rows part by what they accept, and tokens of a tree are written side by side
    assert later and max(keys - queries for keys, queries in later) <= 8 + 12 + 9
