"""A draft that knows the target's answers and is often right: rounds accept all, some and none of what it proposes."""

from types import SimpleNamespace

import torch
from torch import nn

from hf_eagle.decoding.proposal import Proposal, Proposer
from hf_eagle.drafts.configuration_base import DraftConfig


class OracleDraft(nn.Module):
    """
    Args:
        target: the target.
        answers: what is to come, prompts and answers, a list of ids for each row.
        right: the share of drafted tokens that are right.
    """

    def __init__(self, target, answers: list[list[int]], right: float = 0.7, seed: int = 0):
        super().__init__()
        self.answers, self.right, self.seed = answers, right, seed
        vocab, taps = target.vocab_size, len(target.tap_ids or [])
        self.config = SimpleNamespace(
            vocab_size=vocab,
            draft_vocab_size=vocab,
            tap_ids=None,
            num_taps=taps,
            chain_length=DraftConfig.chain_length,
            draft_sliding_window=None,
        )
        self.config.hidden_size = target.hidden_size

    def select_features(self, features):
        return features.last_hidden

    def select_embeddings(self, features):
        return None

    def proposer(self, shape, prompts):
        return _Oracle(self, shape.depth)


class _Oracle(Proposer):
    def __init__(self, draft, count):
        self.draft, self.count, self.rows = draft, count, list(range(len(draft.answers)))
        self.generator = torch.Generator().manual_seed(draft.seed)

    def propose(self, features, next_ids, lengths, embeddings=None):
        tokens = []
        for row, length in zip(self.rows, lengths.host, strict=True):
            coming = self.draft.answers[row][length + 1 : length + 1 + self.count]
            tokens.append(coming + [1] * (self.count - len(coming)))
        tokens = torch.tensor(tokens)
        wrong = torch.rand(tokens.shape, generator=self.generator) > self.draft.right
        return Proposal(torch.where(wrong, (tokens + 1) % self.draft.config.vocab_size, tokens))

    def select(self, kept, kept_on_device):
        self.rows = [self.rows[place] for place in kept]
