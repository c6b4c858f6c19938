"""What is known of the steps of a run, and what is still on its way from the device."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


_KEPT = ("input_ids", "attention_mask", "loss_mask")  # enough of a batch to identify its records; the rest may be large


def runs_ahead(device: torch.device) -> bool:
    """Whether the host can queue copies from and to a device, and go on."""
    return device.type not in ("cpu", "mps")


class Fetch:
    """Numbers on their way to the host, all in one copy.

    A copy is queued behind what the device was asked for before it. So whoever reads late waits for that, and not for
    what the device was asked for since.

    Args:
        values: by name, each 0-d or 1-d, of one dtype and on one device.

    Attributes:
        is_late: whether reading at once would wait for the device.
    """

    def __init__(self, values: Mapping[str, torch.Tensor]):
        self._sizes = {name: x.shape for name, x in values.items()}
        joined = torch.cat([x.reshape(-1) for x in values.values()])

        self.is_late = runs_ahead(joined.device)
        self._values = joined.to("cpu", non_blocking=self.is_late)
        self._copied = None
        if self.is_late:
            self._copied = torch.get_device_module(joined.device).Event()
            self._copied.record()

    def read(self) -> dict[str, Any]:
        """The numbers by name, a list for 1-d values."""
        if self._copied is not None:
            self._copied.synchronize()

        numbers = iter(self._values.tolist())
        return {
            name: [next(numbers) for _ in range(size.numel())] if size else next(numbers)
            for name, size in self._sizes.items()
        }


@dataclass
class Seen:
    """A batch whose numbers are not checked yet.

    Attributes:
        step: of the batch, counted from 0.
        training: whether the batch was trained on, else it was evaluated.
        norm_step: the step whose gradient's norm is fetched with it.
        fetch: `loss`; of training also `rows`, and the `norm` if it was not checked before.
    """

    step: int
    training: bool
    norm_step: int = -1
    fetch: Fetch | None = None


@dataclass
class StepWatch:
    """What is known of the steps of a run, and what must still be fetched.

    Attributes:
        supervised: whether any step had a supervised row, including those before a checkpoint.
        supervised_step: the last step that had one, counted from 0.
        supervised_pass: whether this pass over the data had one, or began before this run resumed.
        untaught: steps since the start whose supervised rows all lay outside the draft's vocabulary.
        untaught_step: the last of them.
        norm: of the gradient of step `norm_step`, until it is fetched.
        pending: the last batch, until its numbers are checked.
        loss: of this rank in step `loss_step`, if it was not a number.
        held_out_loss: of this rank in an evaluation on several ranks, if it was not a number.
        batches: of the newest two steps and of `loss_step`, by step.
    """

    supervised: bool = False
    supervised_step: int = -1
    supervised_pass: bool = False
    untaught: int = 0
    untaught_step: int = -1
    norm: torch.Tensor | None = None
    norm_step: int = -1
    pending: Seen | None = None
    loss: float | None = None
    loss_step: int = -1
    held_out_loss: float | None = None
    batches: dict[int, list[dict[str, torch.Tensor]]] = field(default_factory=dict)

    @classmethod
    def resumed(cls, step: int) -> "StepWatch":
        """For a resumed run: a run without a supervised row leaves no checkpoint."""
        return cls(supervised=True, supervised_step=step - 1, supervised_pass=True)

    def saw(self, step: int, batch: Mapping[str, Any]) -> None:
        """Keep what identifies the records of a batch."""
        kept = (step - 1, step, self.loss_step)
        self.batches = {known: batches for known, batches in self.batches.items() if known in kept}
        self.batches.setdefault(step, []).append({name: batch[name] for name in _KEPT if name in batch})

    def counted(self, step: int, rows: float) -> None:
        """Note the supervised rows of a step."""
        if rows:
            self.supervised = self.supervised_pass = True
            self.supervised_step = step

    def saw_norm(self, norm: float, step: int) -> None:
        """Count the step of this norm if it had supervised rows, but a zero gradient on all ranks."""
        if norm == 0 and step == self.supervised_step != self.untaught_step:
            self.untaught += 1
            self.untaught_step = step
