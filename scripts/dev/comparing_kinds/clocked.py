"""Train one draft for so many minutes, as scripts/train_eagle.py does, and measure its acceptance on the way.

    python scripts/dev/comparing_kinds/clocked.py --config run.yaml --minutes 10 --points 5 [--cores 0,1]

The clock stands still while acceptance is measured. The learning rate follows the clock: a warm-up, and then a cosine
that ends with the time, however many steps that are. `trainer_state.json`, which is written last, holds each measured
`acceptance_length`, the `minutes_trained` at which it was, and the number of its `point`.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


SCRIPTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(SCRIPTS.parent), str(SCRIPTS)]

from transformers import TrainerCallback  # noqa: E402


WARM_UP = 0.03  # share of the time, as in the recipes


class Clock(TrainerCallback):
    """Ends training when its time is over, and measures at equal intervals until then, which does not count.

    Args:
        trainer: whose draft is measured; its log gets the measurements.
        measure: returns the draft's acceptance length.
        minutes: training time.
        points: number of measurements; the last is of the finished draft.
        now: the time in seconds.
    """

    def __init__(self, trainer, measure: Callable[[], float], minutes: float, points: int, now=time.perf_counter):
        self.trainer, self.measure, self.seconds, self.points, self.now = trainer, measure, 60 * minutes, points, now
        self.begun, self.paused, self.measured = now(), 0.0, 0

    def elapsed(self) -> float:
        """Seconds of training."""
        return self.now() - self.begun - self.paused

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = self.now()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate(self.elapsed() / self.seconds)

    def on_step_end(self, args, state, control, **kwargs):
        elapsed, should_log = self.elapsed(), control.should_log
        if elapsed < self.seconds * (self.measured + 1) / self.points:
            return

        # a slow step may pass several points, of which the last is then measured
        self.measured = min(self.points, int(elapsed / self.seconds * self.points))
        length = round(self.measure(), 4)
        self.trainer.log({"acceptance_length": length, "minutes_trained": elapsed / 60, "point": self.measured})
        control.should_log = should_log  # any log clears it, and would drop this step's loss
        control.should_training_stop = elapsed >= self.seconds
        self.paused = self.now() - self.begun - elapsed


def rate(share: float) -> float:
    """The factor of the learning rate after this share of the time."""
    if share < WARM_UP:
        return share / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - WARM_UP) / (1 - WARM_UP))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of scripts/train_eagle.py.")
    parser.add_argument("--minutes", type=float, required=True, help="Training time.")
    parser.add_argument("--points", type=int, default=5, help="Measurements.")
    parser.add_argument("--cores", help="Cores to run on, as 0,1; unset: all.")
    asked = parser.parse_args()
    if asked.cores:
        os.sched_setaffinity(0, {int(core) for core in asked.cores.split(",")})

    import train_eagle

    from hf_eagle.training.acceptance import AcceptanceLengthCallback

    build = train_eagle.build_trainer

    def build_clocked(*args):
        trainer = build(*args)
        measuring = next(c for c in trainer.callback_handler.callbacks if isinstance(c, AcceptanceLengthCallback))
        trainer.add_callback(Clock(trainer, measuring.measure, asked.minutes, asked.points))
        return trainer

    train_eagle.build_trainer = build_clocked
    sys.argv = ["train_eagle.py", "--config", asked.config]
    train_eagle.main()


if __name__ == "__main__":
    from hf_eagle.door.printer import run_verb

    run_verb(main)
