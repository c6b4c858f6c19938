"""Try sliding windows on a draft that was trained without one: acceptance with each, and the best by context."""

from collections.abc import Sequence
from dataclasses import replace

from .acceptance import decode_variants
from .contexts import acceptance_by_context, bucket_name, told_length
from .measurement import DecodingSettings
from .prompts import Prompt
from .summary import summarize


_NAMES = ("acceptance_length", "acceptance_length_interval", "accepted_per_position", "drafts")


def check_windows(draft, settings: DecodingSettings, windows: Sequence[int | None]) -> None:
    """Raise `ValueError`, before anything is decoded, for a window with which this draft cannot be decoded."""
    shape, own = settings.for_draft(draft).shape, draft.config.draft_sliding_window
    for window in windows:
        if window is None and own is not None:
            raise ValueError(
                f"`windows` contains none, but the draft was trained with a window of {own}: a number as large as the "
                "longest context shows it everything."
            )
        replace(shape, window=window).windowed(draft, given="`windows` contains")


def measure_windows(
    target,
    draft,
    tokenizer,
    prompts: list[Prompt],
    windows: Sequence[int | None],
    settings: DecodingSettings,
    context_buckets: Sequence[int] = (),
    **how,
) -> list[dict]:
    """
    Measures a draft with each window, on the same answers.

    Args:
        target, draft, tokenizer, prompts, settings, how: as for `decode_prompts`. Greedy answers are replayed.
        windows: keys that the draft's attention sees; `None` for all.
        context_buckets: as for `summarize`.

    Returns:
        For each of `windows` a `dict` with `window`, `acceptance_length`, its interval, `accepted_per_position`,
        `drafts` and, with or without buckets, `acceptance_by_context`.

    Raises:
        `ValueError`: for a window with which this draft cannot be decoded, and as `decode_prompts`.
    """
    check_windows(draft, settings, windows)
    variants = [replace(settings, draft_window=window) for window in windows]
    how = {"compare_to_target": False, "teacher_forced": settings.temperature == 0, **how}
    found = decode_variants(target, draft, tokenizer, prompts, variants, **how)

    result = []
    for window, measurement in zip(windows, found, strict=True):
        summary = summarize(measurement)
        buckets = acceptance_by_context(measurement.runs, context_buckets, settings.shape.depth)
        result.append({"window": window, **{name: summary[name] for name in _NAMES}, "acceptance_by_context": buckets})
    return result


def window_name(window: int | None) -> str:
    """Name a window in a table: `window 512`."""
    return "no window" if window is None else f"window {window:,}"


def best_windows(found: list[dict]) -> list[dict]:
    """Return the entry with the most accepted tokens for each bucket; the first of equals, `None` without drafts."""
    best = []
    for place in range(len(found[0]["acceptance_by_context"])):
        lengths = [entry["acceptance_by_context"][place]["acceptance_length"] for entry in found]
        drafted = [length for length in lengths if length is not None]  # rounds of another window start elsewhere
        best.append(found[lengths.index(max(drafted))] if drafted else None)
    return best


def windows_table(found: list[dict]) -> str:
    """Return acceptance lengths with their intervals as a Markdown table, the best of each bucket in bold."""
    buckets, best = found[0]["acceptance_by_context"], best_windows(found)
    lines = ["| | " + " | ".join(f"context {bucket_name(bucket)}" for bucket in buckets) + " |"]
    lines.append("|---" * (len(buckets) + 1) + "|")
    for entry in found:
        cells = [told_length(x, entry is top) for x, top in zip(entry["acceptance_by_context"], best, strict=True)]
        lines.append(f"| {window_name(entry['window'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
