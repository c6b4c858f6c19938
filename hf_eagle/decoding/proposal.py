"""The form of a draft's proposal in a round, and how drafts that propose one token at a time build it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from .caches import Lengths
from .chain import DraftRun, propose_chain
from .checks import DraftShape
from .every_place import Documents, accepted_at_every_place
from .target_run import TargetRun
from .tree import DraftTree, propose_tree


@dataclass(frozen=True)
class Proposal:
    """The drafted tokens of a round.

    Attributes:
        tokens: target ids `(rows, n)`.
        tree: how they are connected; they follow each other when `None`.
    """

    tokens: torch.Tensor
    tree: DraftTree | None = None


class Proposer(ABC):
    """The draft's side of decoding a batch: it takes in verified tokens, and proposes the next ones."""

    @abstractmethod
    def propose(
        self,
        features: torch.Tensor,
        next_ids: torch.Tensor,
        lengths: Lengths,
        embeddings: torch.Tensor | None = None,
    ) -> Proposal:
        """Take in the tokens verified since the last round, and propose the next ones.

        Args:
            features: `(rows, n, ...)`, what the draft's `select_features` returns for the tokens that are new to it;
                what a row holds after its own new tokens is ignored.
            next_ids: `(rows, n)`, for each of them the NEXT token; the newest token of each row comes last.
            lengths: verified tokens of every row, with these and without the newest one.
            embeddings: `(rows, n, hidden)` to use instead of those of `next_ids`, see `select_embeddings`.
        """

    @abstractmethod
    def select(self, kept: list[int], kept_on_device: torch.Tensor) -> None:
        """Keep these rows of the batch only."""

    def replay(self, documents: Documents) -> list[list[int]] | None:
        """How many drafted tokens are right behind each token but the last of every answer, all found at once.

        `None`, as here, if it can only propose round after round. Nothing was proposed before, and nothing will be.
        """
        return None


class AutoregressiveProposer(Proposer):
    """Draft a chain or a tree, one token or level at a time, from the draft's own hidden states.

    Args:
        draft ([`UnrolledDraft`]): the draft, with the target's embeddings attached.
        shape: what is drafted.
        prompts: the batch, before anything of it was decoded.
    """

    def __init__(self, draft, shape: DraftShape, prompts: TargetRun):
        lengths = prompts.lengths
        nothing = Lengths([0] * len(lengths.host), torch.zeros_like(lengths.device))
        self.run = DraftRun(draft, nothing, prompts.limit, prompts.prompt_positions, prompts.moved, shape.window)
        self.shape = shape

    def propose(self, features, next_ids, lengths, embeddings=None) -> Proposal:
        shape, state = self.shape, self.run.catch_up(features, next_ids, lengths, embeddings)
        if not shape.tree:
            return Proposal(propose_chain(self.run, *state, shape.depth))

        tree = propose_tree(self.run, *state, shape.depth, shape.top_k, shape.total_tokens)
        return Proposal(tree.tokens, tree)

    def select(self, kept: list[int], kept_on_device: torch.Tensor) -> None:
        self.run.select(kept, kept_on_device)

    def replay(self, documents: Documents) -> list[list[int]] | None:
        shape = self.shape
        return None if shape.tree else accepted_at_every_place(self.run.draft, documents, shape.depth, shape.window)
