"""Draft a chain at every place of known answers at once, for drafts that run token by token.

The draft reads a document once, which gives the keys of all places and the first drafted token of each. Then all
chains go on together, as branches: each sees the keys up to its place and its own, and nothing of the others. A chain
ends with its first wrong token. So this costs less than the rounds of decoding, and needs no loop over them.
"""

from dataclasses import dataclass

import torch

from .caches import Lengths, SlotCache


_CHUNK = 1024  # tokens of a document that are read at once: masks stay small
_PLACES = 256  # chains that go on at once: logits stay small


@dataclass(frozen=True)
class Documents:
    """Prompts and answers as a draft is shown them.

    Attributes:
        features: `(batch, length, ...)`, what the draft's `select_features` returns.
        ids: `(batch, length + 1 or more)`: tokens, those after the ends of answers included.
        embeddings: `(batch, length, hidden)` to use instead of those of each NEXT token, see `select_embeddings`.
        positions: `(batch, length)`, or `(3, batch, length)` for a draft with m-RoPE.
        prompts: lengths of the prompts.
        ends: tokens of every answer.
    """

    features: torch.Tensor
    ids: torch.Tensor
    embeddings: torch.Tensor | None
    positions: torch.Tensor
    prompts: Lengths
    ends: list[int]

    def row(self, row: int) -> "Documents":
        """One of them."""
        first, embeddings = slice(row, row + 1), self.embeddings
        return Documents(
            self.features[first],
            self.ids[first],
            embeddings if embeddings is None else embeddings[first],
            self.positions[..., first, :],
            Lengths(self.prompts.host[first], self.prompts.device[first]),
            self.ends[first],
        )


def accepted_at_every_place(draft, documents: Documents, depth: int, window: int | None = None) -> list[list[int]]:
    """Return how many tokens of a chain of `depth` are right behind each token but the last of every answer."""
    found = []
    for row, end in enumerate(documents.ends):
        chains = _Chains(draft, documents.row(row), depth, window) if end > 1 else None
        found.append([] if chains is None else chains.accepted())
    return found


class _Chains:
    """All chains of one document."""

    def __init__(self, draft, document: Documents, depth: int, window: int | None):
        self.draft, self.document, self.depth, self.window = draft, document, depth, window
        # the features of the token before an answer's first one draft what follows the first one
        self.first = document.prompts.host[0] - 1
        self.length = self.first + document.ends[0] - 1
        self.cache = SlotCache(self._after(0), self.length + _PLACES * (depth - 1))

    def accepted(self) -> list[int]:
        normed, feedback = self._read()
        places = torch.arange(self.first, self.length, device=normed.device)
        parts = zip(*(x.split(_PLACES, dim=-1 if x is places else 1) for x in (places, normed, feedback)), strict=True)
        return [count for part in parts for count in self._continue(*part)]

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the keys of all places; return hidden states for the head and to feed back, of those with a chain."""
        document, found = self.document, []
        for begin in range(0, self.length, _CHUNK):
            part = slice(begin, min(begin + _CHUNK, self.length))
            places = torch.arange(part.start, part.stop, device=document.ids.device)
            self.cache.place(self._after(begin))

            mask = self._seen(places, places, part.stop)[None, None]
            hidden = self.draft.combine_features(document.features[:, part])
            embeddings = None if document.embeddings is None else document.embeddings[:, part]
            inputs = (document.ids[:, places + 1], hidden, document.positions[..., part])
            found.append(self.draft.decode(*inputs, self.cache, mask, embeddings))

        return tuple(torch.cat(parts, dim=1)[:, self.first :] for parts in zip(*found, strict=True))

    def _continue(self, places: torch.Tensor, normed: torch.Tensor, feedback: torch.Tensor) -> list[int]:
        """Draft from these places `(n,)` with hidden states `(1, n, hidden)`, and count right tokens."""
        draft, document, used = self.draft, self.document, 0
        accepted, chains = torch.zeros_like(places), torch.arange(len(places), device=places.device)
        own = places.new_empty(len(places), 0)  # slots of each chain's own keys

        for level in range(self.depth):
            tokens = draft.to_target_ids(draft.compute_logits(normed).argmax(-1))
            right = (tokens[0] == document.ids[0, places + 2 + level]).nonzero()[:, 0]
            if level == self.depth - 1 or not len(right):
                accepted[chains[right]] += 1
                break

            places, chains, tokens, feedback = places[right], chains[right], tokens[:, right], feedback[:, right]
            accepted[chains] += 1
            slots = self.length + used + torch.arange(len(right), device=places.device)
            own = torch.cat([own[right], slots[:, None]], dim=1)

            self.cache.place(self._after(self.length), skip=used)
            used += len(right)
            mask = self._seen(places, places + level + 1, self.length + used).scatter(1, own, True)
            positions = document.positions[..., places] + level + 1
            normed, feedback = draft.decode(tokens, feedback, positions, self.cache, mask[None, None])

        return accepted.tolist()

    def _seen(self, places: torch.Tensor, queries: torch.Tensor, slots: int) -> torch.Tensor:
        """Which slots a query sees: those up to its chain's place `(n,)`, within the window that ends at it."""
        slots = torch.arange(slots, device=places.device)
        seen = slots <= places[:, None]
        return seen if self.window is None else seen & (slots > queries[:, None] - self.window)

    def _after(self, length: int) -> Lengths:
        return Lengths([length], self.document.prompts.device.new_tensor([length]))
