"""Dynamic draft trees: the draft's own confidence decides where a tree grows (EAGLE-2, arXiv 2406.16858)."""

from dataclasses import dataclass

import torch

from .chain import DraftRun


@dataclass(frozen=True)
class DraftTree:
    """A tree of drafted tokens for every row of a batch. Node 0 is the newest verified token; parents come first.

    Attributes:
        tokens: target ids `(rows, n)` of the drafted nodes 1 to n.
        parents: `(rows, n + 1)`; the root is its own parent.
        depths: `(rows, n + 1)`, 0 for the root.
        ancestors: bool `(rows, n + 1, n + 1)`: whether node j is node i or lies between it and the root.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor

    @classmethod
    def of(cls, tokens: torch.Tensor, parents: torch.Tensor, depth: int) -> "DraftTree":
        """Build a tree of at most `depth` levels from tokens and parents."""
        rows, size = parents.shape
        own = torch.eye(size, dtype=torch.bool, device=parents.device).expand(rows, -1, -1)
        ancestors = own
        for _ in range(depth):
            ancestors = own | ancestors.gather(1, parents[..., None].expand(-1, -1, size))
        return cls(tokens, parents, ancestors.sum(-1) - 1, ancestors)


def max_nodes(depth: int, top_k: int) -> int:
    """Nodes scored in a tree: `top_k` below the root, then on each level `top_k` below each of `top_k` nodes."""
    return top_k + (depth - 1) * top_k**2


def propose_tree(
    run: DraftRun, normed: torch.Tensor, feedback: torch.Tensor, depth: int, top_k: int, total_tokens: int
) -> DraftTree:
    """
    Grow a tree of `depth` levels and keep its best nodes.

    A node's score is the sum of the draft's log-probabilities from the root to it. Each level expands the `top_k` best
    new nodes, every one into its `top_k` most probable tokens. The `total_tokens` best of all scored nodes are kept.
    They are connected, since a child never scores above its parent.

    Args:
        run ([`DraftRun`]): the draft, caught up with the target.
        normed, feedback: `(rows, 1, hidden)`, what `DraftRun.catch_up` returned.
        depth, top_k, total_tokens (`int`): the tree's shape; `total_tokens` is at most `max_nodes(depth, top_k)`.
    """
    draft, rows = run.draft, normed.shape[0]
    score, tokens = _best_children(draft, normed, normed.new_zeros(rows, 1, dtype=torch.float32), top_k)
    found = [(score, tokens, torch.zeros_like(tokens))]  # of every level: scores, tokens, parents among the candidates
    frontier = torch.arange(top_k, device=normed.device).expand(rows, -1)  # its nodes' places among the candidates
    feedback = feedback.expand(-1, top_k, -1)
    own = torch.eye(top_k, dtype=torch.bool, device=normed.device).expand(rows, -1, -1)
    seen, first = own, 0

    for level in range(depth - 1):
        normed, feedback = run.step(tokens, feedback, level, seen)
        scores, children = _best_children(draft, normed, score, top_k)
        found.append((scores, children, (frontier + 1).repeat_interleave(top_k, dim=1)))
        if level == depth - 2:
            break

        first += found[-2][0].shape[1]
        score, chosen = scores.topk(top_k, dim=1)
        parents = chosen // top_k  # places in the old frontier
        tokens, frontier = children.gather(1, chosen), first + chosen
        feedback = feedback.gather(1, parents[..., None].expand(-1, -1, feedback.shape[-1]))
        seen = torch.cat([seen.gather(1, parents[..., None].expand(-1, -1, seen.shape[2])), own], dim=2)

    return _prune(found, depth, total_tokens)


def _best_children(draft, normed: torch.Tensor, scores: torch.Tensor, top_k: int):
    """Scores and target ids, `(rows, n * top_k)` each, of the children of `n` nodes with these `scores` `(rows, n)`."""
    logits = draft.compute_logits(normed).float()
    best, ids = logits.topk(top_k, dim=-1)
    # rounding must not let a child score above its parent
    gains = (best - logits.logsumexp(-1, keepdim=True)).clamp_max(0.0)
    return (scores[..., None] + gains).flatten(1), draft.to_target_ids(ids).flatten(1)


def _prune(found: list, depth: int, total_tokens: int) -> DraftTree:
    """The tree of the best candidates."""
    scores, tokens, parents = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    # a stable sort keeps a parent, which comes first, before a child of the same score
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :total_tokens].sort(dim=1).values

    number = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.long, device=scores.device)
    number.scatter_(1, kept + 1, torch.arange(1, kept.shape[1] + 1, device=scores.device).expand_as(kept))

    parents = number.gather(1, parents.gather(1, kept))
    return DraftTree.of(tokens.gather(1, kept), torch.cat([torch.zeros_like(kept[:, :1]), parents], dim=1), depth)
