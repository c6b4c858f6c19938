"""Acceptance by the length of the context in which a round drafts."""

from bisect import bisect_left
from collections.abc import Sequence

from ..decoding.verification import per_position
from .acceptance_length import acceptance_length, confidence_interval


def context_lengths(prompt_length: int, accepted_by_round: Sequence[int]) -> list[int]:
    """The context of every round of an answer: prompt and answer so far, the newest token included."""
    found, context = [], prompt_length + 1
    for accepted in accepted_by_round:
        found.append(context)
        context += accepted + 1
    return found


def acceptance_by_context(runs: list, edges: Sequence[int], depth: int) -> list[dict]:
    """
    Sums up rounds in buckets of context length; all buckets together hold every round once.

    Args:
        runs (`list[PromptRun]`):
            What was decoded.
        edges (`Sequence[int]`):
            The longest context of each bucket, ascending; the last bucket, which has no end, comes in addition.
        depth (`int`):
            Tokens that a round drafts in a row.

    Returns:
        For each bucket a `dict` with
        * `above` and `up_to`: contexts are longer than the one, and at most as long as the other (`None`: no limit);
        * `acceptance_length`: 1 + accepted / drafts, `None` without drafts, and `acceptance_length_interval`: its 95%
          interval by the bootstrap over prompts, `None` with fewer than two prompts;
        * `drafts`: rounds; `num_prompts`: prompts that have such a round;
        * `accepted_per_position`: rounds that accepted at least 1, 2, ... tokens, and `accepted_share_intervals`: the
          95% interval of each as a share of the rounds.
    """
    rounds: list[dict[int, list[int]]] = [{} for _ in range(len(edges) + 1)]  # of every bucket, by prompt
    for run in runs:
        contexts = context_lengths(len(run.prompt_token_ids), run.accepted_by_round)
        for context, accepted in zip(contexts, run.accepted_by_round, strict=True):
            rounds[bisect_left(edges, context)].setdefault(id(run.prompt), []).append(accepted)

    bounds = zip([0, *edges], [*edges, None], strict=True)
    return [
        {"above": above, "up_to": up_to} | _bucket(list(by_prompt.values()), depth)
        for (above, up_to), by_prompt in zip(bounds, rounds, strict=True)
    ]


def _bucket(by_prompt: list[list[int]], depth: int) -> dict:
    drafts = list(map(len, by_prompt))
    accepted = list(map(sum, by_prompt))
    counts = [per_position(rounds, depth) for rounds in by_prompt]
    intervals = [confidence_interval([count[k] for count in counts], drafts) for k in range(depth)]
    return {
        "acceptance_length": acceptance_length(accepted, drafts),
        "acceptance_length_interval": confidence_interval(accepted, drafts),
        "drafts": sum(drafts),
        "num_prompts": len(drafts),
        "accepted_per_position": [sum(count[k] for count in counts) for k in range(depth)],
        # an acceptance length is one more than the share
        "accepted_share_intervals": [x and [x[0] - 1, x[1] - 1] for x in intervals],
    }


def bucket_name(bucket: dict) -> str:
    """Name a bucket's contexts: `513 to 2,048`."""
    if bucket["up_to"] is None:
        if not bucket["above"]:
            return "of any length"
        return f"above {bucket['above']:,}"
    return f"{bucket['above'] + 1:,} to {bucket['up_to']:,}"


def contexts_table(buckets: list[dict]) -> str:
    """Return acceptance by context as a Markdown table, with shares of drafts that kept their first, second token."""
    depth = len(buckets[0]["accepted_per_position"])
    lines = [
        "| context, in tokens | acceptance length (95% interval) | "
        + " | ".join(f"kept {k + 1}" for k in range(depth))
        + " | drafts | prompts |",
        "|---" * (depth + 4) + "|",
    ]
    for bucket in (x for x in buckets if x["drafts"]):
        shares = [f"{count / bucket['drafts']:.1%}" for count in bucket["accepted_per_position"]]
        cells = [bucket_name(bucket), told_length(bucket), *shares, f"{bucket['drafts']:,}", str(bucket["num_prompts"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def told_length(bucket: dict, bold: bool = False) -> str:
    """Return a bucket's acceptance length with its 95% interval; a dash without drafts."""
    if bucket["acceptance_length"] is None:
        return "-"
    mark, interval = "**" * bold, bucket["acceptance_length_interval"]
    length = f"{mark}{bucket['acceptance_length']:.3f}{mark}"
    return length if interval is None else f"{length} ({interval[0]:.3f} to {interval[1]:.3f})"


def bucket_of_prompt(length: int, edges: Sequence[int]) -> str:
    """Name the bucket in which a prompt of so many tokens begins to be answered."""
    place = bisect_left(edges, length + 1)
    return bucket_name({"above": [0, *edges][place], "up_to": [*edges, None][place]})
