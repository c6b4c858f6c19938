"""Decoding with a DFlash draft: it proposes what the reference does, counts as a server counts, and is lossless."""

import copy

import pytest
import reference_dflash
import torch
from chain_models import VOCAB, generate, make_target, random_prompts
from datasets import Dataset
from tiny_blocks import options_of, shaken, tiny_block_pair
from tiny_tokenizer import word_tokenizer

from hf_eagle import EagleTrainer, EagleTrainingArguments, load_draft
from hf_eagle.decoding import speculative_generate, target_generate
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.dflash.configuration import config_for
from hf_eagle.evaluation.acceptance import measure_acceptance
from hf_eagle.evaluation.prompts import Prompt
from hf_eagle.training.acceptance import AcceptanceLengthCallback


SIZE = 4
PROMPTS = [Prompt([{"role": "user", "content": f"w{10 + i} w{20 + i} w{30 + 2 * i}"}], None, i) for i in range(4)]


@pytest.fixture(scope="module")
def target():
    return make_target()


def answers(target, length=30):
    return generate(target, random_prompts(24, 4, seed=2), length)


def rows_of(ids):
    return [{"input_ids": row.tolist(), "loss_mask": [0] * 4 + [1] * (len(row) - 4)} for row in ids]


@pytest.fixture(scope="module")
def trainer(target, tmp_path_factory):
    """Taught on the target's own answers; two layers, so that each has its own context."""
    folder = tmp_path_factory.mktemp("draft")
    mask = min(set(range(1, VOCAB)) - set(answers(target, 40).flatten().tolist()))  # what the target never says
    options = options_of(block_size=SIZE, draft_num_layers=2, tap_ids=[1, 2, 3], mask_token_id=mask)
    torch.manual_seed(1)
    config = config_for(target.config, options)
    draft = shaken(new_draft(config, target.embedding_weight(), head_weight=target.head_weight()))
    rows = Dataset.from_list(rows_of(answers(target)))
    args = EagleTrainingArguments(
        output_dir=str(folder),
        **{"max_steps": 60, "learning_rate": 6e-3, "per_device_train_batch_size": 8, "logging_steps": 20},
        **{"report_to": "none", "disable_tqdm": True, "seed": 5, "eval_strategy": "steps", "eval_steps": 60},
    )
    trainer = EagleTrainer(
        model=draft, args=args, target=target, train_dataset=rows, eval_dataset=rows.select(range(8))
    )
    trainer.add_callback(AcceptanceLengthCallback(trainer, word_tokenizer(VOCAB, 2), PROMPTS, max_new_tokens=16))
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def pair(target, trainer):
    target.tap_ids = trainer.model.config.tap_ids
    return target, load_draft(trainer.args.output_dir, target)


def counters(pair, folder, prompt, max_new_tokens, K, slip=False):
    """What a greedy server counts for one prompt, by the reference."""
    target, _ = pair
    ids = generate(target, prompt[None], max_new_tokens + K + 1)[0]
    draft = reference_dflash.Draft.load(folder)
    draft.slip = slip
    features, _ = reference_dflash.target_features(target.model.model, ids, draft.taps)
    given = (target.embedding_weight(), target.head_weight(), ids, features, len(prompt), max_new_tokens, K)
    anchors, accepted = reference_dflash.served_counters(draft, *given)
    return len(anchors), accepted


# ---- what it proposes ----


@pytest.mark.parametrize("K", [1, SIZE - 1, SIZE + 2])
def test_it_counts_what_a_greedy_server_counts(pair, trainer, K):
    target, draft = pair
    for prompt in random_prompts(4, 6, seed=9):
        asked = {"num_speculative_tokens": K, "max_new_tokens": 20}
        found = speculative_generate(target, draft, prompt[None], **asked)
        assert (found.drafts[0], found.accepted_per_position[0]) == counters(
            pair, trainer.args.output_dir, prompt, 20, K
        )


@pytest.mark.parametrize("layers", [1, 3])
def test_a_random_draft_does_too(layers, tmp_path):
    pair = tiny_block_pair(make_target(), block_size=SIZE, draft_num_layers=layers, tap_ids=[1, 3])
    pair[1].save_pretrained(tmp_path)
    for prompt in random_prompts(3, 5, seed=4):
        found = speculative_generate(*pair, prompt[None], max_new_tokens=12)
        assert (found.drafts[0], found.accepted_per_position[0]) == counters(pair, tmp_path, prompt, 12, SIZE - 1)


def test_a_key_norm_that_slips_is_told_apart(pair, trainer, monkeypatch):
    """vLLM's CPU build norms the context keys of all layers with the first layer's weight."""
    from hf_eagle.drafts.dflash.modeling import DFlashLayer

    target, draft = pair
    slipped, context = copy.deepcopy(draft), DFlashLayer.context
    first = slipped.layers[0].self_attn.k_norm

    def with_first_norm(self, seen, cos_sin):
        own, self.self_attn.k_norm = self.self_attn.k_norm, first
        try:
            return context(self, seen, cos_sin)
        finally:
            self.self_attn.k_norm = own

    monkeypatch.setattr(DFlashLayer, "context", with_first_norm)
    different = 0
    for prompt in random_prompts(6, 6, seed=9):
        found = speculative_generate(target, slipped, prompt[None], max_new_tokens=20)
        wanted = [counters(pair, trainer.args.output_dir, prompt, 20, SIZE - 1, slip) for slip in (True, False)]
        assert (found.drafts[0], found.accepted_per_position[0]) == wanted[0]
        different += wanted[0] != wanted[1]
    assert different


