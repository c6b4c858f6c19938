"""Try all causes of low acceptance, one after the other, and rank those that hold."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .case import Case, Tried
from .causes import AT_ONCE, cause_of
from .findings import Finding
from .limits import compare_contexts, summary_of, try_features, try_sampling, try_vocabulary
from .of_data import compare_answers, compare_with_training, read_log, try_system_prompt, try_template
from .of_draft import compare_with_folder, find_lost_norms, try_changes, try_float32, try_trained_target
from .of_server import Server, check_server, try_server
from .opening import Opened, folder_findings


logger = logging.getLogger(__name__)

# in this order, since the server is explained by changes that were tried before
TRIALS: tuple[Callable[[Case], Any], ...] = (
    find_lost_norms,
    try_changes,
    try_float32,
    try_trained_target,
    try_template,
    try_system_prompt,
    compare_with_folder,
    compare_contexts,
    try_sampling,
    compare_answers,
    compare_with_training,
    read_log,
    try_vocabulary,
    try_features,
)


@dataclass(frozen=True)
class Diagnosis:
    """Why acceptance is low.

    Attributes:
        summary: acceptance as it is, see `summary_of`.
        decoded: acceptance length as it is, by decoding.
        causes: what holds, the first cause first.
        tried: what was tried and does not hold.
        repaired: makes the draft without the first cause that a change of it undoes.
    """

    summary: dict[str, Any]
    decoded: float | None
    causes: list[Finding]
    tried: list[Finding]
    repaired: Callable[[], Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """For the JSON file."""
        found = {name: [one.as_json() for one in getattr(self, name)] for name in ("causes", "tried")}
        found |= {"acceptance": self.summary, "decoded_acceptance_length": self.decoded}
        return {"headline": self.headline(), **found}

    def headline(self) -> dict[str, Any]:
        """What a card shows: acceptance by context length, and what the draft vocabulary lacks, if that was tried."""
        names = ("acceptance_length", "num_prompts", "acceptance_by_context")
        found = {name: self.summary[name] for name in names if name in self.summary}
        vocabulary = next((one for one in (*self.causes, *self.tried) if one.cause == "vocabulary"), None)
        if vocabulary is not None:
            shares = {name: vocabulary.details[name] for name in ("missing", "missing_by_category")}
            found["vocabulary"] = shares | {"acceptance_length": vocabulary.acceptance_length}
        return found


def diagnose(case: Case, opened: Opened | None = None, server: Server | None = None, confirm: bool = True) -> Diagnosis:
    """
    Find out why a draft accepts little.

    Args:
        case: draft, target and prompts, and what is known of the training.
        opened: what opening the draft's folder found.
        server: a vLLM that serves the draft to nobody else.
        confirm: decode with each change that is told, instead of replaying it only.

    Raises:
        ValueError: if nothing was drafted, or the server drafts another number of tokens.
    """
    if server is not None:
        check_server(case, server)
    (case.base,) = case.sample.replayed([case.draft])
    if case.length is None:
        raise ValueError(
            "The target answered all `prompts` with one token, so nothing was drafted: give others, or a larger "
            "`max_new_tokens`."
        )

    case.tried += [] if opened is None else folder_findings(case, opened)
    for trial in TRIALS:
        case.tried += trial(case)
    if server is not None:
        case.tried += try_server(case, server)

    causes = ranked(case)
    told = [_confirmed(one) for one in causes] if confirm else [one.finding for one in causes]
    decoded = case.sample.decoded(case.draft).acceptance_length() if confirm else None
    named = {one.finding.cause for one in causes}
    rest = [one.finding for one in case.tried if one.finding.cause not in named]
    repaired = next((one.changed for one in causes if one.changed is not None), None)
    return Diagnosis(summary_of(case), decoded, told, rest, repaired)


def ranked(case: Case) -> list[Tried]:
    """The best trial of each cause that holds: those that can be undone at once first, then by what is gained."""
    best: dict[str, Tried] = {}
    for one in case.tried:
        known = best.get(one.finding.cause)
        if one.finding.named(case.length) and (known is None or _gain(known) < _gain(one)):
            best[one.finding.cause] = one
    return sorted(best.values(), key=lambda one: (cause_of(one.finding.cause).group, -_gain(one)))


def _gain(one: Tried) -> float:
    return 0.0 if one.finding.gain is None else one.finding.gain


def _confirmed(one: Tried) -> Finding:
    """A finding with the length of decoding itself, if it can be undone at once."""
    if one.again is None or cause_of(one.finding.cause).group != AT_ONCE:
        return one.finding
    return replace(one.finding, decoded=one.again().acceptance_length())
