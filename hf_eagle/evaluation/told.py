"""Tell the result of a measurement in lines for a terminal."""

from .contexts import bucket_name, told_length
from .summary import prompt_of
from .windows import best_windows, window_name


def told(result: dict) -> str:
    """Return in a few lines what `evaluate_draft.py` prints of its result."""
    length = "not measured" if result["acceptance_length"] is None else f"{result['acceptance_length']:.3f}"
    accepted = ", ".join(map(str, result["accepted_per_position"]))
    first = (
        f"acceptance length {length}: {accepted} tokens accepted at positions 1 to "
        f"{result['num_speculative_tokens']} of {result['drafts']} drafts, {result['num_prompts']} prompts"
    )
    if result["acceptance_length_interval"] is not None:
        low, high = result["acceptance_length_interval"]
        first += f" (95% interval over prompts: {low:.3f} to {high:.3f})"
    lines = [first, *_speeds(result), *_contexts(result), *_windows(result)]

    for found in result.get("sweep", []):
        drafted, accepted = found["num_speculative_tokens"], found["acceptance_length"]
        lines.append(
            f"K = {drafted}: {found['tokens_per_second']:.1f} tokens/s, acceptance length "
            + ("not measured" if accepted is None else f"{accepted:.3f}")
        )

    if result["identical_to_target"] is not None:
        lines.append("output identical to the target's")
        difference = result["first_difference"]
        if difference is not None:
            place = f"{prompt_of(difference, result['turns'])}, token {difference['token']}"
            lines[-1] = f"output NOT identical to the target's, first at {place}"
    return "\n".join(lines)


def _speeds(result: dict) -> list[str]:
    speed, alone = result["tokens_per_second"], result["target_only_tokens_per_second"]
    if speed is None:
        return []

    lines = [f"{speed:.1f} tokens/s with the draft"]
    if alone is not None:
        lines[0] += f", {alone:.1f} without it ({speed / alone:.2f} times as many)"
    if result.get("speed_prompts") is not None:
        lines[0] += f", one request at a time, {result['speed_prompts']} prompts"
    if result.get("speedup_interval") is not None:
        lines[0] += " (95% interval: {:.2f} to {:.2f} times)".format(*result["speedup_interval"])

    if result["draft_seconds_per_round"] is not None:
        drafting, verifying = (1000 * result[f"{who}_seconds_per_round"] for who in ("draft", "target"))
        lines.append(f"per round: {drafting:.1f} ms of drafting, {verifying:.1f} ms of the target's forward pass")
    return lines


def _contexts(result: dict) -> list[str]:
    lines = []
    for bucket in result.get("acceptance_by_context", []):
        line = f"context {bucket_name(bucket)}: {told_length(bucket)}"
        if bucket["drafts"]:
            shares = ", ".join(f"{count / bucket['drafts']:.1%}" for count in bucket["accepted_per_position"])
            line += f", positions {shares}, {bucket['drafts']} drafts of {bucket['num_prompts']} prompts"
        lines.append(line)
    return lines


def _windows(result: dict) -> list[str]:
    found = result.get("windows", [])
    lines = []
    for place, best in enumerate(best_windows(found)) if found else ():
        if best is not None:
            buckets = [entry["acceptance_by_context"][place] for entry in found]
            lengths = ", ".join(
                f"{window_name(entry['window'])} {told_length(bucket)}"
                for entry, bucket in zip(found, buckets, strict=True)
            )
            lines.append(f"context {bucket_name(buckets[0])}: best {window_name(best['window'])} of {lengths}")
    return lines
