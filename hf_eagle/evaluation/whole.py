"""All that is measured of a draft: acceptance on all prompts, speed on a sample, sweeps, windows."""

from collections.abc import Sequence
from dataclasses import replace

from .acceptance import decode_prompts, sweep_speculative_tokens
from .finished import Finished
from .load_costs import modelled_speeds
from .measurement import DecodingSettings, PromptRun
from .prompts import Prompt
from .speed_sample import SPEEDS, measure_speed
from .summary import summarize
from .windows import check_windows, measure_windows


BATCH = 16  # prompts in which acceptance is counted together


def counting_settings(settings: DecodingSettings, batch_size: int | None) -> DecodingSettings:
    """Return the settings with which acceptance is counted: `batch_size` prompts together, by default up to 16."""
    return replace(settings, batch_size=BATCH if batch_size is None else batch_size)


def _check_asked(draft, settings: DecodingSettings, batch_size, teacher_forced, sweep_tokens, windows) -> None:
    """Raise `ValueError` for what could not be measured, before anything is decoded."""
    if sweep_tokens and teacher_forced:
        raise ValueError("`sweep_tokens` measures speeds, but `teacher_forced` does not: leave one out.")
    for count in sweep_tokens:
        replace(settings, num_speculative_tokens=count)
    check_windows(draft, settings, windows)

    if settings.batch_size not in (1, batch_size):
        raise ValueError(
            f"`batch_size` is {batch_size}, but {settings.batch_size} in `settings`, which alone would not be used for "
            "speeds: give it to `measure_whole` instead."
        )


def measure_whole(
    target,
    draft,
    tokenizer,
    prompts: list[Prompt],
    settings: DecodingSettings,
    *,
    journal=None,
    batch_size: int | None = None,
    compare_to_target: bool = True,
    teacher_forced: bool = False,
    context_buckets: Sequence[int] = (),
    sweep_tokens: Sequence[int] = (),
    windows: Sequence[int | None] = (),
    **how,
) -> tuple[dict, list[PromptRun]]:
    """
    Measures a draft in every way that is asked for.

    Args:
        target, draft, tokenizer, prompts, how: as for `decode_prompts`.
        settings: how to decode; with a `batch_size` of 1, or the one given here.
        journal ([`Journal`], *optional*): keeps finished batches.
        batch_size (`int`, *optional*): decode all prompts with and without the draft in such batches. By default
            acceptance is counted in batches of up to 16, and speed is measured by `measure_speed`.
        compare_to_target: also decode with the target alone.
        teacher_forced: only count acceptance.
        context_buckets: as for `summarize`.
        sweep_tokens: also measure chains of these lengths.
        windows: also measure these windows of the draft.

    Returns:
        What `summarize` returns, with the speeds of `measure_speed` and with `sweep`, `modelled_speeds` (by load, see
        `load_costs`) and `windows`; and the runs.

    Raises:
        `ValueError`: before anything is decoded, for arguments that do not fit together or do not fit the draft.
    """
    counted = counting_settings(settings, batch_size)
    _check_asked(draft, settings, batch_size, teacher_forced, sweep_tokens, windows)
    settings = replace(settings, batch_size=batch_size or 1)
    together = batch_size is not None and not teacher_forced
    given = {"compare_to_target": together and compare_to_target, "teacher_forced": teacher_forced}
    models = (target, draft, tokenizer, prompts)
    answers: dict[int, tuple] = {}  # of the target, which windows need too
    found = decode_prompts(*models, counted, finished=Finished(journal), answers=answers, **given, **how)

    result = summarize(found, context_buckets)
    if not together:
        result |= {"batch_size": settings.batch_size, **dict.fromkeys(SPEEDS)}
        if compare_to_target and not teacher_forced:
            result |= measure_speed(*models, settings, journal, **how)

    if sweep_tokens:
        asked = (list(sweep_tokens), settings)
        result["sweep"] = sweep_speculative_tokens(*models, *asked, finished=Finished(journal, "sweep"), **how)
        result["modelled_speeds"] = modelled_speeds(*models, result["sweep"], settings, how.get("template_kwargs"))
    if windows:
        asked = (windows, counted, context_buckets)
        how |= {"finished": Finished(journal, "windows"), "answers": answers}
        result["windows"] = measure_windows(*models, *asked, **how)
    return result, found.runs
