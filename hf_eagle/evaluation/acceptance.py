"""Acceptance length, measured: every prompt is decoded with the draft, and with the target alone to compare."""

import logging
import time
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ..decoding.chain import chain_generate, check_draft_fits, greedy_generate
from .prompts import Prompt, encode_prompt


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptRun:
    """One prompt, decoded with the draft and, where asked for, by the target alone."""

    prompt: Prompt
    prompt_token_ids: list[int]
    token_ids: list[int]  # the answer, with the token that ended it
    drafts: int
    accepted_per_position: list[int]
    seconds: float  # prompt included
    target_token_ids: list[int] | None
    target_seconds: float | None


def measure_acceptance(
    target,
    draft,
    tokenizer,
    prompts: list[Prompt],
    *,
    num_speculative_tokens: int = 3,
    max_new_tokens: int = 64,
    compare_to_target: bool = True,
    progress: bool = True,
) -> dict:
    """
    Decodes `prompts` greedily and returns what `summarize` makes of them; the arguments are those of `decode_prompts`.

    Example:
        >>> draft = load_draft("outputs/quickstart")
        >>> target = FrozenTarget.from_pretrained(path, tap_ids=draft.config.eagle_aux_hidden_state_layer_ids)
        >>> draft.set_target_embeddings(target.embedding_weight())
        >>> measure_acceptance(target, draft, tokenizer, load_prompts("question.jsonl", limit=8))["acceptance_length"]
        1.475
    """
    runs = decode_prompts(
        target,
        draft,
        tokenizer,
        prompts,
        num_speculative_tokens=num_speculative_tokens,
        max_new_tokens=max_new_tokens,
        compare_to_target=compare_to_target,
        progress=progress,
    )
    return summarize(runs, num_speculative_tokens=num_speculative_tokens, max_new_tokens=max_new_tokens)


def decode_prompts(
    target,
    draft,
    tokenizer,
    prompts: list[Prompt],
    *,
    num_speculative_tokens: int = 3,
    max_new_tokens: int = 64,
    compare_to_target: bool = True,
    progress: bool = True,
) -> list[PromptRun]:
    """
    Decodes every prompt with the draft and, in turn, with the target alone, so that both meet the same machine.

    Args:
        target (`FrozenTarget`), draft (`LlamaForCausalLMEagle3`):
            The pair, on one device, the target with the draft's taps and the draft with the target's embeddings.
        tokenizer (`PreTrainedTokenizerBase`):
            The target's; its chat template renders the prompts, its end-of-sequence token stops an answer.
        prompts (`list[Prompt]`):
            What `load_prompts` returns.
        num_speculative_tokens (`int`, *optional*, defaults to `3`):
            K, the tokens drafted a round.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            The longest answer, in tokens.
        compare_to_target (`bool`, *optional*, defaults to `True`):
            Decode with the target alone as well.
        progress (`bool`, *optional*, defaults to `True`):
            Show a progress bar with the acceptance length so far.

    Raises:
        `ValueError`: no prompts, a prompt that cannot be rendered, or a draft that does not fit the target.
    """
    if not prompts:
        raise ValueError("`prompts` is empty; give at least one prompt to measure acceptance on.")
    check_draft_fits(target, draft)
    rendered = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    eos_token_ids = stop_token_ids(target.model, tokenizer)

    def with_draft(token_ids, limit=max_new_tokens):
        return _timed_chain(target, draft, token_ids, num_speculative_tokens, limit, eos_token_ids)

    def alone(token_ids, limit=max_new_tokens):
        return _timed_greedy(target, token_ids, limit, eos_token_ids) if compare_to_target else (None, None)

    # the first decoding in a process also pays for kernels and memory: let no clock see it
    with_draft(rendered[0], limit=2), alone(rendered[0], limit=2)

    runs: list[PromptRun] = []
    bar = tqdm(rendered, desc="decoding", unit="prompt", disable=not progress)
    for index, token_ids in enumerate(bar):
        # whoever comes second finds warmer caches, so they take turns
        if index % 2:
            (target_answer, target_seconds), (output, seconds) = alone(token_ids), with_draft(token_ids)
        else:
            (output, seconds), (target_answer, target_seconds) = with_draft(token_ids), alone(token_ids)
        answer = output.sequences[0, len(token_ids) :].tolist()
        counts = (output.drafts, output.accepted_per_position)
        runs.append(PromptRun(prompts[index], token_ids, answer, *counts, seconds, target_answer, target_seconds))
        bar.set_postfix(acceptance_length=_acceptance_length(runs))
    return runs


