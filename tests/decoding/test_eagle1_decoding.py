"""Decoding with an EAGLE-1 draft: lossless, with the counts of a simulation that knows neither caches nor our code."""

import pytest
import torch
from chain_models import generate, make_target, random_prompts
from decoding_reference import reference_decode
from reference_eagle1 import ReferenceEagle1, last_hidden
from replayed import replayed
from tiny import unrolled

from hf_eagle import Eagle1Config, FrozenTarget, LlamaForCausalLMEagle
from hf_eagle.decoding import speculative_generate
from hf_eagle.drafts.eagle1.training import FeatureObjective
from hf_eagle.drafts.training_base import HeadTeacher
from hf_eagle.losses.supervision import SupervisionPlan, supervised_steps


@pytest.fixture(scope="module")
def pair():
    """A target without taps, and a draft that was taught a little on its answers."""
    target = FrozenTarget(make_target().model)
    torch.manual_seed(1)
    draft = LlamaForCausalLMEagle(Eagle1Config.from_target(target.config))
    draft.attach(target)
    answers = generate(target, random_prompts(24, 4, seed=2), 30)
    plan = SupervisionPlan.of(supervised_steps(torch.ones_like(answers), torch.zeros_like(answers), 1))
    features, objective = target(answers).last_hidden, FeatureObjective(regression_weight=1.0, ce_weight=0.5)
    teacher = HeadTeacher(features.flatten(0, 1)[plan.positions], target.teacher_head(), torch.float32)
    bound = objective.bind(plan, teacher, 1 / plan.counts)
    optimizer = torch.optim.Adam([p for p in draft.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(80):
        loss = unrolled(draft, answers, features, rows=plan.rows, objective=bound).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return target, draft.eval()


@torch.no_grad()
def simulate(target, draft, prompt, count, max_new_tokens, falsify=lambda features: features):
    """(answer, drafts, accepted per position) of a chain; `falsify` changes the features of the target."""
    reference = ReferenceEagle1(draft, target.model)

    def propose(tokens):
        features, ids = list(falsify(last_hidden(target.model, tokens[:-1])[0])), tokens[1:]
        for _ in range(count):
            features.append(reference.predict(ids, features))
            ids = [*ids, int(reference.logits(features[-1]).argmax())]
        drafted = ids[-count:]
        return {tuple(drafted[: length + 1]) for length in range(count)}

    answer, drafts, counts, _ = reference_decode(target, propose, prompt, count, max_new_tokens, ())
    return answer, drafts, counts


@pytest.mark.parametrize("count", [1, 3, 4])
def test_chain_is_lossless_and_counts_equal_the_simulation(pair, count):
    target, draft = pair
    total = [0] * count
    for prompt in random_prompts(4, 5, seed=3):
        out = speculative_generate(target, draft, prompt[None], num_speculative_tokens=count, max_new_tokens=20)
        answer, drafts, counts = simulate(target, draft, prompt.tolist(), count, 20)
        assert torch.equal(out.sequences, generate(target, prompt[None], 20))
        assert out.answers == [answer]
        assert (out.drafts, out.accepted_per_position) == ([drafts], [counts])
        total = [seen + more for seen, more in zip(total, counts, strict=True)]
    assert 0 < total[-1] <= total[0]  # a draft that is never right would show nothing


def test_a_falsified_feature_is_seen_in_the_counts(pair):
    """Features in front of the target's final norm: the answer stays right and the counts do not."""
    target, draft = pair
    norm = target.parts.final_norm.weight
    ours, falsified = [], []
    for prompt in random_prompts(4, 5, seed=3):
        out = speculative_generate(target, draft, prompt[None], num_speculative_tokens=3, max_new_tokens=20)
        answer, drafts, counts = simulate(target, draft, prompt.tolist(), 3, 20, lambda f: f / norm * 0.5)
        assert out.answers == [answer]
        ours.append((out.drafts[0], out.accepted_per_position[0]))
        falsified.append((drafts, counts))
    assert ours != falsified


@pytest.mark.parametrize(
    "shape",
    [{"num_speculative_tokens": 3}, {"method": "tree", "depth": 3, "top_k": 4, "total_tokens": 12}],
    ids=["chain", "tree"],
)
def test_batches_and_trees_are_lossless(pair, shape):
    target, draft = pair
    prompts = [random_prompts(1, length, seed=20 + length)[0].tolist() for length in (1, 7, 3, 12)]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = speculative_generate(target, draft, ids, mask, max_new_tokens=18, **shape)
    for prompt, answer, counts in zip(prompts, out.answers, out.accepted_per_position, strict=True):
        assert answer == generate(target, torch.tensor([prompt]), 18)[0, len(prompt) :].tolist()
        assert counts[0] > 0


def test_a_tree_accepts_more_than_a_chain_of_its_depth(pair):
    target, draft = pair
    prompts = random_prompts(6, 5, seed=9)
    chain = speculative_generate(target, draft, prompts, num_speculative_tokens=4, max_new_tokens=30)
    tree = speculative_generate(
        target, draft, prompts, method="tree", depth=4, top_k=5, total_tokens=24, max_new_tokens=30
    )
    assert tree.answers == chain.answers and len(chain.answers[0]) == 30
    assert sum(tree.drafts) < sum(chain.drafts)


def test_replaying_answers_counts_as_decoding_does(pair):
    shapes = [{"num_speculative_tokens": 1}, {"num_speculative_tokens": 3}, {"method": "tree", "depth": 3, "top_k": 3}]
    shapes.append({"num_speculative_tokens": 3, "draft_window": 4})
    found = replayed(*pair, {"input_ids": random_prompts(5, 9, seed=3)}, shapes, 20)
    for decoded, again in found:
        assert again == decoded
    assert max(map(max, found[1][0])) > 0
