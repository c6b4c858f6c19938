"""Trials of what a sound draft cannot do: propose other tokens, go on by itself, read longer contexts, be sampled."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from ..drafts.vocabulary import count_supervised_tokens
from ..evaluation.contexts import acceptance_by_context, context_lengths
from ..evaluation.summary import summarize
from .bounds import (
    by_category,
    counts_at_places,
    counts_of_rounds,
    right_where_known,
    with_features,
    without_vocabulary,
)
from .case import Case, Tried
from .findings import Finding, counts_of, gain_over


_FEW = 20  # rounds in a bucket of context length from which its acceptance says something


def try_vocabulary(case: Case) -> Iterator[Tried]:
    """What the target says that the draft cannot propose, and what acceptance would be without that limit."""
    ids = case.draft.draft_ids
    if ids is None or not case.wants("vocabulary"):
        return
    accepted = case.sample.at_every_place(case.draft, case.depth)
    if accepted is None:
        return

    said, known = case.sample.said(), torch.zeros(case.draft.config.vocab_size, dtype=torch.bool)
    known[ids.cpu()] = True
    outside = [[not known[token] for token in answer + after] for answer, after in said]
    missing = [row[: len(answer)] for row, (answer, _) in zip(outside, said, strict=True)]
    total = sum(map(len, missing))
    share = sum(map(sum, missing)) / total
    by_kind = by_category(case.base, [(sum(row), len(row)) for row in missing])

    def bounded(larger: torch.Tensor) -> list[list[int]]:
        """What is accepted at every place, if the draft also knew the tokens of a larger vocabulary."""
        found = []
        for (answer, after), counts in zip(said, accepted, strict=True):
            tokens = torch.tensor(answer + after)
            found.append(without_vocabulary(counts, (~known & larger)[tokens].tolist(), case.depth))
        return found

    whole = gain_over(case.counts, counts_at_places(bounded(torch.ones_like(known))))
    likely = whole.get("gain", 0.0) * right_where_known(accepted, outside)
    sizes = {}
    for size, larger in _larger(case, known).items():
        sizes[str(size)] = gain_over(case.counts, counts_at_places(bounded(larger)))["acceptance_length"]

    worst = max(by_kind, key=lambda name: by_kind[name])
    evidence = f"{share:.1%} of the tokens that the target says cannot be proposed"
    evidence += f", most in {worst}: {by_kind[worst]:.1%}" if len(by_kind) > 1 else ""
    evidence += "".join(f"; at most {length:.3f} with {int(size):,} tokens" for size, length in sizes.items() if length)
    evidence += f"; {likely:+.3f} is likely with all, if they are accepted as often as those that can be proposed"
    details = {"missing": share, "missing_by_category": by_kind, "bound_by_size": sizes}
    finding = Finding("vocabulary", evidence, "every token known", **whole, bound=True, likely=likely, details=details)
    yield Tried(finding)


def _larger(case: Case, known: torch.Tensor) -> dict[int, torch.Tensor]:
    """Which tokens the next sizes would hold, by the training data's counts: twice as many, and so on."""
    if case.data is None:
        return {}
    counts = count_supervised_tokens(case.data.rows, len(known)).to(torch.float64)
    counts[known] = torch.inf
    order, found, size = counts.sort(descending=True, stable=True).indices, {}, 2 * int(known.sum())
    while size < len(known) and len(found) < 3:
        larger = torch.zeros_like(known)
        larger[order[:size]] = True
        found[size] = larger
        size *= 2
    return found


def try_features(case: Case) -> Iterator[Tried]:
    """What acceptance would be if the draft saw the target's features of its own drafted tokens too.

    A draft that learnt to go on from its own hidden states comes near it; one that was trained for a single step does
    not.
    """
    if not case.wants("ttt_steps") or case.depth < 2:
        return
    right = case.sample.at_every_place(case.draft, 1)
    if right is None:
        return
    fed = gain_over(case.counts, counts_at_places([with_features(row, case.depth) for row in right]))
    if "gain" not in fed:
        return

    # of what the features are worth, the part that is lost
    lost = fed["gain"] / max(fed["acceptance_length"] - 1, 1e-9)
    steps = case.facts.arguments.get("ttt_steps")
    evidence = f"{lost:.0%} of what is accepted with the target's features of drafted tokens is lost without them"
    evidence += "" if steps is None else f"; it was trained with `ttt_steps` {steps}"
    change = "the target's features of drafted tokens"
    yield Tried(Finding("ttt_steps", evidence, change, **fed, bound=True, details={"lost": lost}))


def compare_contexts(case: Case) -> Iterator[Tried]:
    """Rounds whose context is longer than any conversation in training, against the others."""
    longest = _trained_length(case)
    if longest is None or not case.wants("context"):
        return
    within, beyond = ([[] for _ in case.base.runs] for _ in range(2))
    for place, run in enumerate(case.base.runs):
        contexts = context_lengths(len(run.prompt_token_ids), run.accepted_by_round)
        for context, accepted in zip(contexts, run.accepted_by_round, strict=True):
            (within if context <= longest else beyond)[place].append(accepted)

    short, long = map(counts_of_rounds, (within, beyond))
    if min(sum(short[1]), sum(long[1])) < _FEW:
        return
    share, found = sum(long[1]) / sum(case.counts[1]), gain_over(long, short)
    evidence = f"{share:.0%} of the rounds draft beyond the {longest:,} tokens of the longest conversation in training"
    evidence += f": acceptance length {found['acceptance_length'] - found['gain']:.3f} there"
    found["gain"] = found["acceptance_length"] - case.length  # of the whole sample, whose rounds are not all beyond
    yield Tried(Finding("context", evidence, "no longer contexts than in training", **found, details={"share": share}))


def _trained_length(case: Case) -> int | None:
    """The longest context that the draft was trained on, if it is known."""
    return case.facts.arguments.get("max_length") or (case.data and case.data.longest)


def try_sampling(case: Case) -> Iterator[Tried]:
    """The server's temperature against greedy decoding."""
    if not case.temperature or not case.wants("sampling"):
        return
    decode = partial(case.sample.decoded, case.draft, temperature=case.temperature)
    sampled = decode()
    lost = gain_over(counts_of(sampled), case.counts)
    evidence = f"at temperature {case.temperature:g} the acceptance length is "
    evidence += "not measured" if sampled.acceptance_length() is None else f"{sampled.acceptance_length():.3f}"
    yield Tried(Finding("sampling", evidence, "greedy decoding", **lost))


def summary_of(case: Case) -> dict:
    """Acceptance as it is, see `summarize`: also by context length, and by the place in the answer.

    Buckets end at powers of two. `acceptance_by_answer_position` has the form of `acceptance_by_context`; there the
    context is the answer so far.
    """
    runs = case.base.runs
    prompts, answers = ([len(getattr(run, name)) for run in runs] for name in ("prompt_token_ids", "token_ids"))
    found = summarize(case.base, _powers(min(prompts), max(map(sum, zip(prompts, answers, strict=True)))))
    alone = [replace(run, prompt_token_ids=[]) for run in runs]
    found["acceptance_by_answer_position"] = acceptance_by_context(alone, _powers(8, max(answers)), case.depth)
    return found


def _powers(low: int, high: int) -> list[int]:
    """Powers of two above the one number and below the other."""
    return [2**power for power in range(24) if low < 2**power < high]