def summarize(runs: list[PromptRun], *, num_speculative_tokens: int, max_new_tokens: int) -> dict:
    """
    Sums up decoded prompts in numbers that JSON can hold. Counts follow vLLM's rule, see `hf_eagle.decoding.chain`.

    Returns:
        `dict` with
        * `acceptance_length`: tokens a target forward yields, 1 + accepted / drafts; `None` without a single draft;
        * `accepted_per_position`: counts, length `num_speculative_tokens`; `drafts`: rounds; `accepted_tokens`;
        * `generated_tokens`: of all answers; `tokens_per_second`, `target_only_tokens_per_second`: prompt included;
        * `identical_to_target`: whether every answer is the target's own, token for token, and `first_difference`:
          `{"prompt": id, "token": index in the answer}` or `None`. These and the target's speed are `None` when the
          target was not run alone;
        * `acceptance_length_by_category`, where prompts have categories;
        * `num_prompts`, `num_speculative_tokens`, `max_new_tokens`.
    """
    compared = all(run.target_token_ids is not None for run in runs)
    difference = _first_difference(runs) if compared else None
    if difference is not None:
        logger.warning(
            "The answer to prompt %r differs from the target's own from token %d on. In bfloat16 or float16 near-ties "
            "do that; in float32 it is an error.",
            difference["prompt"],
            difference["token"],
        )
    generated = sum(len(run.token_ids) for run in runs)
    result = {
        "acceptance_length": _acceptance_length(runs),
        "accepted_per_position": [sum(counts) for counts in zip(*(r.accepted_per_position for r in runs), strict=True)],
        "accepted_tokens": sum(sum(run.accepted_per_position) for run in runs),
        "drafts": sum(run.drafts for run in runs),
        "generated_tokens": generated,
        "tokens_per_second": generated / sum(run.seconds for run in runs),
        "target_only_tokens_per_second": (
            sum(len(run.target_token_ids) for run in runs) / sum(run.target_seconds for run in runs)
            if compared
            else None
        ),
        "identical_to_target": difference is None if compared else None,
        "first_difference": difference,
    }
    categories = sorted({run.prompt.category for run in runs if run.prompt.category is not None})
    if categories:
        result["acceptance_length_by_category"] = {
            category: _acceptance_length([run for run in runs if run.prompt.category == category])
            for category in categories
        }
    return result | {
        "num_prompts": len(runs),
        "num_speculative_tokens": num_speculative_tokens,
        "max_new_tokens": max_new_tokens,
    }


def stop_token_ids(model, tokenizer) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's and the generation config's, together, as vLLM takes them."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [] if found is None else [found] if isinstance(found, int) else list(found)
    own = tokenizer.eos_token_id
    return frozenset(found if own is None else [*found, own])


def _timed_chain(target, draft, token_ids, num_speculative_tokens, max_new_tokens, eos_token_ids):
    input_ids = torch.tensor([token_ids], device=target.device)
    start = time.perf_counter()
    output = chain_generate(
        target,
        draft,
        input_ids,
        num_speculative_tokens=num_speculative_tokens,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
    )
    return output, time.perf_counter() - start  # its last round ended on the host, so the device is done too


def _timed_greedy(target, token_ids, max_new_tokens, eos_token_ids) -> tuple[list[int], float]:
    input_ids = torch.tensor([token_ids], device=target.device)
    start = time.perf_counter()
    output = greedy_generate(target.model, input_ids, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids)
    seconds = time.perf_counter() - start
    return output[0, len(token_ids) :].tolist(), seconds


def _acceptance_length(runs: list[PromptRun]) -> float | None:
    drafts = sum(run.drafts for run in runs)
    return 1 + sum(sum(run.accepted_per_position) for run in runs) / drafts if drafts else None


def _first_difference(runs: list[PromptRun]) -> dict | None:
    for run in runs:
        if run.token_ids != run.target_token_ids:
            pairs = list(zip(run.token_ids, run.target_token_ids, strict=False))
            at = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
            return {"prompt": run.prompt.id, "token": at}
    return None
