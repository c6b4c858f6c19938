"""Tiny drafts that know the target's greedy answers to a few prompts well, so that each fault costs something."""

import torch
from chain_models import VOCAB, generate, make_target
from tiny import unrolled
from tiny_blocks import shaken
from tiny_tokenizer import word_tokenizer
from torch.nn.functional import cross_entropy

from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.eagle3.configuration import EagleConfig
from hf_eagle.drafts.vocabulary import VocabularyMapping
from hf_eagle.evaluation.prompts import Prompt, encode_prompt


# as the tokenizer's own, with marked answers, which end
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s> {% endgeneration %}"
    "{% else %}{{ m.content }} w1 {% endif %}{% endfor %}"
)
TAPS, LAYERS, EOS, ANSWER = [1, 3, 4], 6, 9, 24


def target_and_tokenizer(**overrides):
    """A target of six layers, and a tokenizer of words whose token 9 ends an answer."""
    shape = {"num_hidden_layers": LAYERS, "initializer_range": 0.2}  # layers that differ
    target = make_target(tap_ids=TAPS, **shape | overrides)
    tokenizer = word_tokenizer(VOCAB, EOS)
    tokenizer.chat_template = TEMPLATE
    return target, tokenizer


def word_prompts(count=6, words=6, seed=8, system=None):
    """Prompts of random words, of two categories."""
    generator = torch.Generator().manual_seed(seed)
    texts = [" ".join(f"w{10 + i}" for i in torch.randint(50, (words,), generator=generator)) for _ in range(count)]
    before = [] if system is None else [{"role": "system", "content": system}]
    return [
        Prompt([*before, {"role": "user", "content": text}], "even" if i % 2 == 0 else "odd", f"p{i}")
        for i, text in enumerate(texts)
    ]


def taught(target, tokenizer, prompts, steps=150, ttt_steps=3, draft_vocab_size=None, answers=None, **fields):
    """A draft that was taught the target's answers to these prompts.

    Args:
        prompts: of equally many words.
        steps: of training.
        ttt_steps: of its unroll.
        draft_vocab_size: how many of the tokens that are said most it can propose.
        answers: `(prompts, tokens)` with their prompts, instead of the target's.
        fields: of its config.
    """
    ids = torch.tensor([encode_prompt(prompt, tokenizer) for prompt in prompts])
    texts = generate(target, ids, ANSWER + ttt_steps) if answers is None else answers
    config = EagleConfig.from_target(target.config, draft_vocab_size, list(target.tap_ids), **fields)
    own = torch.arange(VOCAB)
    mapping = None
    if draft_vocab_size is not None:
        counts = torch.bincount(texts[:, ids.shape[1] :].flatten(), minlength=VOCAB)
        mapping = VocabularyMapping.from_token_ids(counts.topk(draft_vocab_size).indices, VOCAB)
        own = mapping.t2d.nonzero()[:, 0]

    torch.manual_seed(1)
    draft = shaken(new_draft(config, target.embedding_weight(), mapping, target.head_weight()))
    to_draft = torch.full((VOCAB,), -100)
    to_draft[own] = torch.arange(len(own))

    taps, length = target(texts).taps, texts.shape[1]
    rows = torch.arange(texts.numel()).view(texts.shape)[:, ids.shape[1] - 1 : length - ttt_steps - 1].flatten()
    optimizer = torch.optim.Adam([p for p in draft.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        hidden = unrolled(draft, texts, taps, rows=rows, num_steps=ttt_steps).hidden_states
        labels = [to_draft[texts.flatten()[rows + 2 + step]] for step in range(ttt_steps)]
        loss = sum(cross_entropy(draft.lm_head(h), label) for h, label in zip(hidden, labels, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return draft.eval()
