"""Sampling with a draft draws from the target's distribution, and a wrong acceptance rule would be noticed.

The joint distribution of an answer's first three tokens is compared with the one that the target's plain forward and
transformers' own logits processors give, by Pearson's chi-square at the level 1e-4, with fixed seeds. A round decides
the second and the third token, so what happens behind accepted and behind rejected candidates matters for both.

Power: against any distribution at a total variation of d, n draws have a noncentrality of at least n * (2 d)^2. With
n = 40,000 and the 343 cells of three tokens out of seven, d = 0.04 is found with probability 0.999. The wrong rules
below are at 0.05 and more.
"""

import itertools

import pytest
import torch
from chain_models import make_draft, make_target
from oracle_draft import OracleDraft
from tiny_model_types import tiny_model_type
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import hf_eagle.decoding.generate as generation
from hf_eagle.decoding import speculative_generate, target_generate
from hf_eagle.decoding.verification import Sampling, Verdict, judge, keep_chosen
from hf_eagle.targets.target import FrozenTarget


VOCAB, LENGTH, DRAWS, LEVEL = 7, 3, 16_000, 1e-4
PROMPT = [3, 1, 4]
CHAIN = {"num_speculative_tokens": 3}
TREE = {"method": "tree", "depth": 3, "top_k": 3, "total_tokens": 8}
both = pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])


@pytest.fixture(scope="module")
def pair():
    target = make_target(vocab_size=VOCAB, num_hidden_layers=2, tap_ids=(0, 1, 2))
    return target, make_draft(target, tap_ids=[0, 1, 2], steps=30)


def expected_joint(target, temperature, top_p=1.0, sampling_top_k=None):
    """P(a, b, c) of the three tokens behind the prompt, `(VOCAB,) * 3`."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if sampling_top_k is not None:
        warpers.append(TopKLogitsWarper(sampling_top_k))
    warpers.append(TopPLogitsWarper(top_p))
    joint = torch.ones(VOCAB, VOCAB, VOCAB, dtype=torch.float64)
    for length in range(LENGTH):
        prefixes = torch.tensor([PROMPT + list(p) for p in itertools.product(range(VOCAB), repeat=length)])
        probs = warpers(None, target.model(prefixes).logits[:, -1]).double().softmax(-1)
        joint *= probs.view([VOCAB] * (length + 1) + [1] * (LENGTH - length - 1))
    return joint


def p_value(answers, expected):
    """Of Pearson's chi-square; cells that are expected fewer than five times are one cell."""
    flat = torch.tensor(answers) @ torch.tensor([VOCAB**2, VOCAB, 1])
    seen = torch.bincount(flat, minlength=VOCAB**LENGTH).double()
    wanted = expected.flatten() * len(answers)
    if seen[wanted == 0].any():
        return 0.0
    rare = wanted < 5
    seen, wanted = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, wanted))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2).double(), statistic / 2))


def draw(pair, shape, seed=0, draws=DRAWS, **sampling):
    prompts = torch.tensor([PROMPT]).repeat(draws, 1)
    generator = torch.Generator().manual_seed(seed)
    return speculative_generate(*pair, prompts, max_new_tokens=LENGTH, generator=generator, **shape, **sampling)


@both
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.5, "sampling_top_k": 4},
        {"temperature": 1.3, "top_p": 0.9, "sampling_top_k": 5},
    ],
    ids=["temperature", "top_p", "top_k", "both"],
)
def test_draws_follow_the_targets_distribution(pair, shape, sampling):
    out = draw(pair, shape, **sampling)
    assert p_value(out.answers, expected_joint(pair[0], **sampling)) > LEVEL
    # candidates are accepted and rejected, at the first place and behind an accepted one
    first, second = (sum(counts[k] for counts in out.accepted_per_position) for k in (0, 1))
    assert 0.1 < first / sum(out.drafts) < 0.95
    assert 0.05 < second / first < 0.95


def test_draws_follow_the_distribution_of_a_target_with_recurrent_layers():
    """Rows of a batch go on from the states of their own accepted tokens."""
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    target = FrozenTarget(tiny_model_type("minimax", **sizes), tap_ids=[0, 1, 2])
    draft = OracleDraft(target, [[*PROMPT, 2, 5, 1, 0, 6]] * DRAWS, right=1.0)

    out = draw((target, draft), CHAIN, temperature=1.0)
    assert p_value(out.answers, expected_joint(target, 1.0)) > LEVEL
    first, second = (sum(counts[k] for counts in out.accepted_per_position) for k in (0, 1))
    assert 0.05 < first / sum(out.drafts) < 0.95
    assert 0.02 < second / first < 0.95


def test_the_target_alone_draws_from_it_too(pair):
    prompts = torch.tensor([PROMPT]).repeat(DRAWS, 1)
    generator = torch.Generator().manual_seed(0)
    answers = target_generate(pair[0], prompts, max_new_tokens=LENGTH, temperature=1.0, generator=generator)
    assert p_value(answers, expected_joint(pair[0], 1.0)) > LEVEL


