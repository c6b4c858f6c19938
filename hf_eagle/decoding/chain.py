"""The draft's side of decoding: its cache, its two kinds of steps, and the simplest use of them, a chain."""

import torch

from .caches import Lengths, SlotCache


class DraftRun:
    """A draft with the keys of all tokens whose target features it has seen.

    Args:
        draft: the draft, with the target's embeddings attached.
        lengths: the rows' lengths, all 0 at first.
        limit: tokens that a row will hold at most, drafted ones included.
        prompt_positions, moved: those of the [`TargetRun`], which a draft with m-RoPE follows.
        window: keys that a query sees, its own included, as servers count it; all when `None`.
    """

    def __init__(
        self,
        draft,
        lengths: Lengths,
        limit: int,
        prompt_positions: torch.Tensor | None = None,
        moved: torch.Tensor | None = None,
        window: int | None = None,
    ):
        self.draft, self.lengths, self.window = draft, lengths, window
        self.cache = SlotCache(lengths, limit)
        follows = draft.config.mrope_section is not None
        self.prompt_positions, self.moved = (prompt_positions, moved) if follows else (None, None)

    def catch_up(self, features: torch.Tensor, next_ids: torch.Tensor, lengths: Lengths, embeddings=None):
        """Run the newly verified tokens, and keep their keys.

        Args:
            features: `(rows, n, ...)` of the target at the tokens that the draft has not seen; what a row holds
                after its own new tokens is ignored.
            next_ids: `(rows, n)`, for each of them the NEXT token.
            lengths: verified tokens, these included.
            embeddings: `(rows, n, hidden)` to use instead of those of `next_ids`.

        Returns:
            Normed hidden states for the head and hidden states to feed back, of each row's last token: `(rows, 1,
            hidden)` each. The head predicts what follows the token in `next_ids`.
        """
        before, self.lengths = self.lengths, lengths
        count, first = next_ids.shape[1], self._first(before)
        self.cache.place(before, first=first)
        # rows of one length need no mask: the draft's default is causal
        mask = None
        if not before.uniform or (count > 1 and self._cuts(before, count)):
            causal = torch.ones(1, count, count, dtype=torch.bool, device=next_ids.device).tril()
            mask = self._windowed(before.visible(causal), before.slots(count))[:, None, :, first:]

        hidden = self.draft.combine_features(features)
        positions, self.prompt_positions = self.prompt_positions, None  # the prompt comes first, and only once
        if positions is None:
            positions = self._positions(before.slots(count), next_ids.shape[0])
        normed, feedback = self.draft.decode(next_ids, hidden, positions, self.cache, mask, embeddings)

        if before.uniform and lengths.uniform:
            # rows that have left the batch may have had more new tokens than those that remain
            last = slice(lengths.high - before.high - 1, lengths.high - before.high)
            return normed[:, last], feedback[:, last]
        last = (lengths.device - before.device - 1)[:, None, None].expand(-1, 1, normed.shape[-1])
        return normed.gather(1, last), feedback.gather(1, last)

    def step(self, tokens: torch.Tensor, feedback: torch.Tensor, level: int, seen: torch.Tensor | None = None):
        """Run drafted tokens on the draft's own hidden states; their keys last until the next `catch_up`.

        Args:
            tokens: `(rows, n)` target ids, all `level` places after the newest verified token.
            feedback: `(rows, n, hidden)` of their parents.
            level: 0 for what follows the newest verified token.
            seen: bool `(rows, n, drafted)`: which of the tokens drafted so far (these come last) each of them sees;
                `None` in a chain, where they see all.

        Returns:
            As `catch_up`, `(rows, n, hidden)` each.
        """
        rows, count = tokens.shape
        drafted = level + 1 if seen is None else seen.shape[2]
        mask, first = None, self._first(self.lengths, skip=level)
        if seen is not None or not self.lengths.uniform:
            if seen is None:
                seen = torch.ones(1, 1, drafted, dtype=torch.bool, device=tokens.device)
            mask = self._windowed(self.lengths.visible(seen), self.lengths.slots(1, skip=level))[:, None, :, first:]

        self.cache.place(self.lengths, skip=drafted - count, first=first)
        positions = self._positions(self.lengths.slots(1, skip=level), rows).expand(rows, count)
        return self.draft.decode(tokens, feedback, positions, self.cache, mask)

    def _first(self, lengths: Lengths, skip: int = 0) -> int:
        """The first slot that a query sees in any row, `skip` slots after these lengths or later."""
        return 0 if self.window is None else max(0, min(lengths.host) + skip + 1 - self.window)

    def _cuts(self, lengths: Lengths, count: int) -> bool:
        """Whether the window hides a key from the last of `count` tokens after these lengths."""
        return self.window is not None and lengths.high + count > self.window

    def _windowed(self, visible: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """`visible` `(rows, n, slots)` without keys behind the window of queries at `places` `(rows or 1, n or 1)`."""
        if self.window is None:
            return visible
        # a verified token's slot is its place; drafted ones lie inside the window, which is wider than a tree is deep
        slots = torch.arange(visible.shape[-1], device=visible.device)
        return visible & (slots > places[..., None] - self.window)

    def _positions(self, slots: torch.Tensor, rows: int) -> torch.Tensor:
        """`(rows, n)` positions of tokens in these slots `(rows or 1, n)`."""
        slots = slots.expand(rows, -1)
        return slots if self.moved is None else slots + self.moved[:, None]

    def select(self, kept: list[int], kept_on_device: torch.Tensor) -> None:
        self.lengths = self.lengths.select(kept, kept_on_device)
        self.cache.select(kept_on_device)
        self.moved = None if self.moved is None else self.moved[kept_on_device]
        if self.prompt_positions is not None:
            self.prompt_positions = self.prompt_positions[:, kept_on_device]


def propose_chain(run: DraftRun, normed: torch.Tensor, feedback: torch.Tensor, count: int) -> torch.Tensor:
    """
    Draft a chain of `count` tokens, each the draft's most probable one (EAGLE-3, arXiv 2503.01840, without its tree).

    Args:
        run ([`DraftRun`]): the draft, caught up with the target.
        normed, feedback: `(rows, 1, hidden)`, what `DraftRun.catch_up` returned.
        count (`int`): K.

    Returns:
        Target ids `(rows, count)`.
    """
    draft = run.draft
    tokens = [draft.to_target_ids(draft.compute_logits(normed).argmax(-1))]
    for level in range(count - 1):
        normed, feedback = run.step(tokens[-1], feedback, level)
        tokens.append(draft.to_target_ids(draft.compute_logits(normed).argmax(-1)))
    return torch.cat(tokens, dim=1)
