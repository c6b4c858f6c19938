"""What a loss returns, and the form of a loss that a draft calls."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput


@dataclass
class EagleOutput(ModelOutput):
    """What a draft's forward returns.

    Attributes:
        loss: what to call `backward` on, 0-d.
        loss_sums: summed loss of each TTT step, `(steps,)`; carries no gradient.
        correct: number of rows of each step whose argmax is the target's, `(steps,)`.
        leading: number of rows of each step that are right at this step and at all before it, `(steps,)`; `None` if the
            objective does not count them.
        parts: summed parts of the loss by name, `(steps,)` each, if it has several; they carry no gradient.
        hidden_states: without an objective, the normed hidden states of every step, `(steps, N, hidden)`.
    """

    loss: torch.Tensor | None = None
    loss_sums: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    leading: torch.Tensor | None = None
    parts: dict[str, torch.Tensor] | None = None
    hidden_states: torch.Tensor | None = None


# (hidden states of all steps as the head takes them (steps, N, hidden), head) -> everything but `hidden_states`
Objective = Callable[[torch.Tensor, nn.Module], EagleOutput]