def test_context_keys_are_appended_and_never_changed(pair, monkeypatch):
    """A block's keys are overwritten, those of the context stay as they were first written."""
    from hf_eagle.drafts.dflash.proposal import DFlashProposer

    seen, propose = [], DFlashProposer.propose

    def keep(self, features, next_ids, lengths, embeddings=None):
        proposal = propose(self, features, next_ids, lengths, embeddings)
        seen.append((features.shape[1], [layer.keys[:, :, : lengths.high].clone() for layer in self.cache.layers]))
        return proposal

    monkeypatch.setattr(DFlashProposer, "propose", keep)
    speculative_generate(*pair, random_prompts(1, 6, seed=3), max_new_tokens=16)
    assert len(seen) > 2 and all(new <= SIZE for new, _ in seen[1:])  # only new tokens are read
    for (_, before), (_, after) in zip(seen, seen[1:], strict=False):
        for old, new in zip(before, after, strict=True):
            assert torch.equal(new[:, :, : old.shape[2]], old)


# ---- lossless ----


@pytest.mark.parametrize("count", [None, 1, 5])
def test_decoding_is_lossless_alone_and_in_a_batch(pair, count):
    target, draft = pair
    prompts = [prompt[-n:] for prompt, n in zip(random_prompts(5, 8, seed=9), (8, 3, 5, 2, 8), strict=True)]
    asked = {"num_speculative_tokens": count, "max_new_tokens": 20, "eos_token_ids": [5, 9]}
    alone = [speculative_generate(target, draft, prompt[None], **asked) for prompt in prompts]

    ids = torch.stack([torch.cat([prompt.new_zeros(8 - len(prompt)), prompt]) for prompt in prompts])
    mask = torch.stack([torch.arange(8) >= 8 - len(prompt) for prompt in prompts]).long()
    batch = speculative_generate(target, draft, ids, mask, **asked)
    answers = target_generate(target, ids, mask, max_new_tokens=20, eos_token_ids=[5, 9])
    assert batch.answers == answers == [out.answers[0] for out in alone]
    assert batch.accepted_per_position == [out.accepted_per_position[0] for out in alone]
    assert sum(map(sum, batch.accepted_per_position)) > 0
    assert len(batch.accepted_per_position[0]) == (count or SIZE - 1)


def test_sampling_is_lossless(pair):
    """The second and third token of many answers are distributed as the target's own."""
    target, draft = pair
    prompts, rows = random_prompts(1, 6, seed=3).expand(3000, -1), torch.arange(3000)
    how = {"max_new_tokens": 3, "temperature": 1.5, "sampling_top_k": 3}
    drawn = [
        decode(*models, prompts, generator=torch.Generator().manual_seed(seed), **how)
        for seed, (decode, models) in enumerate(((target_generate, (target,)), (speculative_generate, pair)))
    ]
    alone, drafted = (torch.tensor(getattr(x, "answers", x)) for x in drawn)
    for place in (1, 2):
        shares = [torch.bincount(ids[rows, place], minlength=VOCAB) / len(rows) for ids in (alone, drafted)]
        assert float((shares[0] - shares[1]).abs().sum()) < 0.12
    assert sum(map(sum, drawn[1].accepted_per_position)) > 0


def test_a_tree_is_refused(pair):
    with pytest.raises(ValueError, match="a DFlash draft proposes chains only"):
        speculative_generate(*pair, random_prompts(1, 4, seed=1), method="tree", max_new_tokens=4)


# ---- measured ----


def test_acceptance_is_measured_with_the_blocks_own_length(pair, trainer):
    logged = [x["eval_acceptance_length"] for x in trainer.state.log_history if "eval_acceptance_length" in x]
    found = measure_acceptance(*pair, word_tokenizer(VOCAB, 2), PROMPTS, max_new_tokens=16, progress=False)
    assert found["num_speculative_tokens"] == SIZE - 1 and found["identical_to_target"] is True
    assert found["acceptance_length"] == pytest.approx(logged[-1], abs=1e-3) and logged[-1] > 1.2


def test_the_estimate_is_what_decoding_counts(pair, trainer):
    """Every position of an answer as an anchor: the estimate is the mean of what a server accepts from each."""
    target, draft = pair
    ids = answers(target, 40)
    rows = Dataset.from_list(rows_of(ids[:, :34]))
    metrics = trainer.evaluate(rows)

    accepted = torch.zeros(SIZE - 1)
    for row in ids[:, :34]:
        features, _ = reference_dflash.target_features(target.model.model, row, draft.config.target_layer_ids)
        reference = reference_dflash.Draft.load(trainer.args.output_dir)
        given = (reference, target.embedding_weight(), target.head_weight(), row, features)
        for anchor in range(4, 33):
            right = (
                reference_dflash.draft_block(*given, anchor, SIZE - 1)[: 33 - anchor] == row[anchor + 1 : anchor + SIZE]
            )
            accepted[: len(right)] += right.int().cumprod(0)
    blocks = torch.tensor([len(ids) * (29 - k) for k in range(SIZE - 1)])
    assert metrics["eval_estimated_acceptance_length"] == pytest.approx(1 + float((accepted / blocks).sum()), abs=1e-3)


def test_training_lowers_the_loss_of_every_slot(trainer):
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1]["loss"] < history[0]["loss"] - 0.1
    for slot in range(SIZE - 1):
        assert history[-1][f"accuracy_step_{slot}"] > history[0][f"accuracy_step_{slot}"]
