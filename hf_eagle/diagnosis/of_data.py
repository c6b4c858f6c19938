"""Trials of what the draft is asked, against what it was trained on: template, system prompt, domain, answers."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from ..data.reading import parse_json
from ..evaluation.prompts import Prompt
from .bounds import by_category
from .case import Case, Tried
from .findings import Finding, counts_of, gain_over
from .training_data import coverage, runs_of, system_prompt


RARE = 0.05  # share of conversations up to which a system prompt is one that training never saw
OWN = 0.7  # share of the target's own tokens below which answers are not its own; sampled ones have more
STRANGE = 0.8  # part of the runs of tokens shared between conversations of training, below which others are strange
_GAP = 0.15  # of accuracy, between training and held-out data


def try_template(case: Case) -> Iterator[Tried]:
    """The options of the chat template that training had, if they are known and others are given here."""
    trained = case.facts.arguments.get("chat_template_kwargs")
    if trained is None or not case.wants("template"):
        return
    if isinstance(trained, str):
        trained = parse_json(trained, "`chat_template_kwargs` of the draft's folder")
    given = {name: x for name, x in (case.sample.template_kwargs or {}).items() if name != "tools"}
    if trained == given or not isinstance(trained, dict):
        return
    tools = {name: x for name, x in (case.sample.template_kwargs or {}).items() if name == "tools"}
    evidence = f"training rendered chats with {trained}, and these prompts are rendered with {given or 'no options'}"
    yield _asked_otherwise(case, "template", evidence, "the template options of training", template=trained | tools)


def try_system_prompt(case: Case) -> Iterator[Tried]:
    """The system prompt of most training conversations, if training hardly saw that of the prompts."""
    if case.data is None or not case.wants("system_prompt"):
        return
    known, prompts = case.data.system_prompts(), case.sample.prompts
    total, asked = known.total(), [system_prompt(prompt.messages) for prompt in prompts]
    rare = [known[text] <= RARE * total for text in asked]
    if sum(rare) < len(rare) / 2:
        return

    (usual, count), *_ = known.most_common(1)
    told = f"“{usual[:60]}”" if usual else "none"
    evidence = f"{sum(rare)} of {len(rare)} prompts have a system prompt that at most {RARE:.0%} of training has"
    evidence += f"; {count / total:.0%} of training has {told}"
    yield _asked_otherwise(
        case, "system_prompt", evidence, "the system prompt of training", [_told(prompt, usual) for prompt in prompts]
    )


def _told(prompt: Prompt, text: str) -> Prompt:
    """The same prompt with another system prompt; with none for an empty text."""
    messages = [message for message in prompt.messages if message["role"] != "system"]
    return replace(prompt, messages=[{"role": "system", "content": text}, *messages] if text else messages)


def _asked_otherwise(
    case: Case,
    cause: str,
    evidence: str,
    change: str,
    prompts: list[Prompt] | None = None,
    template: dict | None = None,
) -> Tried:
    """Ask the target anew, and count what the draft accepts of these answers."""
    sample = case.sample.like(prompts, template_kwargs=template)
    (measurement,) = sample.replayed([case.draft])
    finding = Finding(cause, evidence, change, **gain_over(case.counts, counts_of(measurement)))
    return Tried(finding, partial(sample.decoded, case.draft))


def compare_with_training(case: Case) -> Iterator[Tried]:
    """Prompts of the training data against these: of another domain if their runs of tokens differ, else overfit."""
    if case.data is None or not case.wants("domain", "overfit"):
        return
    prompts = case.data.prompts(len(case.sample.prompts))
    if not prompts:
        return
    (measurement,) = case.sample.like(prompts).replayed([case.draft])
    found = gain_over(case.counts, counts_of(measurement))

    seen, alike = case.data.runs_seen(), case.data.own_coverage()
    answers = [answer for answer, _ in case.sample.said()]
    shared = coverage(answers, seen)
    pairs = [(sum(run in seen for run in runs_of(answer)), max(len(answer) - 2, 0)) for answer in answers]
    by_kind = by_category(case.base, pairs)

    strange = shared < STRANGE * alike
    least = min(by_kind, key=lambda name: by_kind[name], default="all")
    evidence = f"{shared:.0%} of the runs of three tokens in these answers occur in training, {alike:.0%} between "
    evidence += "conversations of training"
    evidence += f"; fewest in {least}: {by_kind[least]:.0%}" if len(by_kind) > 1 else ""
    details = {"runs_seen": shared, "runs_seen_between_conversations": alike, "runs_seen_by_category": by_kind}
    cause = "domain" if strange else "overfit"
    yield Tried(Finding(cause, evidence, "prompts of the training data", **found, details=details))


def compare_answers(case: Case) -> Iterator[Tried]:
    """How much of the training answers the target would say itself."""
    if case.data is None or not case.wants("answers"):
        return
    share = case.data.share_of_own_answers(case.target)
    evidence = f"the target finds {share:.1%} of the trained tokens the most probable ones"
    yield Tried(Finding("answers", evidence, seen=share < OWN, details={"own": share}))


def read_log(case: Case) -> Iterator[Tried]:
    """Accuracy of the first step on training and on held-out data, from the log of the run."""
    if not case.wants("overfit"):
        return
    found = [
        next((entry[name] for entry in reversed(case.facts.log) if isinstance(entry.get(name), float)), None)
        for name in ("accuracy_step_0", "eval_accuracy_step_0")
    ]
    if None in found:
        return
    trained, held_out = found
    evidence = f"at the end of training the first step was right at {trained:.1%} of rows, and at {held_out:.1%} of "
    evidence += "held-out ones"
    details = {"accuracy": trained, "held_out_accuracy": held_out}
    yield Tried(Finding("overfit", evidence, seen=trained - held_out > _GAP, details=details))
