"""How a DFlash draft is trained: on blocks at drawn anchors, against the target or the tokens of the data."""

from dataclasses import dataclass

import torch
from torch import nn

from ...losses.fused_head import FusedHeadLoss, LabelRows, StreamedRows
from ...losses.objectives import summed_by_step
from ...losses.output import EagleOutput, Objective
from ..training_base import DraftTraining, HeadTeacher, Lesson
from .configuration import DFlashConfig
from .mask_token import raise_for_mask_token, require_mask_token
from .plan import BlockPlan


@dataclass
class BlockObjective:
    """The loss of all slots that count, through the fused head, which never holds the logits of all of them.

    Args:
        loss: `"ce"` is soft cross-entropy to the target's distribution at the token before the slot's. `"label"` is
            `-log q_k`, of the probability of the slot's token. `"dpace"` is the same, times
            `sum_{j >= k} prod_{i <= j} ((1 - alpha) q_i + alpha)` over the slots j of the block that count; this
            weight has no gradient.
        alpha: of `"dpace"`.
    """

    loss: str = "ce"
    alpha: float = 0.5

    def bind(self, plan: BlockPlan, teacher: HeadTeacher | None, step_factors: torch.Tensor) -> Objective:
        """Build the callable that a draft's forward takes, for one batch.

        Args:
            plan: which slots count, and the token at each.
            teacher: the target; not needed for a loss of tokens.
            step_factors: `(slots,)`, the factor of each slot's summed loss in the final one.

        Returns:
            A function of hidden states `(slots, A, hidden)` and of the head.
        """

        def objective(hidden: torch.Tensor, head: nn.Module) -> EagleOutput:
            slots, blocks, _ = hidden.shape
            slot, block = plan.slot, plan.block
            x = hidden[slot, block]
            factor, weight = step_factors.float()[slot], None

            if self.loss == "ce":
                where = plan.where
                rows = StreamedRows(
                    *(teacher.hidden, teacher.logits, where, factor, head.transform, teacher.dtype),
                    ascending=plan.where_on_host,
                )
            else:
                rows = LabelRows(plan.labels, factor, head.transform)
            if self.loss == "dpace":
                with torch.no_grad():  # a pass of its own, because the weights need all slots
                    losses = FusedHeadLoss.apply(x, head.weight, rows, False)[1]
                    weight = self._weights(losses, slot, block, (slots, blocks))
                rows.factor = factor * weight

            loss, losses, hits = FusedHeadLoss.apply(x, head.weight, rows, torch.is_grad_enabled())
            right = torch.zeros(slots, blocks, dtype=torch.long, device=x.device)
            right[slot, block] = hits.long()
            return EagleOutput(
                loss=loss,
                loss_sums=summed_by_step(losses if weight is None else losses * weight, slot, slots),
                correct=right.sum(1),
                leading=right.cumprod(0).sum(1),  # a slot that does not count ends the run of right ones
            )

        return objective

    def _weights(self, losses: torch.Tensor, slot: torch.Tensor, block: torch.Tensor, shape) -> torch.Tensor:
        """D-PACE's weight of each row, from the rows' `-log q`."""
        reached = losses.new_zeros(shape)
        reached[slot, block] = (1 - self.alpha) * (-losses).exp() + self.alpha
        behind = reached.cumprod(0).flip(0).cumsum(0).flip(0)
        return behind[slot, block]


class DFlashTraining(DraftTraining):
    """Every slot after an anchor is a step.

    Args:
        objective: the loss.
        block_size: slots of a block, the anchor's included.
        num_anchors: blocks of a document, at most.
        mask_token_id: token in the slots to be filled, which no document may hold.
        slot_decay: slot k has the weight `exp(-(k - 1) / slot_decay)`, except with `"dpace"`.
    """

    def __init__(
        self,
        objective: BlockObjective,
        block_size: int,
        num_anchors: int = 512,
        mask_token_id: int | None = None,
        slot_decay: float = 4.0,
    ):
        self.objective, self.block_size, self.num_anchors = objective, block_size, num_anchors
        self.mask_token_id = mask_token_id
        even = objective.loss == "dpace"  # which has weights of its own, and is divided by the plain count
        places = torch.arange(block_size - 1)
        self.step_weights = torch.ones(block_size - 1) if even else torch.exp(-places / slot_decay)

    def step_factors(self, total: torch.Tensor, processes: int = 1) -> torch.Tensor:
        """All slots are divided by one number, the sum of all weights: a mean over slots, not of the slots' means."""
        weights = self.step_weights.to(total.device, non_blocking=True)
        return weights * processes / (weights * total).sum().clamp_min(torch.finfo(weights.dtype).tiny)

    def plan(self, batch, draw) -> BlockPlan:
        require_mask_token(self.mask_token_id)
        plan = BlockPlan.of(batch, self.block_size, self.num_anchors, draw)
        # only tokens that blocks see or predict: padding and filler may be any token
        seen = torch.cat(
            [batch["input_ids"].flatten()[torch.cat([plan.layout.keys, plan.layout.anchors])], plan.labels]
        )
        if bool((seen == self.mask_token_id).any()):
            # searched data were refused before, so this is a stream, and the run is under way
            raise_for_mask_token(self.mask_token_id, keeps=True)
        return plan

    def teach(self, target, draft, seen, plan, step_factors, dtype) -> Lesson:
        teacher = None
        if self.objective.loss == "ce":
            hidden = seen.last_hidden.flatten(0, 1)[plan.supervised.positions]
            teacher = HeadTeacher(hidden, target.teacher_head(), dtype)
        return Lesson(seen, self.objective.bind(plan, teacher, step_factors))


def training_for(args, config: DFlashConfig) -> DFlashTraining:
    """From the arguments of a run, see `EagleArguments`."""
    objective = BlockObjective(args.loss, args.dpace_alpha)
    return DFlashTraining(objective, config.block_size, args.num_anchors, config.mask_token_id, args.slot_decay)
