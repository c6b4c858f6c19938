"""What a DFlash draft proposes in a round: the slots of one block, in one forward."""

import torch

from ...decoding.caches import Lengths, SlotCache
from ...decoding.proposal import Proposal, Proposer


class DFlashProposer(Proposer):
    """Keeps the keys of the target's features, and only appends to them; a block's own keys are overwritten.

    Args:
        draft ([`DFlashDraftModel`]): the draft.
        shape: what is drafted in a round: a chain of K tokens makes blocks of K + 1 slots.
        prompts: the batch, before anything of it was decoded.

    Raises:
        ValueError: for a tree.
    """

    def __init__(self, draft, shape, prompts):
        if shape.tree:
            raise ValueError("`method` is tree, but a DFlash draft proposes chains only: set it to chain.")
        self.draft, self.slots = draft, shape.depth + 1
        self.lengths = Lengths([0] * len(prompts.lengths.host), torch.zeros_like(prompts.lengths.device))
        self.cache = SlotCache(self.lengths, prompts.limit)

    def propose(self, features, next_ids, lengths, embeddings=None) -> Proposal:
        before, self.lengths = self.lengths, lengths
        rows, new = next_ids.shape
        self.cache.place(before)
        self.draft.read_context(features, before.slots(new).expand(rows, -1), self.cache)

        # the newest token has no features yet: it stands in the block, at the position after the context
        newest = next_ids.gather(1, (lengths.device - before.device - 1)[:, None]).expand(-1, self.slots)
        visible = None
        if not lengths.uniform:
            block = torch.ones(1, self.slots, self.slots, dtype=torch.bool, device=newest.device)
            visible = lengths.visible(block)[:, None]

        self.cache.place(lengths)
        hidden = self.draft.fill(newest, lengths.slots(self.slots).expand(rows, -1), self.cache, visible)
        return Proposal(self.draft.compute_logits(hidden[:, 1:]).argmax(-1))

    def select(self, kept, kept_on_device) -> None:
        self.lengths = self.lengths.select(kept, kept_on_device)
        self.cache.select(kept_on_device)
