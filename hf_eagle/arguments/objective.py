"""Arguments of the objective and its unroll, and the arguments that have no meaning for a kind of draft. No torch.

`training.EagleTrainingArguments` joins `EagleArguments` with `transformers.TrainingArguments`.
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

from ..drafts.kinds import KINDS, Kind
from .blocks import BlockTrainingArguments
from .bounds import Count, Depth, Mass, Weight, check_numbers
from .parser import EagleArgumentParser
from .parser import argument as _arg


# losses that read an argument, of those arguments that not every loss of a kind reads
_READ_BY = {"slot_decay": ("ce", "label"), "dpace_alpha": ("dpace",)}


@dataclass
class EagleArguments(BlockTrainingArguments):
    """EAGLE's own arguments for training a draft."""

    _argument_group_name = "eagle"

    ttt_steps: Depth | None = _arg(
        None,
        "Steps of the training-time test (TTT): how far the draft is unrolled on its own output. Unset: 7, but 1 for "
        "EAGLE-1.",
    )
    step_weight: Mass = _arg(0.8, "Weight of TTT step s is `step_weight ** s`, divided by the sum of all weights.")
    supervision: Literal["serving", "reference"] = _arg(
        "serving", "Rows that the loss counts: those that servers draft from, or the official code's (one row later)."
    )
    loss_window: Count | None = _arg(
        None,
        "EAGLE-3: train on at most so many rows of each conversation, side by side, drawn anew in each epoch. The "
        "target still reads all of it. With `draft_sliding_window`, the draft's cost then no longer grows with the "
        "length.",
    )
    loss: Literal["ce", "lk_alpha", "lk_lambda", "label", "dpace"] = _arg(
        "ce",
        "Soft cross-entropy to the target's distribution; EAGLE-3: or an LK loss (arXiv 2602.23881); DFlash: or "
        "`label`, cross-entropy to the tokens of the data, or `dpace`, which weights that by how likely it is that the "
        "slots before are right.",
    )
    oov_rows: Literal["mask", "renormalize"] = _arg(
        "mask", "Rows whose target token is not in the draft vocabulary: leave them out of the loss, or keep them."
    )
    lk_scale: Weight = _arg(1.0, "`lk_lambda`: cross-entropy has the share `lk_scale * exp(-lk_decay * mean alpha)`.")
    lk_decay: Weight = _arg(3.0, "`lk_lambda`: see `lk_scale`.")
    regression_weight: Weight = _arg(1.0, "EAGLE-1: weight of the smooth L1 loss on the predicted features.")
    ce_weight: Weight = _arg(0.1, "EAGLE-1: weight of the cross-entropy of what the target's head predicts.")
    feature_noise: Literal["none", "uniform", "gaussian"] = _arg(
        "uniform", "EAGLE-1: noise added to the target's features in training, as in the official code."
    )

    def __post_init__(self):
        check_numbers(self)

        if self.regression_weight + self.ce_weight == 0:
            raise ValueError("`regression_weight` and `ce_weight` must not both be 0, or nothing is learned.")

        for choice in (f for f in fields(EagleArguments) if get_origin(f.type) is Literal):
            allowed, value = get_args(choice.type), getattr(self, choice.name)
            if value not in allowed:
                raise ValueError(f"`{choice.name}` must be one of {', '.join(allowed)}, got {value!r}.")


def refuse_other_methods(kind: Kind, *groups) -> None:
    """Refuse arguments that are set but have no meaning for a kind of draft, and a loss that it has not.

    Args:
        kind: the kind of draft.
        groups: instances of any classes of arguments.

    Raises:
        ValueError: naming the first such argument.
    """
    for group in groups:
        for known in (f for f in fields(group) if f.name in kind.refused):
            value = getattr(group, known.name)
            if value != known.default and (known.name, value) not in kind.anyhow.items():
                others = [next(iter(k.methods)) for k in KINDS.values() if known.name not in k.refused]
                raise ValueError(
                    f"`{known.name}` is {value}, which means nothing to {kind.titled} draft: leave it out, or set "
                    f"`method` to {' or '.join(others)}."
                )

        loss = getattr(group, "loss", None)
        if loss is not None and "loss" not in kind.refused and loss not in kind.losses:
            raise ValueError(
                f"`loss` is {loss}, which {kind.titled} draft cannot be trained with: set it to one of "
                f"{', '.join(kind.losses)}."
            )
        _refuse_other_losses(kind, group, loss)


def _refuse_other_losses(kind: Kind, group, loss: str | None) -> None:
    """Refuse an argument of a kind's own that the chosen loss does not read."""
    for known in (f for f in fields(group) if f.name in kind.own):
        losses, value = _READ_BY.get(known.name), getattr(group, known.name)
        if losses is not None and loss not in losses and value != known.default:
            raise ValueError(
                f"`{known.name}` is {value:g}, which `loss` {loss} does not read: leave it out (its default is "
                f"{known.default:g}), or set `loss` to {' or '.join(losses)}."
            )


def parser_beside_trainer(groups: tuple, description: str | None, for_help: bool = False) -> EagleArgumentParser:
    """The parser of these groups and of the training's arguments.

    Args:
        groups: dataclasses of arguments.
        description: the text at the top of `--help`.
        for_help: whether to leave out the arguments of transformers, which load torch.
    """
    if for_help:
        return EagleArgumentParser((*groups, EagleArguments), description=description)
    from .training import EagleTrainingArguments

    return EagleArgumentParser((*groups, EagleTrainingArguments), description=description)
