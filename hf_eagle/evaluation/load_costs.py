"""How fast a draft makes a server at which load, by a model of costs: nothing of this is measured in a server.

A round takes as long as here for so many copies of one prompt, which all accept the same and so stay together. It gives
as many tokens as the sweep over all prompts accepted. What a server does besides is left out: scheduling, paged
attention, graphs of the device. So only its shape by load means something.
"""

import time

import torch

from ..data.media import own_tokenizer
from ..decoding import speculative_generate, target_generate
from ..decoding.target_run import why_alone
from .measurement import DecodingSettings
from .prompts import Prompt, encode_prompt, holds_media


LOADS = (1, 2, 4, 8, 16)  # requests in flight
_ROUNDS, _TOKENS = 4, 8  # that are timed, with a draft and without


def modelled_speeds(
    target,
    draft,
    tokenizer,
    prompts: list[Prompt],
    sweep: list[dict],
    settings: DecodingSettings,
    template_kwargs: dict | None = None,
) -> list[dict]:
    """
    Models tokens per second by drafted tokens and requests in flight.

    Args:
        target, draft, tokenizer, prompts, settings, template_kwargs: as for `decode_prompts`.
        sweep: what `sweep_speculative_tokens` returned.

    Returns:
        For each number of drafted tokens (0 first, no draft) and of requests in flight a `dict` with
        `num_speculative_tokens`, `batch_size`, `tokens_per_second` and `speedup`, as `measure_serving` has them. None
        for prompts with images, whose copies would be read again.
    """
    measured = [found for found in sweep if found["acceptance_length"] is not None]
    if not measured or any(map(holds_media, prompts)):
        return []
    tokenizer = own_tokenizer(tokenizer)
    rendered = sorted((encode_prompt(prompt, tokenizer, template_kwargs) for prompt in prompts), key=len)
    prompt = torch.tensor([rendered[len(rendered) // 2]], device=target.device)

    entries = []
    for load in LOADS if why_alone(target, False) is None else LOADS[:1]:
        rows = prompt.repeat(load, 1)
        alone = load / seconds_alone(target, rows)
        entries.append(_entry(0, load, alone, 1.0))
        for found in measured:
            count = found["num_speculative_tokens"]
            speed = load * found["acceptance_length"] / seconds_of_round(target, draft, rows, count, settings)
            entries.append(_entry(count, load, speed, speed / alone))
    return entries


def _entry(count: int, load: int, speed: float, speedup: float) -> dict:
    return {"num_speculative_tokens": count, "batch_size": load, "tokens_per_second": speed, "speedup": speedup}


def seconds_alone(target, rows: torch.Tensor) -> float:
    """Seconds in which the target gives each of these equal prompts `(n, length)` one more token."""
    target_generate(target, rows, max_new_tokens=2)  # warm
    times = []
    for tokens in (1, 1 + _TOKENS):
        start = time.perf_counter()
        target_generate(target, rows, max_new_tokens=tokens)
        times.append(time.perf_counter() - start)
    return max(times[1] - times[0], 1e-9) / _TOKENS


def seconds_of_round(target, draft, rows: torch.Tensor, count: int, settings: DecodingSettings) -> float:
    """Seconds of a round that drafts and verifies so many tokens for each of these equal prompts `(n, length)`."""
    how = {"num_speculative_tokens": count, "draft_window": settings.draft_window}
    speculative_generate(target, draft, rows, max_new_tokens=3, **how)  # warm
    output = speculative_generate(target, draft, rows, max_new_tokens=1 + _ROUNDS * (count + 1), **how)
    return (output.draft_seconds + output.target_seconds) / output.rounds
