"""A draft that is examined: its prompts, acceptance as it is, and all that is known of its training."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..door.json_files import read_json
from ..evaluation.measurement import Measurement
from .findings import Counts, Finding, counts_of
from .sample import Sample
from .training_data import TrainingData


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingFacts:
    """What a draft's folder tells of its training.

    Attributes:
        arguments: those that differ from their defaults.
        log: entries of the Trainer's log.
        measured: results of `hf-eagle evaluate` in the folder.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    log: list[dict] = field(default_factory=list)
    measured: list[dict] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path | None) -> "TrainingFacts":
        """Of a folder, as far as it holds these files; of a Hub id (`None`) nothing."""
        if folder is None:
            return cls()
        card = _read(folder / "card_facts.json", {"hyperparameters?": dict})
        state = _read(folder / "trainer_state.json", {"log_history?": [dict]})
        measured = [_read(path, {}) for path in sorted(folder.glob("acceptance*.json"))]
        return cls(
            card.get("hyperparameters", {}),
            state.get("log_history", []),
            [found for found in measured if isinstance(found.get("acceptance_length"), float)],
        )


def _read(path: Path, form: dict) -> dict:
    """A file's object; empty if there is none. One that cannot be read is left out, since it only adds evidence."""
    if not path.is_file():
        return {}
    try:
        return read_json(path, form)
    except ValueError as problem:
        logger.warning("The diagnosis goes on without a file: %s", problem)
        return {}


@dataclass
class Case:
    """A draft, its target and a sample of prompts.

    Attributes:
        draft: the draft, attached to the sample's target.
        sample: prompts and the target's answers.
        only: causes that are tried; all when empty.
        facts: what the draft's folder tells of its training.
        data: the training data, if known.
        bases: RoPE bases that the folder names besides the one in use.
        prompts_name: file name of the prompts.
        temperature: of the server, if it samples.
        trained_target: loads the target that the draft was trained for, if another one was named.
        in_float32: loads the draft in float32, if it runs in another dtype.
        base: acceptance as it is.
        tried: what was tried so far.
    """

    draft: Any
    sample: Sample
    only: frozenset[str] = frozenset()
    facts: TrainingFacts = field(default_factory=TrainingFacts)
    data: TrainingData | None = None
    bases: Sequence[float] = ()
    prompts_name: str | None = None
    temperature: float = 0.0
    trained_target: Callable[[], Any] | None = None
    in_float32: Callable[[], Any] | None = None
    base: Measurement | None = None
    tried: list["Tried"] = field(default_factory=list)

    @property
    def target(self):
        return self.sample.target

    @property
    def depth(self) -> int:
        """Tokens drafted in a round."""
        return self.sample.settings.shape.depth

    @property
    def counts(self) -> Counts:
        """Accepted tokens and drafts of each prompt, as it is."""
        return counts_of(self.base)

    @property
    def length(self) -> float | None:
        """The acceptance length as it is."""
        return self.base.acceptance_length()

    def wants(self, *causes: str) -> bool:
        """Whether one of these causes is to be tried."""
        return not self.only or bool(self.only & set(causes))


@dataclass(frozen=True)
class Tried:
    """A finding, and what decoding it again takes.

    Attributes:
        finding: what was found.
        again: decodes with the same change.
        changed: makes the changed draft, if it is the draft that is changed.
    """

    finding: Finding
    again: Callable[[], Measurement] | None = None
    changed: Callable[[], Any] | None = None
