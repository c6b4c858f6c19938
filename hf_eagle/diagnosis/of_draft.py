"""Trials that change the draft, or run it with another target: what may be repaired without training."""

from collections.abc import Iterator
from functools import partial

import torch

from ..drafts.probe import Probe
from .case import Case, Tried
from .findings import Finding, counts_of, gain_over
from .sample import Sample


def try_changes(case: Case) -> Iterator[Tried]:
    """Every change that this kind of draft knows, on the same answers."""
    by_taps: dict[tuple[int, ...] | None, list[Probe]] = {}
    for probe in case.draft.probes(case.target, case.bases):
        if case.wants(probe.cause):
            by_taps.setdefault(probe.tap_ids and tuple(probe.tap_ids), []).append(probe)

    for tap_ids, probes in by_taps.items():
        changed = [probe.changed(case.draft) for probe in probes]
        measured = case.sample.replayed(changed, tap_ids and list(tap_ids))
        for probe, measurement in zip(probes, measured, strict=True):
            found = gain_over(case.counts, counts_of(measurement))
            evidence = f"with {probe.change}, the same answers are accepted differently"
            finding = Finding(probe.cause, evidence, probe.change, **found, details={"shares": shares(measurement)})
            yield Tried(finding, partial(_decode, case, probe), partial(probe.changed, case.draft))


def shares(measurement) -> list[float]:
    """The share of rounds that accept at least 1, 2, ... tokens."""
    drafts = sum(run.drafts for run in measurement.runs)
    counts = [sum(values) for values in zip(*(run.accepted_per_position for run in measurement.runs), strict=True)]
    return [count / drafts if drafts else 0.0 for count in counts]


def _decode(case: Case, probe: Probe):
    return case.sample.decoded(probe.changed(case.draft), probe.tap_ids)


def try_float32(case: Case) -> Iterator[Tried]:
    """The draft in float32, if it runs in another dtype."""
    if case.in_float32 is None or not case.wants("dtype"):
        return
    draft = case.in_float32()
    (measurement,) = case.sample.replayed([draft])
    evidence = f"the draft runs in {str(case.draft.dtype).removeprefix('torch.')}"
    finding = Finding("dtype", evidence, "the draft in float32", **gain_over(case.counts, counts_of(measurement)))
    yield Tried(finding, partial(case.sample.decoded, draft))


def find_lost_norms(case: Case) -> Iterator[Tried]:
    """Norms whose weights are all one, where others are trained."""
    if not case.wants("lost_norms"):
        return
    norms = {name: x for name, x in case.draft.named_parameters() if "norm" in name and x.dim() == 1}
    lost = [name for name, x in norms.items() if bool((x == 1).all())]
    if 0 < len(lost) < len(norms):
        evidence = f"all weights of {', '.join(f'`{name}`' for name in lost)} are 1, while other norms are trained"
        yield Tried(Finding("lost_norms", evidence, seen=True, details={"tensors": lost}))


def try_trained_target(case: Case) -> Iterator[Tried]:
    """The target that the draft was trained for, if it was named."""
    if case.trained_target is None or not case.wants("target"):
        return

    other = case.trained_target()
    other.tap_ids = case.target.tap_ids
    sample = case.sample.like(target=other)
    draft = Probe("target", "", lambda draft: draft.attach(other)).changed(case.draft)
    (measurement,) = sample.replayed([draft])

    agreed = agreement(case.sample, other)
    evidence = f"the target that it was trained for says the same next token at {agreed:.1%} of places"
    found = gain_over(case.counts, counts_of(measurement))
    finding = Finding("target", evidence, "that target", **found, details={"agreement": agreed})
    yield Tried(finding, partial(sample.decoded, draft))


@torch.no_grad()
def agreement(sample: Sample, other) -> float:
    """The share of the answers' tokens, but the first ones, that another target finds most probable too."""
    same = total = 0
    there = sample.like(target=other)
    there.keep_answers_of(sample)
    for _, _, transcript in there.transcripts():
        if transcript.said is None:
            continue
        for row, (length, end) in enumerate(zip(transcript.prompts.lengths.host, transcript.ends, strict=True)):
            said = other.head_summary(transcript.said.last_hidden[row, : end - 1]).top
            same += int((said == transcript.ids[row, length + 1 : length + end]).sum())
            total += end - 1
    return same / max(total, 1)


def compare_with_folder(case: Case) -> Iterator[Tried]:
    """What the draft's folder says was measured with the same prompts and settings."""
    if not case.wants("measured_before"):
        return
    settings = case.sample.settings
    asked = {"num_speculative_tokens": case.depth, "max_new_tokens": settings.max_new_tokens, "method": "chain"}
    asked |= {"temperature": 0.0, "num_prompts": len(case.sample.prompts), "prompts": case.prompts_name, "turns": 1}
    for known in case.facts.measured:
        if all(known.get(name) == value for name, value in asked.items()):
            length = known["acceptance_length"]
            evidence = f"the draft's folder says {length:.3f} for these prompts, measured with {known.get('target')}"
            gain = length - case.length
            yield Tried(Finding("measured_before", evidence, None, length, gain, seen=gain > 0.05 * length))
