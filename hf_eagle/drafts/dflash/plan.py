"""The plan of a batch for block drafts: where blocks stand, which context each sees, and what it is compared with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from ...data.collators import any_packed, documents_of, number_documents
from ...losses.supervision import SupervisionPlan, supervised_steps
from ...targets.packed_attention import Segments
from ..drawn_rows import draw_apart
from ..flash_cpu import added_to
from ..flex_context import FlexMask
from ..training_base import Draw, PlanOfTensors


# rows of a chunk of attention. All of them score the keys that its last block sees, so small chunks waste less
_ROWS = 256


@dataclass
class BlockLayout:
    """The blocks of a `(batch, length)` grid, and the tokens whose context keys they need.

    A block sees the tokens before its anchor in the same document, so what follows the last anchor costs nothing.

    Attributes:
        size: rows of a block.
        anchors: `(A,)` flat ids `b * length + t` of the anchors, ascending.
        keys: `(K,)` flat ids of the tokens with a context key, ascending.
        begin, end: `(A,)`: a block sees `keys[begin:end]`. Both are in ascending order, with repeats.
    """

    size: int
    anchors: torch.Tensor
    keys: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor

    @classmethod
    def of(cls, size: int, anchors: torch.Tensor, documents: torch.Tensor) -> "BlockLayout":
        """For these anchors of a batch whose tokens belong to `documents` `(batch, length)`, each contiguous."""
        document = number_documents(documents)
        indices = torch.arange(document.numel())
        last = torch.full_like(indices, -1).scatter_reduce(0, document[anchors], anchors, "amax")
        needed = indices < last[document]  # strictly: an anchor has no features yet when its block is drafted
        keys, before = needed.nonzero()[:, 0], needed.cumsum(0) - needed.long()
        return cls(size, anchors, keys, torch.searchsorted(document[keys], document[anchors]), before[anchors])

    @property
    def rows(self) -> int:
        """Rows that go through the layers."""
        return self.size * len(self.anchors)

    @cached_property
    def chunks(self) -> list[tuple[slice, slice]]:
        """Runs of blocks of one document, each with the keys that its last block sees."""
        most, found = max(1, _ROWS // self.size), []
        begins, ends = self.begin.tolist(), self.end.tolist()
        for block, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            if found and found[-1][1].start == begin and block - found[-1][0].start < most:
                found[-1] = (slice(found[-1][0].start, block + 1), slice(begin, end))
            else:
                found.append((slice(block, block + 1), slice(begin, end)))

        return found

    def hidden(self, blocks: slice, keys: slice, dtype: torch.dtype) -> torch.Tensor:
        """What to add to a chunk's scores, `(1, 1, rows, keys)`: keys from a block's anchor on then weigh nothing."""
        unseen = torch.arange(keys.start, keys.stop, device=self.end.device) >= self.end[blocks, None]
        return added_to(unseen, dtype).repeat_interleave(self.size, dim=0)[None, None]

    @cached_property
    def flex_mask(self) -> FlexMask:
        """The context as `flex_attention` takes it, in places in `keys`: a row has that of the last key it sees, a
        document that of its first key."""
        keys = torch.arange(len(self.keys), device=self.end.device)
        document = self.begin[torch.searchsorted(self.begin, keys, right=True) - 1]
        return FlexMask.of(*(x.repeat_interleave(self.size) for x in (self.end - 1, self.begin)), keys, document)

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "BlockLayout":
        """The same layout, with each of its tensors changed, for instance moved; what was counted on the host stays."""
        changed = replace(self, **{f.name: change(getattr(self, f.name)) for f in fields(self) if f.name != "size"})
        changed.__dict__["chunks"] = self.chunks
        return changed


@dataclass
class BlockPlan(PlanOfTensors):
    """Which blocks are trained in a batch.

    Attributes:
        documents, packed, segments: as in [`BatchPlan`].
        layout: where the blocks stand, and what they see.
        anchor_positions, key_positions: `(A,)` and `(K,)`, where anchors and context tokens stand in their documents.
        supervised: slot `s + 1` of a block is step `s` here; a row is a block.
        slot, block: `(M,)`, the step and the block of each slot that counts, ordered by the position of its token.
        labels: `(M,)`, the token of each.
        where: `(M,)`, indices into `supervised.positions` of what each is compared with; they ascend.
        where_on_host: the same, always on the CPU.
    """

    documents: torch.Tensor
    packed: bool
    layout: BlockLayout
    anchor_positions: torch.Tensor
    key_positions: torch.Tensor
    supervised: SupervisionPlan
    slot: torch.Tensor
    block: torch.Tensor
    labels: torch.Tensor
    where: torch.Tensor
    where_on_host: torch.Tensor
    segments: Segments | None = None

    @property
    def counts(self) -> torch.Tensor:
        """`(slots,)`, in how many blocks each slot counts."""
        return self.supervised.counts

    @classmethod
    def of(cls, batch: Mapping[str, Any], size: int, num_anchors: int, draw: Draw) -> "BlockPlan":
        """Draw anchors in each document, and plan their blocks.

        A slot counts if the tokens from the anchor to it are supervised, all in one answer. An anchor needs a first
        slot that counts, and a token before it: a server's block has a prompt before it too.

        Args:
            batch: of a collator, on the CPU.
            size: slots of a block, the anchor's included.
            num_anchors: blocks of a document, at most.
            draw: where random choices come from.
        """
        ids, documents = batch["input_ids"], documents_of(batch)
        # at row t stands the block whose anchor is token t + 1: its slot s + 1 predicts token t + 2 + s
        counted = supervised_steps(batch["loss_mask"], documents, size - 1)
        counted &= draw_apart(ids, documents, counted[0], num_anchors, draw)
        supervised = SupervisionPlan.of(counted)
        layout = BlockLayout.of(size, supervised.rows + 1, documents)

        positions = batch.get("position_ids")
        if positions is None:
            positions = (documents >= 0).long().cumsum(1).sub(1).clamp_min(0)
        slot, block = supervised.counted.nonzero().unbind(1)
        # slots of several blocks that are about one token stand together: its distribution is made once
        order = (layout.anchors[block] + slot).argsort(stable=True)
        slot, block = slot[order], block[order]
        where = supervised.position_of[slot, block]

        return cls(
            documents=documents,
            packed=any_packed(documents),
            layout=layout,
            anchor_positions=positions.flatten()[layout.anchors],
            key_positions=positions.flatten()[layout.keys],
            supervised=supervised,
            slot=slot,
            block=block,
            labels=ids.flatten()[layout.anchors[block] + slot + 1],
            where=where,
            where_on_host=where,
            segments=Segments.of(documents),
        )

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "BlockPlan":
        """The same plan, with each of its tensors changed, for instance moved; what was counted on the host stays."""
        named = ("documents", "anchor_positions", "key_positions", "slot", "block", "labels", "where")
        return replace(
            self,
            **{name: change(getattr(self, name)) for name in named},
            layout=self.layout.each(change),
            supervised=self.supervised.each(change),
            segments=None if self.segments is None else self.segments.each(change),
        )
