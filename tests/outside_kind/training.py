"""How a block draft is trained: on blocks behind drawn anchors, against the target's distributions."""

from dataclasses import dataclass, fields

import torch

from hf_eagle.data.collators import any_packed, documents_of, number_documents
from hf_eagle.drafts.training_base import BatchPlan, DraftTraining, Lesson
from hf_eagle.losses.objectives import DraftObjective
from hf_eagle.losses.supervision import SupervisionPlan, supervised_steps

from .configuration import BlockConfig


@dataclass
class BlockPlan(BatchPlan):
    """The blocks of one batch. An anchor is the newest token of a block; the draft sees the tokens before it.

    Attributes:
        documents, packed: as in [`BatchPlan`].
        positions: `(batch, length)`, where tokens stand in their documents.
        anchors: `(batch, A)`, columns of the anchors, ascending.
        real: bool `(batch, A)`, whether there is an anchor: rows differ in how many they have.
        supervised: slot `s + 1` of a block is step `s` here; `N` blocks, row by row.
    """

    documents: torch.Tensor
    packed: bool
    positions: torch.Tensor
    anchors: torch.Tensor
    real: torch.Tensor
    supervised: SupervisionPlan

    @property
    def counts(self) -> torch.Tensor:
        return self.supervised.counts

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "BlockPlan":
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "packed"}
        return BlockPlan(
            packed=self.packed, **{name: x.to(device, non_blocking=non_blocking) for name, x in named.items()}
        )


class BlockTraining(DraftTraining):
    """Every slot behind the anchor is a step, with the target's distribution at the token that it predicts.

    Args:
        objective: the loss.
        num_slots: slots that are trained, one less than the block's.
        num_anchors: blocks of an example, at most.
        slot_weight: the weight of slot `s + 1` is `slot_weight ** s`.
    """

    def __init__(self, objective: DraftObjective, num_slots: int, num_anchors: int, slot_weight: float = 0.8):
        self.objective, self.num_anchors = objective, num_anchors
        weights = torch.tensor([slot_weight**s for s in range(num_slots)])
        self.step_weights = weights / weights.sum()

    def plan(self, batch, draw) -> BlockPlan:
        documents = documents_of(batch)
        # tokens t + 1 .. t + 2 + s lie in one answer: with its anchor at t + 1, slot s + 1 of a block counts
        counted = supervised_steps(batch["loss_mask"], documents, self.steps)
        kept = self._drawn(batch["input_ids"], documents, counted[0], draw)

        most = int(kept.sum(1).max())
        before = kept.long().sort(dim=1, descending=True, stable=True).indices[:, :most]
        real = kept.gather(1, before)
        positions = batch.get("position_ids")
        return BlockPlan(
            documents=documents,
            packed=any_packed(documents),
            positions=(documents >= 0).long().cumsum(1).sub(1).clamp_min(0) if positions is None else positions,
            anchors=torch.where(real, before + 1, 0),
            real=real,
            supervised=SupervisionPlan.of(counted & kept),
        )

    def _drawn(self, input_ids, documents, candidates, draw) -> torch.Tensor:
        """Some of the candidates of each example, which is known by its tokens, wherever in a batch it lies."""
        number = number_documents(documents).view_as(documents)
        kept = torch.zeros_like(candidates)
        for example in number[documents >= 0].unique():
            inside = number == example
            places = (inside & candidates).nonzero()
            order = torch.randperm(len(places), generator=draw.generator(input_ids[inside]))
            kept[tuple(places[order[: self.num_anchors]].T)] = True
        return kept

    def teach(self, target, draft, seen, plan, step_factors, dtype) -> Lesson:
        positions = plan.supervised.positions
        teacher = target.distribution(
            seen.last_hidden.flatten(0, 1)[positions],
            draft.draft_ids,
            dtype=dtype,
            with_mass=self.objective.needs_mass,
            head_summary=None if seen.head_summary is None else seen.head_summary.at(positions),
        )
        return Lesson(seen, self.objective.bind(plan.supervised, teacher, step_factors, draft.head_operands))


def training_for(args, config: BlockConfig) -> BlockTraining:
    """By the arguments of a run, see `EagleArguments`."""
    objective = DraftObjective(args.loss, args.oov_rows, args.lk_scale, args.lk_decay)
    return BlockTraining(objective, config.block_size - 1, config.num_anchors, args.step_weight)
