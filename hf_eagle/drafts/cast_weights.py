"""Cast a draft's weights for mixed precision once a batch, instead of at every step of its unroll.

Autocast keeps its casts only of weights that are trained, and only until the forward pass ends. So it casts anew the
frozen weights below an adapter, and every weight that gradient checkpointing uses again in the backward pass.
"""

from collections.abc import Callable

from torch import nn

from ..losses.fused_head import in_autocast


class CastWeights:
    """Weights and biases of all linear modules in the given ones, in autocast's dtype: made now, seen inside `with`.

    Gradients pass through the cast to the weights themselves. Nothing is made without autocast.

    Args:
        modules: whose linear modules are meant; they may run only inside `with`.

    Example:
        >>> casts = CastWeights(draft.midlayer)
        >>> with casts:
        ...     step = partial(checkpoint, casts.around(run_step))  # also in the backward pass
    """

    def __init__(self, *modules: nn.Module):
        self._casts = []
        for linear in (part for module in modules for part in module.modules() if isinstance(part, nn.Linear)):
            for name, own in linear.named_parameters(recurse=False):
                if (cast := in_autocast(own)) is not own:
                    self._casts.append((linear, name, cast))

    def __enter__(self) -> None:
        for linear, name, cast in self._casts:
            vars(linear)[name] = cast  # hides the parameter, which stays registered as it is

    def __exit__(self, *problem) -> None:
        for linear, name, _ in self._casts:
            del vars(linear)[name]

    def around(self, function: Callable) -> Callable:
        """The function, run inside `with`: for what is called behind it, as the backward pass repeats a checkpoint."""

        def run(*args):
            with self:
                return function(*args)

        return run
