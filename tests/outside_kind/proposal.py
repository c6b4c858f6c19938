"""What a block draft proposes in a round: the slots of one block, in one forward."""

import torch

from hf_eagle.decoding.caches import Lengths, SlotCache
from hf_eagle.decoding.proposal import Proposal, Proposer


class BlockProposer(Proposer):
    """Keeps the keys of the target's features; a block's own keys are forgotten with it.

    Args:
        draft ([`OutsideBlockDraft`]): the draft.
        shape: what is drafted in a round.
        prompts: the batch, before anything of it was decoded.

    Raises:
        ValueError: for a tree, or a chain longer than a block.
    """

    def __init__(self, draft, shape, prompts):
        slots = draft.config.block_size - 1
        if shape.tree or shape.depth > slots:
            asked = "a tree" if shape.tree else f"a chain of {shape.depth}"
            raise ValueError(f"This draft proposes chains of up to {slots} tokens, not {asked}.")
        self.draft, self.count = draft, shape.depth
        self.lengths = Lengths([0] * len(prompts.lengths.host), torch.zeros_like(prompts.lengths.device))
        self.cache = SlotCache(self.lengths, prompts.limit)

    def propose(self, features, next_ids, lengths, embeddings=None) -> Proposal:
        before, self.lengths = self.lengths, lengths
        rows, new = next_ids.shape
        key, value = self.draft.context(features, before.slots(new).expand(rows, -1))
        self.cache.place(before)
        key, value = (x.transpose(1, 2) for x in self.cache.update(key.transpose(1, 2), value.transpose(1, 2), 0))

        newest = next_ids.gather(1, (lengths.device - before.device - 1)[:, None])
        # a row's slots behind its own tokens hold nothing that means anything
        seen = torch.arange(key.shape[1], device=newest.device) < lengths.device[:, None]
        block = seen.new_ones(rows, self.draft.config.block_size)
        visible = torch.cat([seen, block], dim=1)[:, None].expand(-1, block.shape[1], -1)

        hidden = self.draft.fill(newest, lengths.device[:, None], key, value, visible)[:, 0, 1 : 1 + self.count]
        return Proposal(self.draft.to_target_ids(self.draft.compute_logits(hidden).argmax(-1)))

    def select(self, kept, kept_on_device) -> None:
        self.lengths = self.lengths.select(kept, kept_on_device)
        self.cache.select(kept_on_device)
