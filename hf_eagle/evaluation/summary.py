"""Sum up decoded prompts in numbers that JSON can hold."""

import logging
from collections.abc import Callable, Sequence

from .acceptance_length import acceptance_length, confidence_interval
from .contexts import acceptance_by_context


logger = logging.getLogger(__name__)


def summarize(measurement, context_buckets: Sequence[int] = ()) -> dict:
    """
    Sums up a [`Measurement`]. Counts follow vLLM's rule, see `hf_eagle.decoding.generate`.

    Args:
        measurement ([`Measurement`]): what was decoded.
        context_buckets (`Sequence[int]`, *optional*): also sum up by context length, in buckets that end at these.

    Returns:
        `dict` with
        * `acceptance_length`: tokens per target forward pass, 1 + accepted / drafts; `None` without drafts;
          `acceptance_length_interval`: its 95% interval `[low, high]` by the bootstrap over prompts, or `None`;
        * `accepted_per_position`: counts at the first, second, ... drafted token (in a tree: level); `drafts`: rounds;
          `accepted_tokens`;
        * `generated_tokens`: tokens in all answers; `tokens_per_second`, `target_only_tokens_per_second`: these per
          second over all batches, prompt included, as measured in the run that decoded each batch; `None` if answers
          were replayed;
        * `draft_seconds_per_round`, `target_seconds_per_round`: time of drafting and of the target's forward pass in
          a round, which serves a whole batch. `None` without a round;
        * `identical_to_target`: whether every answer equals the target's, token for token, and `first_difference`:
          `{"prompt": id, "token": index in the answer}` (and the `turn`, if not the first) or `None`. Both are `None`
          when sampling; if the target was not run alone, they and its speed are `None` too;
        * `acceptance_length_by_category`, if prompts have categories, and `acceptance_length_by_turn`, if several turns
          were decoded, with `acceptance_length_interval_by_category` and `..._by_turn`;
        * `acceptance_by_context`, if there are buckets: see `acceptance_by_context` in `hf_eagle.evaluation.contexts`;
        * `num_prompts`, and the settings: `method`, `num_speculative_tokens` (of a tree: its depth), `max_new_tokens`,
          `temperature`, `batch_size`, `turns` and, if they matter, `depth`, `top_k`, `total_tokens`, `top_p`,
          `sampling_top_k`, `seed`, `draft_window`.
    """
    runs = measurement.runs
    compared = measurement.target_only_seconds is not None
    greedy = measurement.settings.temperature == 0
    difference = _first_difference(runs) if compared and greedy else None
    if difference is not None:
        logger.warning(
            "The answer to %s differs from the target's answer from token %d on. In bfloat16 or float16, "
            "near-ties cause that; in float32 it is an error.",
            prompt_of(difference, measurement.settings.turns),
            difference["token"],
        )

    generated = sum(len(run.token_ids) for run in runs)
    rounds = measurement.rounds
    result = _lengths(runs) | {
        "accepted_per_position": [sum(counts) for counts in zip(*(r.accepted_per_position for r in runs), strict=True)],
        "accepted_tokens": sum(sum(run.accepted_per_position) for run in runs),
        "drafts": sum(run.drafts for run in runs),
        "generated_tokens": generated,
        "tokens_per_second": generated / measurement.seconds if measurement.seconds else None,
        "target_only_tokens_per_second": (
            sum(len(run.target_token_ids) for run in runs) / measurement.target_only_seconds if compared else None
        ),
        "draft_seconds_per_round": measurement.draft_seconds / rounds if rounds else None,
        "target_seconds_per_round": measurement.target_seconds / rounds if rounds else None,
        "identical_to_target": difference is None if compared and greedy else None,
        "first_difference": difference,
    }

    if any(run.prompt.category is not None for run in runs):
        result |= _by("category", runs, lambda run: run.prompt.category)
    if any(run.turn for run in runs):
        result |= _by("turn", runs, lambda run: str(run.turn + 1))
    if context_buckets:
        result["acceptance_by_context"] = acceptance_by_context(runs, context_buckets, measurement.settings.shape.depth)
    return result | {"num_prompts": len({id(run.prompt) for run in runs})} | described(measurement.settings)


def _lengths(runs: list) -> dict:
    """Return acceptance length and its interval; all turns of a prompt are one draw of the bootstrap."""
    accepted, drafts = {}, {}
    for run in runs:
        key = id(run.prompt)
        accepted[key] = accepted.get(key, 0) + sum(run.accepted_per_position)
        drafts[key] = drafts.get(key, 0) + run.drafts

    counts = (list(accepted.values()), list(drafts.values()))
    return {"acceptance_length": acceptance_length(*counts), "acceptance_length_interval": confidence_interval(*counts)}


def _by(name: str, runs: list, key: Callable) -> dict:
    groups = sorted({key(run) for run in runs if key(run) is not None})
    found = {group: _lengths([run for run in runs if key(run) == group]) for group in groups}
    return {f"{value}_by_{name}": {group: x[value] for group, x in found.items()} for value in _lengths([])}


def described(settings) -> dict:
    """Return the settings that matter, with defaults in place of missing values."""
    shape = settings.shape
    described = {
        "method": settings.method,
        "num_speculative_tokens": shape.depth,
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "batch_size": settings.batch_size,
        "turns": settings.turns,
    }

    if shape.tree:
        described |= {"depth": shape.depth, "top_k": shape.top_k, "total_tokens": shape.total_tokens}
    if settings.temperature:
        described |= {name: getattr(settings, name) for name in ("top_p", "sampling_top_k", "seed")}
    if settings.draft_window is not None:
        described["draft_window"] = settings.draft_window
    return described


def prompt_of(difference: dict, turns: int) -> str:
    """Name what an answer answers, from `first_difference`: `prompt 'q81'`, or `turn 1 of prompt 'q81'` of several."""
    prompt = f"prompt {difference['prompt']!r}"
    return prompt if turns == 1 else f"turn {difference.get('turn', 1)} of {prompt}"


def _first_difference(runs: list) -> dict | None:
    for run in runs:
        if run.token_ids != run.target_token_ids:
            pairs = list(zip(run.token_ids, run.target_token_ids, strict=False))
            at = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
            found = {"prompt": run.prompt.id, "token": at}
            return found | ({"turn": run.turn + 1} if run.turn else {})
    return None
