"""Measure speed one request at a time, on as many prompts as it takes to know the speedup."""

import random
from dataclasses import replace

import torch

from .acceptance import decode_prompts
from .acceptance_length import middle_of, resampled
from .finished import Finished
from .measurement import DecodingSettings, Measurement
from .prompts import Prompt
from .summary import summarize


ERROR = 0.05  # half the width of the speedup's interval, as a share of the speedup
_AT_ONCE, _LEAST = 4, 8  # prompts between two looks at the interval, and before the first
SPEEDS = ("tokens_per_second", "target_only_tokens_per_second", "draft_seconds_per_round", "target_seconds_per_round")


def measure_speed(
    target,
    draft,
    tokenizer,
    prompts: list[Prompt],
    settings: DecodingSettings,
    journal=None,
    **how,
) -> dict:
    """
    Decodes prompts one by one, with the draft and without, until the speedup is known to 5%.

    Args:
        target, draft, tokenizer, prompts, settings, how: as for `decode_prompts`. Prompts are taken in a random order,
            the same in every run, and the `batch_size` of `settings` is not used.
        journal ([`Journal`], *optional*): keeps what is decoded.

    Returns:
        `tokens_per_second`, `target_only_tokens_per_second`, `draft_seconds_per_round`, `target_seconds_per_round`,
        `identical_to_target` and `first_difference` as `summarize` gives them for these prompts, and
        * `speedup`: the first of these divided by the second; `speedup_interval`: its 95% interval by the bootstrap
          over prompts, `None` for a single one;
        * `speed_prompts`: their number. All prompts, if the interval is still too wide then.
    """
    settings = replace(settings, batch_size=1)
    order = random.Random(0).sample(range(len(prompts)), len(prompts))
    measured, seconds = Measurement(settings), {}
    for begin in range(0, len(order), _AT_ONCE):
        places = order[begin : begin + _AT_ONCE]
        part = Finished(journal, f"speed {begin}")
        asked = {"finished": part, "warm": begin == 0, "progress": False, **how}
        found = decode_prompts(target, draft, tokenizer, [prompts[place] for place in places], settings, **asked)
        _extend(measured, found, seconds)
        value, interval = speedup(list(seconds.values()))
        known = interval is not None and interval[1] - interval[0] <= 2 * ERROR * value
        if known and len(seconds) >= _LEAST:
            break

    summary = summarize(measured)
    names = (*SPEEDS, "identical_to_target", "first_difference")
    result = {name: summary[name] for name in names}
    return result | {"speedup": value, "speedup_interval": interval, "speed_prompts": len(seconds)}


def _extend(measured: Measurement, found: Measurement, seconds: dict[int, list[float]]) -> None:
    """Add some prompts to what was measured, and each prompt's tokens and seconds, of all turns, to `seconds`."""
    measured.runs += found.runs
    for name in ("seconds", "rounds", "draft_seconds", "target_seconds"):
        setattr(measured, name, getattr(measured, name) + getattr(found, name))
    measured.target_only_seconds = (measured.target_only_seconds or 0.0) + found.target_only_seconds

    for run, (ours, alone) in zip(found.runs, found.by_batch, strict=True):  # a batch is one prompt
        counted = [len(run.token_ids), ours, len(run.target_token_ids), alone]
        known = seconds.get(id(run.prompt), [0, 0.0, 0, 0.0])
        seconds[id(run.prompt)] = [a + b for a, b in zip(known, counted, strict=True)]


def speedup(prompts: list[list[float]]) -> tuple[float, list[float] | None]:
    """
    Return how many times as fast a draft makes decoding, and the 95% interval by the bootstrap over prompts.

    Args:
        prompts: of each its tokens and seconds with the draft, and its tokens and seconds without.
    """

    def ratio(sums: torch.Tensor) -> torch.Tensor:  # (..., 4)
        return sums[..., 0] / sums[..., 1] * sums[..., 3] / sums[..., 2]

    counted = torch.tensor(prompts, dtype=torch.float64)
    value = float(ratio(counted.sum(0)))
    if len(prompts) < 2:
        return value, None

    return value, middle_of(ratio(counted[resampled(len(prompts))].sum(1)))
