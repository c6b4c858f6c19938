"""Stop a trainer when a signal asks for it: finish the current step, save a checkpoint, then end the run.

All ranks learn of the signal from a reduction that each step makes anyway. So they stop after the same step, whichever
rank got the signal. They learn in the same way that a rank had a loss that is not a number, see [`HealthMixin`].
"""

import signal
from functools import partial

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from .lost_batches import tell_lost_batches
from .signals import NAMES, SIGNALS, StopSignals, ending, leave_signals_to_parent
from .watch import Fetch


# for each signal whether a rank got it, and whether its loss is broken
_FLAGS = len(SIGNALS) + 1


class StopHere(Exception):
    """The run must stop, so its current evaluation, or a step that has only begun, is abandoned."""


def _random_states(device: torch.device) -> dict[torch.device, torch.Tensor]:
    """Return the states of the random generators that a forward pass uses."""
    cpu = {torch.device("cpu"): torch.get_rng_state()}
    return cpu if device.type == "cpu" else cpu | {device: torch.get_device_module(device).get_rng_state(device)}


def _set_random_states(states: dict[torch.device, torch.Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


class StoppingMixin:
    """Stops a run after a step, and saves it, when a signal asks for it; place it before [`SavingMixin`].

    Attributes:
        stops ([`StopSignals`]): the signals that this rank has received.
    """

    def __init__(self, *args, **kwargs):
        self.stops, self._hearing = StopSignals(), False
        self._begin()
        super().__init__(*args, **kwargs)
        self.add_callback(_Stopping(self))

    def _begin(self) -> None:
        self._known: signal.Signals | None = None  # the same on all ranks
        self._stop_sums: Fetch | None = None
        self._last_step: tuple | None = None  # the Trainer's arguments after it
        self._random: dict[torch.device, torch.Tensor] | None = None  # from just before the next step
        self.saved_step = self.ended_pass_at = -1

    def train(self, *args, **kwargs):
        """As in `Trainer`; SIGTERM and Ctrl-C end it after the current step, with a checkpoint.

        Raises:
            KeyboardInterrupt: for Ctrl-C, with a sentence about what was saved.
            SystemExit: for SIGTERM, with status 143 and that sentence as `message`.
        """
        self.stops = StopSignals(self.args.world_size == 1, self.is_world_process_zero())
        self._begin()

        with self.stops.heard():
            self._hearing = True
            try:
                return super().train(*args, **kwargs)
            except StopHere:
                if self._last_step is not None:
                    _set_random_states(self._random)  # as if the begun step had drawn nothing
                    args, kwargs = self._last_step
                    self._maybe_log_save_evaluate(*args, **kwargs)
                raise ending(self._known, f"Stopped by {NAMES[self._known]} before the first step.") from None
            finally:
                self._hearing = self.is_in_train = False

    def _get_dataloader(self, *args, **kwargs) -> DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        if inner.num_workers:
            inner.worker_init_fn = partial(leave_signals_to_parent, partial(tell_lost_batches, inner.worker_init_fn))

        return loader

    # ---- whether a rank must stop ----

    def _flags(self, device: torch.device) -> torch.Tensor:
        """Return whether this rank was asked to stop, and whether its loss is broken, `(signals + 1,)`; the sum over
        ranks says whether that is so on any of them."""
        flags = torch.zeros(_FLAGS, dtype=torch.long, device=device)
        if self.stops.asked in SIGNALS:
            flags[SIGNALS.index(self.stops.asked)] = 1  # filled where it is: a copy to the device would wait for it
        if self.watch.loss is not None:
            flags[-1] = 1
        return flags

    def _learn(self, sums: list[int]) -> None:
        """Keep the sum of all ranks' flags.

        Raises:
            FloatingPointError: if a rank's loss is not a number.
        """
        *asked_to_stop, broken = sums
        if broken:
            self.refuse_ranks_loss()
        self._known = next((x for x, asked in zip(SIGNALS, asked_to_stop, strict=True) if asked), self._known)

    def with_flags(self, counts: torch.Tensor) -> torch.Tensor:
        """Append this rank's flags to counts that will be summed over ranks."""
        return torch.cat([counts, self._flags(counts.device)])

    def without_flags(self, sums: torch.Tensor) -> torch.Tensor:
        """Split the flags off the sums of `with_flags`, and keep them until a value is fetched anyway."""
        self._stop_sums = None if self.stops.alone else Fetch({"sums": sums[-_FLAGS:]})
        self._random = None if self.stops.alone else _random_states(self.args.device)
        return sums[:-_FLAGS]

    def stop_in_front_of_step(self) -> None:
        """Stop several ranks before the coming step changes anything; call this on all at once.

        Raises:
            StopHere: if a rank was asked to stop.
        """
        if self._stop_sums is not None and self._to_stop() is not None and not self.stops.alone:
            raise StopHere

    def look_at(self, *args) -> None:
        """As in [`HealthMixin`]; the flags were sent before the target ran, so reading them does not wait for it."""
        super().look_at(*args)
        self.stop_in_front_of_step()

    def _to_stop(self) -> signal.Signals | None:
        """Return the signal that stops the run now, the same on all ranks; `None` without one."""
        if self.stops.alone:
            self._known = self.stops.asked  # newer than any reduction
        elif self._stop_sums is not None:
            self._learn(self._stop_sums.read()["sums"])
        self._stop_sums = None
        return self._known

    # ---- where a run stops ----

    def give_up_evaluation(self) -> None:
        """Abandon an evaluation during training, after a batch; call this on all ranks at once.

        Raises:
            StopHere: if a rank was asked to stop.
        """
        if not self._hearing:
            return
        if self._to_stop() is None and not self.stops.alone:
            self._learn(self.accelerator.reduce(self._flags(self.args.device), reduction="sum").tolist())

        if self._known is not None:
            raise StopHere

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        given_up, self._last_step = False, ((tr_loss, grad_norm, model, trial, *args), kwargs)
        if self._to_stop() is not None:
            # log the loss of these steps now: the resumed run averages over new ones
            self.control.should_log = self.args.logging_strategy != "no"

        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except StopHere:
            given_up = True  # `control.should_evaluate` stays set in the checkpoint: the resumed run evaluates first

        if self._to_stop() is None:
            return

        whole = self.state.global_step >= self.state.max_steps or self.control.should_training_stop
        if given_up or not (whole or self._before_end_of_pass()):
            self._stop(model, trial, given_up)

    def _before_end_of_pass(self) -> bool:
        """Return whether the last step of a pass is done, but not yet the work at the end of a pass."""
        return self.ended_pass_at != self.state.global_step and float(self.state.epoch).is_integer()

    def _stop(self, model, trial, given_up: bool) -> None:
        if self.args.save_strategy != SaveStrategy.NO and self.saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

        # a launcher ends all ranks as soon as one has ended, so wait until the checkpoint is finished
        self.accelerator.wait_for_everyone()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        raise ending(self._known, self._what_was_saved(trial, given_up))

    def _what_was_saved(self, trial, given_up: bool) -> str:
        stopped = f"Stopped by {NAMES[self._known]} after step {self.state.global_step}"
        if self.args.save_strategy == SaveStrategy.NO:
            return f"{stopped}; nothing was saved, since `save_strategy` is no."
        if not self.watch.supervised:
            return f"{stopped}; nothing was saved, since there was no supervised row yet."

        states = self.args.save_only_model
        without = " without its states (`save_only_model`)" if states else ""
        more = " --ignore_missing_state" if states else ""
        later = ", which begins with the interrupted evaluation" if given_up else ""

        return (
            f"{stopped}; {self._checkpoint_folder(trial)} is saved{without}: go on with "
            f"`--resume_from_checkpoint last{more}`{later}."
        )

    def make_up_evaluation(self) -> None:
        """Run the evaluation that the stop before this resumption interrupted; call this on all ranks at once."""
        kept = self.state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        if not (self.resumed and kept.get("should_evaluate") and self.args.eval_strategy != "no"):
            return

        best = self._evaluate(None, None)
        self._determine_best_metric(metrics=best, trial=None)


class _Stopping(TrainerCallback):
    """Tell a trainer of the events that its reaction to signals depends on."""

    def __init__(self, trainer: StoppingMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.make_up_evaluation()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer.ended_pass_at = state.global_step

    def on_save(self, args, state, control, **kwargs):
        self.trainer.saved_step = state.global_step

    def on_prediction_step(self, args, state, control, **kwargs):
        self.trainer.give_up_evaluation()
