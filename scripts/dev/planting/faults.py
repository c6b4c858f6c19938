"""Faults of a sound EAGLE-3 draft, of its target and of its prompts: each with the cause that must be named first."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_eagle.diagnosis.case import Case, TrainingFacts
from hf_eagle.drafts.prune import proposable, prune_vocabulary
from hf_eagle.evaluation.prompts import Prompt


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 64}
SYSTEM = "You are a pirate. Answer every question in rhymes, and begin each line with a number."


@dataclass(frozen=True)
class Fault:
    """A fault, and how it is planted.

    Attributes:
        name: what is planted.
        cause: what must be named first.
        plant: changes a sound case, whose draft is a copy of its own.
        needs: what must be known for it: fields of a case, or `""`.
    """

    name: str
    cause: str
    plant: Callable[[Case], None]
    needs: str = ""


def of_draft(change: Callable[[Any], None]) -> Callable[[Case], None]:
    """A change of the draft."""
    return lambda case: change(case.draft)


def reorder(*order: int):
    def change(draft) -> None:
        parts = draft.fc.weight.detach().chunk(len(order), dim=1)
        draft.fc.weight = nn.Parameter(torch.cat([parts[place] for place in order], dim=1))

    return change


def shift(step: int) -> Callable[[Case], None]:
    def plant(case: Case) -> None:
        ids = [number + step for number in case.draft.config.tap_ids]
        case.draft.config.eagle_aux_hidden_state_layer_ids = ids
        case.target.tap_ids = ids

    return plant


def swap(first: str, second: str):
    def change(draft) -> None:
        one, other = draft.get_submodule(first), draft.get_submodule(second)
        one.weight, other.weight = other.weight, one.weight

    return change


def rotate(**fields):
    return lambda draft: draft.rotate_by({**draft.config.rope_parameters, **fields})


def permute_head(draft) -> None:
    order = torch.randperm(len(draft.lm_head.weight), generator=torch.Generator().manual_seed(3))
    draft.lm_head.weight = nn.Parameter(draft.lm_head.weight.detach()[order.to(draft.lm_head.weight.device)])


def lose_norm(draft) -> None:
    weight = draft.midlayer.hidden_norm.weight
    draft.midlayer.hidden_norm.weight = nn.Parameter(torch.ones_like(weight))


FEW = 128


def shrink_vocabulary(case: Case) -> None:
    """The few tokens that are said most: with a sixteenth of its vocabulary, a draft of SmolLM2 accepted no less."""
    said = torch.tensor([token for answer, _ in case.sample.said() for token in answer])
    own = proposable(case.draft)
    counts = torch.bincount(said, minlength=case.draft.config.vocab_size)[own]
    prune_vocabulary(case.draft, own[counts.argsort(descending=True)[:FEW]])


def flip(name: str):
    return lambda draft: setattr(draft.config, name, not getattr(draft.config, name))


def tune_target(case: Case) -> None:
    """Another target: this one's weights, moved a little."""
    sound, model = case.target, copy.deepcopy(case.target.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(0.08 * parameter.std() * noise)
    other = type(sound)(model, tap_ids=sound.tap_ids)
    case.draft.attach(other)
    case.trained_target = lambda: sound
    case.sample = case.sample.like(target=other)


def add_system_prompt(case: Case) -> None:
    prompts = [replace(x, messages=[{"role": "system", "content": SYSTEM}, *x.messages]) for x in case.sample.prompts]
    case.sample = case.sample.like(prompts)


def lengthen(case: Case) -> None:
    """Every other prompt stands behind the others' texts."""
    texts = [prompt.messages[-1]["content"] for prompt in case.sample.prompts]
    behind = "\n\n".join(texts)[:6000]

    def longer(prompt: Prompt) -> Prompt:
        last = prompt.messages[-1]
        return replace(prompt, messages=[*prompt.messages[:-1], last | {"content": f"{behind}\n\n{last['content']}"}])

    prompts = [longer(x) if place % 2 else x for place, x in enumerate(case.sample.prompts)]
    case.sample = case.sample.like(prompts)
    case.facts = TrainingFacts(case.facts.arguments | {"max_length": 512})


def sample_hotly(case: Case) -> None:
    case.temperature = 1.5


FAULTS = (
    Fault("taps one layer later", "tap_ids", shift(1)),
    Fault("taps one layer earlier", "tap_ids", shift(-1)),
    Fault("taps turned round", "tap_order", of_draft(reorder(2, 1, 0))),
    Fault("taps rotated", "tap_order", of_draft(reorder(2, 0, 1))),
    Fault("the later two taps exchanged", "tap_order", of_draft(reorder(0, 2, 1))),
    Fault("a RoPE base of 500,000", "rope_base", of_draft(rotate(rope_theta=500_000.0))),
    Fault("a RoPE base of 1,000,000", "rope_base", of_draft(rotate(rope_theta=1_000_000.0))),
    Fault("RoPE scaled as Llama 3", "rope_scaling", of_draft(rotate(**SCALED))),
    Fault("the two input norms exchanged", "norms", of_draft(swap("midlayer.input_layernorm", "midlayer.hidden_norm"))),
    Fault("the last two norms exchanged", "norms", of_draft(swap("norm", "midlayer.post_attention_layernorm"))),
    Fault("a norm lost", "lost_norms", of_draft(lose_norm)),
    Fault("the other `norm_output`", "norm_output", of_draft(flip("norm_output"))),
    Fault("rows of the head in another order", "head_rows", of_draft(permute_head)),
    Fault(f"a vocabulary of {FEW} tokens", "vocabulary", shrink_vocabulary),
    Fault("another target", "target", tune_target),
    Fault("a system prompt", "system_prompt", add_system_prompt, needs="data"),
    Fault("long contexts", "context", lengthen),
    Fault("a temperature of 1.5", "sampling", sample_hotly),
)
