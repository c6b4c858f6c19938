"""Print one line per log while a run trains: the step, the number of steps, the epoch, and the values."""

from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer


def log_line(logs: Mapping[str, Any], step: int, of: int) -> str:
    """Return a line such as `step 20 of 600, epoch 0.6667: loss 3.60412, learning_rate 9.33013e-05`.

    Args:
        logs: what is logged, by name.
        step: optimizer steps so far.
        of: those of the whole run; 0 without a run, as in an evaluation alone.
    """
    place = f"step {step}" + (f" of {of}" if of else "")
    if isinstance(logs.get("epoch"), int | float):
        place += f", epoch {logs['epoch']:.4f}"

    values = [
        f"{name} {_written(value)}" for name, value in logs.items() if name not in ("epoch", "total_flos", "step")
    ]
    return f"{place}: {', '.join(values)}"


def _written(value: Any) -> str:
    """Return a number with six digits, or more if it is large: all before its decimal point."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1e6 <= abs(value) < 1e15 else f"{value:.6g}"


class LineProgress(ProgressCallback):
    """The progress bar of `Trainer`, with lines above it that show the run's progress."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or logs is None:
            return

        line = log_line(logs, state.global_step, state.max_steps)
        if self.training_bar is None:  # after the end of training, where `Trainer` shows nothing
            print(line, flush=True)
        else:
            self.training_bar.write(line)


class LinePrinter(PrinterCallback):
    """Only these lines, if `disable_tqdm` is set."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_local_process_zero and logs is not None:
            print(log_line(logs, state.global_step, state.max_steps), flush=True)


def print_lines(trainer: Trainer) -> None:
    """Make a trainer print these lines instead of dictionaries; keep a notebook's table."""
    ours = {ProgressCallback: LineProgress, PrinterCallback: LinePrinter}
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [ours[type(known)]() if type(known) in ours else known for known in callbacks]