def one_by_one(accept, zero_rejected):
    """The rule as it is written down: candidates in turn, each accepted with `accept(p)`; then what is left."""

    def judge_one_by_one(logits, window, tree, deepest, sampling):
        rest = sampling.probabilities(logits)
        rows, size = window.shape
        every = torch.arange(rows)
        choices = torch.full((rows, size), -1)
        for node in range(1, size):
            parent = torch.full((rows,), node - 1) if tree is None else tree.parents[:, node]
            token = window[:, node]
            chance = accept(rest[every, parent, token])
            taken = (torch.rand(rows, generator=sampling.generator) < chance) & (choices[every, parent] == -1)
            choices[every, parent] = torch.where(taken, token, choices[every, parent])
            if zero_rejected:
                left = rest[every, parent].scatter(1, token[:, None], 0.0)
                rest[every, parent] = torch.where(left.sum(-1, keepdim=True) > 0, left, rest[every, parent])
                rest[every, parent] /= rest[every, parent].sum(-1, keepdim=True)
        drawn = torch.multinomial(rest.flatten(0, 1), 1, generator=sampling.generator).view(rows, size)
        return keep_chosen(torch.where(choices == -1, drawn, choices), window, tree, deepest)

    return judge_one_by_one


@both
@pytest.mark.parametrize(
    "rule, lossless",
    [
        (one_by_one(lambda p: p, zero_rejected=True), True),
        (one_by_one(lambda p: p**0.5, zero_rejected=True), False),
        (one_by_one(lambda p: p, zero_rejected=False), False),
    ],
    ids=["as_written", "square_root", "rejected_not_zeroed"],
)
def test_the_rule_as_written_passes_and_wrong_ones_are_caught(pair, shape, rule, lossless, monkeypatch):
    monkeypatch.setattr(generation, "judge", rule)
    out = draw(pair, shape, temperature=1.0)
    expected = expected_joint(pair[0], 1.0)
    value = p_value(out.answers, expected)
    if lossless:
        assert value > LEVEL
        return
    assert value < LEVEL / 1000
    seen = torch.bincount(torch.tensor(out.answers) @ torch.tensor([VOCAB**2, VOCAB, 1]), minlength=VOCAB**LENGTH)
    assert 0.5 * (seen / DRAWS - expected.flatten()).abs().sum() > 0.05


@both
def test_seeds_decide(pair, shape):
    first, same, other = (draw(pair, shape, seed=seed, draws=50, temperature=1.0).answers for seed in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize(
    "temperature, top_p, top_k", [(1.0, 1.0, None), (0.5, 0.7, None), (2.0, 1.0, 5), (1.2, 0.6, 9)]
)
def test_probabilities_are_those_of_transformers(temperature, top_p, top_k):
    logits = 3 * torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(None, logits).softmax(-1)
    torch.testing.assert_close(Sampling(temperature, top_p, top_k).probabilities(logits), expected)
    assert torch.equal(Sampling().choose(logits), logits.argmax(-1))


def test_a_flat_distribution_keeps_one_token_in_the_smallest_nucleus():
    probs = Sampling(1.0, top_p=1e-6).probabilities(torch.zeros(1, 10))
    assert (probs > 0).sum() == 1


def test_kept_paths_of_a_tree_in_words():
    from hf_eagle.decoding.tree import DraftTree

    #            root -> 1 (token 5) -> 3 (token 7) -> 5 (token 9)
    #                 -> 2 (token 6)    4 (token 8)
    parents = torch.tensor([[0, 0, 0, 1, 1, 3]])
    tree = DraftTree.of(torch.tensor([[5, 6, 7, 8, 9]]), parents, 3)
    window = torch.tensor([[1, 5, 6, 7, 8, 9]])
    for choices, path in (
        ([2, 0, 0, 0, 0, 0], []),
        ([6, 7, 3, 0, 0, 0], [2]),
        ([5, 8, 0, 9, 4, 0], [1, 4]),
        ([5, 7, 0, 9, 4, 2], [1, 3, 5]),
        ([0, 7, 0, 9, 0, 0], []),  # a right node below a wrong one is not reached
    ):
        verdict = keep_chosen(torch.tensor([choices]), window, tree, 3)
        assert isinstance(verdict, Verdict) and verdict.accepted.tolist() == [len(path)]
        assert verdict.path[0, : len(path) + 1].tolist() == [0, *path]
        assert verdict.chosen[0, : len(path) + 1].tolist() == [choices[node] for node in [0, *path]]
    chain = judge(torch.eye(9)[[5, 6, 1, 2]][None], torch.tensor([[3, 5, 6, 7]]), None, 3, Sampling())
    assert (chain.accepted.tolist(), chain.path) == ([2], None)
