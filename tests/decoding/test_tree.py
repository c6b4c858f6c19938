"""Dynamic draft trees: lossless in every shape, and grown as a simulation without caches and masks grows them."""

import pytest
import torch
from chain_models import VOCAB, generate, make_draft, make_target, random_prompts
from decoding_reference import reference_tree
from transformers import Gemma3TextConfig, MistralConfig

from hf_eagle.decoding import speculative_generate
from hf_eagle.decoding.tree import DraftTree, max_nodes


VARIANTS = {
    "eagle3": dict(draft_vocab_size=40, tap_ids=[0, 2, 3]),
    "eagle3.1": dict(tap_ids=[0, 2, 3], fc_norm=True, norm_output=True),
}
# depth, top_k, total_tokens
SHAPES = [(1, 4, 4), (2, 3, 12), (3, 1, 3), (3, 4, 9), (4, 2, 6), (4, 6, 30), (6, 3, 20)]


@pytest.fixture(scope="module")
def pairs():
    target = make_target()
    return {name: (target, make_draft(target, **variant)) for name, variant in VARIANTS.items()}


@pytest.fixture
def pair(pairs):
    return pairs["eagle3"]


def decode(target, draft, prompts, shape, **arguments):
    names = ("depth", "top_k", "total_tokens")
    return speculative_generate(
        target, draft, prompts, method="tree", **dict(zip(names, shape, strict=True)), **arguments
    )


@pytest.mark.parametrize(("variant", "shape"), [*(("eagle3", shape) for shape in SHAPES), ("eagle3.1", SHAPES[3])])
def test_output_and_counts_equal_a_simulation_without_caches_and_masks(pairs, variant, shape):
    target, draft = pairs[variant]
    seen = []
    for prompt in random_prompts(3, 5, seed=3):
        out = decode(target, draft, prompt[None], shape, max_new_tokens=16)
        answer, drafts, counts, rounds = reference_tree(target, draft, prompt.tolist(), *shape, 16)
        assert (out.answers, out.drafts, out.accepted_per_position) == ([answer], [drafts], [counts])
        assert torch.equal(out.sequences, generate(target, prompt[None], 16))
        seen += rounds
    assert len(set(seen)) > 1


def test_a_tree_of_one_child_is_the_chain(pair):
    target, draft = pair
    for prompt in random_prompts(4, 5, seed=3):
        tree = decode(target, draft, prompt[None], (4, 1, 4), max_new_tokens=24)
        chain = speculative_generate(target, draft, prompt[None], num_speculative_tokens=4, max_new_tokens=24)
        assert (tree.answers, tree.drafts) == (chain.answers, chain.drafts)
        assert tree.accepted_per_position == chain.accepted_per_position


def test_a_tree_accepts_more_than_its_chain(pair):
    target, draft = pair
    prompts = random_prompts(12, 5, seed=4)
    tree = decode(target, draft, prompts, (4, 6, 30), max_new_tokens=24)
    chain = speculative_generate(target, draft, prompts, num_speculative_tokens=4, max_new_tokens=24)
    assert sum(tree.drafts) < sum(chain.drafts)


@pytest.mark.parametrize(
    "config_class, overrides",
    [
        (MistralConfig, {"sliding_window": 8}),
        (
            Gemma3TextConfig,
            {"sliding_window": 8, "head_dim": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
        ),
    ],
    ids=["every_layer_slides", "layers_of_two_kinds"],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sliding_windows_are_kept_inside_the_tree(config_class, overrides, attention):
    target = make_target(config_class, **overrides)
    target.model.set_attn_implementation(attention)
    draft = make_draft(target, tap_ids=[0, 2, 3])
    prompts = random_prompts(3, 11, seed=6)
    out = decode(target, draft, prompts, (3, 4, 10), max_new_tokens=24)
    assert torch.equal(out.sequences, generate(target, prompts, 24))
    assert sum(map(sum, out.accepted_per_position)) > 0


def test_ancestors_and_depths_of_a_tree():
    parents = torch.tensor([[0, 0, 0, 1, 1, 3]])
    tree = DraftTree.of(torch.arange(5)[None], parents, 3)
    lines = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 1, 3, 5]]
    assert [row.nonzero().flatten().tolist() for row in tree.ancestors[0]] == lines
    assert tree.depths[0].tolist() == [len(line) - 1 for line in lines]
    assert (max_nodes(1, 4), max_nodes(3, 4)) == (4, 36)


def test_early_stop_tokens_and_every_limit(pair):
    target, draft = pair
    prompt = random_prompts(1, 5, seed=4)
    whole = generate(target, prompt, 20)[0, 5:].tolist()
    for token in set(whole):
        out = decode(target, draft, prompt, (3, 4, 12), max_new_tokens=20, eos_token_ids={token, VOCAB - 1})
        assert torch.equal(out.sequences, generate(target, prompt, 20, {token, VOCAB - 1}))
    for limit in range(1, 9):
        out = decode(target, draft, prompt, (3, 4, 12), max_new_tokens=limit)
        assert out.answers == [whole[:limit]]
