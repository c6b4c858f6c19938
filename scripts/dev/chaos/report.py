"""What came of the trials: a line each, a table, and JSON."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path

from .plan import Trial
from .trial import Outcome


class Report:
    """Adds up outcomes.

    Args:
        seed: of the trials.
    """

    def __init__(self, seed: int):
        self.seed, self.outcomes, self.seconds = seed, [], 0.0

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.wrong]

    def add(self, outcome: Outcome, folder: Path) -> None:
        """Take up an outcome, and print it."""
        self.outcomes.append(outcome)
        told = f"{outcome.runs} runs, {outcome.seconds:.1f} s"
        if not outcome.wrong:
            print(f"  survived ({told})", flush=True)
            return
        number = outcome.trial.number
        print(f"  FAILED ({told}); its folder is {folder / f'trial-{number}'}")
        print(*(f"  - {sentence}" for sentence in outcome.wrong), sep="\n")
        print(f"  again: python scripts/dev/chaos.py --seed {self.seed} --trial {number}", flush=True)

    def as_json(self) -> dict:
        """Counts by fault, by moment and by value of each axis, and the trials that failed."""
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "trials": len(self.outcomes),
            "runs": sum(outcome.runs for outcome in self.outcomes),
            "faults": self._counts(lambda outcome: outcome.met),
            "axes": {
                axis: self._counts(lambda outcome, axis=axis: [str(asdict(outcome.trial.first)[axis])])
                for axis in (asdict(self.outcomes[0].trial.first) if self.outcomes else ())
            },
            "moments": self._counts(lambda outcome: [outcome.trial.blow.moment]),
            "resumed": self._counts(lambda outcome: [outcome.trial.change]),
            "failed": [outcome.as_json() for outcome in self.failed],
        }

    def _counts(self, names) -> dict[str, dict[str, int]]:
        met, survived = Counter(), Counter()
        for outcome in self.outcomes:
            met.update(names(outcome))
            survived.update(() if outcome.wrong else names(outcome))
        return {name: {"met": met[name], "survived": survived[name]} for name in sorted(met)}

    def summary(self) -> str:
        """A table for people."""
        found = self.as_json()
        met = sum(counts["met"] for counts in found["faults"].values())
        lines = [
            f"\n{found['trials']} trials, {found['runs']} runs, {met} faults in {self.seconds / 60:.1f} minutes "
            f"with seed {self.seed}; {len(self.failed)} trials failed"
        ]
        tables = {"fault": found["faults"], "struck while": found["moments"]}
        tables |= {"resumed with another": found["resumed"], **found["axes"]}
        for axis, counts in tables.items():
            told = ", ".join(f"{name} {x['survived']}/{x['met']}" for name, x in counts.items())
            lines.append(f"  {axis}: {told}")
        if self.failed:
            numbers = ", ".join(str(outcome.trial.number) for outcome in self.failed)
            lines.append(
                f"Failed: {numbers}; `python scripts/dev/chaos.py --seed {self.seed} --trial N` makes one again."
            )
        return "\n".join(lines)


def describe(trial: Trial) -> str:
    """A trial in one line."""
    told = trial.first
    parts = [told.draft, told.sampler, f"{told.ranks} x {told.accumulation}", told.wrapped, f"target {told.target}"]
    parts += [name for name in ("packing", "streaming", "acceptance") if getattr(told, name)]
    parts += [f"store {told.store}"] if told.store != "none" else []
    parts += [f"workers {told.workers}", f"save {told.save_steps}"]
    blows = [blow for blow in (trial.blow, trial.again) if blow]
    struck = " then ".join(f"{b.fault} @{b.moment} {b.step}.{b.nth} rank {b.rank}{'+' * b.everywhere}" for b in blows)
    change = f"{trial.second.ranks} x {trial.second.accumulation} {trial.second.wrapped}"
    return f"{', '.join(parts)} | {struck} | resumed: {trial.change} ({change})"
