"""A tiny target whose greedy answers a tiny draft learns in a second, well enough to be right now and then."""

import torch
from tiny import unrolled
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_eagle.drafts.build import class_of
from hf_eagle.drafts.eagle3.configuration import EagleConfig
from hf_eagle.drafts.vocabulary import VocabularyMapping
from hf_eagle.targets.target import FrozenTarget


VOCAB, TTT_STEPS = 67, 3
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.12,  # wide enough that rounding never decides, narrow enough to be learnt
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)


def make_target(config_class=LlamaConfig, tap_ids=(0, 2, 3), **overrides):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**SHAPE | overrides), dtype=torch.float32)
    return FrozenTarget(model, tap_ids=list(tap_ids))


def random_prompts(count, length, seed, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab, (count, length), generator=generator)


def generate(target, input_ids, max_new_tokens, eos_token_ids=()):
    return target.model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=0,
    )


def make_draft(target, draft_vocab_size=None, tap_ids=None, steps=60, config_class=EagleConfig, **flags):
    """A draft that was taught a little on the target's own answers, so that it is right now and then."""
    torch.manual_seed(1)
    vocab = target.vocab_size
    config = config_class.from_target(target.config, draft_vocab_size=draft_vocab_size, tap_ids=tap_ids, **flags)
    draft = class_of(config.architectures)(config)
    draft.set_target_embeddings(target.embedding_weight())
    answers = generate(target, random_prompts(24, 4, seed=2, vocab=vocab), 30)
    if draft_vocab_size is not None:
        counts = torch.bincount(answers.flatten(), minlength=vocab)
        draft.set_vocabulary(VocabularyMapping.from_token_ids(counts.topk(draft_vocab_size).indices, vocab))

    to_draft = torch.full((vocab,), -100)
    own_ids = torch.arange(vocab) if draft.draft_ids is None else draft.draft_ids
    to_draft[own_ids] = torch.arange(len(own_ids))
    taps, length = target(answers).taps, answers.shape[1]
    rows = torch.arange(answers.numel()).view(answers.shape)[:, : length - TTT_STEPS - 1].flatten()
    optimizer = torch.optim.Adam([p for p in draft.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        hidden = unrolled(draft, answers, taps, rows=rows, num_steps=TTT_STEPS).hidden_states
        labels = [to_draft[answers.flatten()[rows + 2 + step]] for step in range(TTT_STEPS)]
        loss = sum(cross_entropy(draft.lm_head(h), label) for h, label in zip(hidden, labels, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return draft.eval()
