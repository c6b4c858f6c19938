"""The head of a target: from hidden states after the final norm to logits, as in the target's own forward."""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from .architectures import logit_transform
from .few_rows import few_rows_linear
from .sharding import gathered


_ROWS = 256  # rows at a time of the identity that a weight is read with


class TargetHead:
    """A target's output head, and what its forward does after it (scaling, soft cap).

    A linear layer is taken apart into weight and bias, so that a draft vocabulary's rows can be computed alone. Any
    other layer (quantised, or with its own forward) is called as it is; its weight is read with the rows of an
    identity.

    Args:
        module: the head; it takes `(rows, hidden)`.
        config: the target's text config.
        sharded: whether the target is spread over ranks.

    Raises:
        ValueError: for a sharded target whose head is not a linear layer.
    """

    def __init__(self, module: nn.Module, config, sharded: bool = False):
        self.module, self.is_linear = module, _is_linear(module)
        self._transform, self._hidden_size = logit_transform(config), config.hidden_size

        if sharded and not self.is_linear:
            raise ValueError(
                f"The target's head is a {type(module).__name__}, which computes by itself, but `target_sharding` "
                "spreads linear layers of plain weights only: leave the head out when the target is quantised, or set "
                "`target_sharding` to none."
            )

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of a few places, `(..., hidden)`, in the way that is fastest for few."""
        if not self.is_linear:
            return self._transform(self.module(hidden))
        return self._transform(few_rows_linear(hidden, gathered(self.module.weight), gathered(self.module.bias)))

    def for_training(self, ids: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function `(..., hidden)` -> `(..., vocabulary)`, or of the tokens `ids` only; gathered once."""
        if not self.is_linear:

            @torch.no_grad()
            def by_module(hidden: torch.Tensor) -> torch.Tensor:
                logits = self._transform(self.module(hidden))
                return logits if ids is None else logits.index_select(-1, ids)

            return by_module

        weight, bias = gathered(self.module.weight), gathered(self.module.bias)
        if ids is not None:
            weight, bias = weight[ids], None if bias is None else bias[ids]

        @torch.no_grad()
        def logits(hidden: torch.Tensor) -> torch.Tensor:
            return self._transform(linear(hidden, weight, bias))

        return logits

    @torch.no_grad()
    def table(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """`(vocabulary, hidden)`, gathered if sharded; `dtype` is for a layer that is not linear."""
        if self.is_linear:
            return gathered(self.module.weight)

        identity = torch.eye(self._hidden_size, dtype=dtype, device=device)
        nothing = self.module(torch.zeros_like(identity[:1]))  # the bias
        return torch.cat([self.module(rows) - nothing for rows in identity.split(_ROWS)]).T.contiguous()


def _is_linear(module: nn.Module) -> bool:
    """Return whether a head is an `nn.Linear` with a weight of plain numbers."""
    weight = getattr(module, "weight", None)
    if type(module).forward is not nn.Linear.forward or not isinstance(weight, torch.Tensor):
        return False

    plain = isinstance(weight, DTensor) or type(weight.data) is torch.Tensor
    return plain and weight.is_floating_point() and weight.element_size() > 1


def plain_embedding(module: nn.Module) -> torch.Tensor:
    """`(vocabulary, hidden)`: an input embedding's table, gathered if sharded.

    Raises:
        ValueError: for a quantised one, which a draft cannot borrow.
    """
    weight = getattr(module, "weight", None)
    table = weight.data if isinstance(weight, torch.Tensor) else None
    plain = isinstance(table, DTensor) or type(table) is torch.Tensor

    if not (plain and table.is_floating_point() and table.element_size() > 1):
        raise ValueError(
            f"The target's input embedding is a {type(module).__name__} without a table of plain numbers, which a "
            "draft would borrow: leave the embedding out when the target is quantised."
        )

    return gathered(weight)
