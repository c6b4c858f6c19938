"""Measure acceptance: decode every prompt with the draft, and with the target alone for comparison."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from tqdm.auto import tqdm

from ..data.media import own_tokenizer
from ..decoding import SpeculativeOutput, speculative_generate, target_generate
from ..decoding.checks import check_draft_fits
from ..decoding.continued import continued_answers
from ..decoding.replay import replay, transcribe
from ..decoding.verification import per_position
from .finished import Finished
from .measurement import DecodingSettings, Measurement
from .prompt_batches import PromptBatch, Rendering, check_rendering, planned_batches
from .prompts import Prompt
from .summary import summarize


def measure_acceptance(
    target,
    draft,
    tokenizer,
    prompts: list[Prompt],
    *,
    compare_to_target: bool = True,
    progress: bool = True,
    template_kwargs: dict | None = None,
    teacher_forced: bool = False,
    context_buckets: Sequence[int] = (),
    **settings,
) -> dict:
    """
    Decodes `prompts` and returns their `summarize` result.

    Args:
        target, draft, tokenizer, prompts, compare_to_target, progress, template_kwargs, teacher_forced: as for
            `decode_prompts`.
        context_buckets: as for `summarize`.
        settings: fields of [`DecodingSettings`].

    Example:
        >>> target = FrozenTarget.from_pretrained(path, tap_ids=draft.config.tap_ids)
        >>> draft = load_draft("outputs/quickstart", target)
        >>> measure_acceptance(target, draft, tokenizer, load_prompts("question.jsonl", limit=8))["acceptance_length"]
        1.475
    """
    settings = DecodingSettings(**settings)
    how = {"compare_to_target": compare_to_target, "progress": progress, "template_kwargs": template_kwargs}
    how["teacher_forced"] = teacher_forced
    return summarize(decode_prompts(target, draft, tokenizer, prompts, settings, **how), context_buckets)


def sweep_speculative_tokens(
    target,
    draft,
    tokenizer,
    prompts: list[Prompt],
    counts: list[int],
    settings: DecodingSettings,
    progress: bool = True,
    template_kwargs: dict | None = None,
    finished: Finished | None = None,
    rendered: Rendering | None = None,
) -> list[dict]:
    """
    Decodes `prompts` with chains of every length in `counts` and with the target alone, all in alternation.

    Args:
        target, draft, tokenizer, prompts, settings, progress, template_kwargs, finished, rendered: as for
            `decode_prompts`.
        counts: numbers of drafted tokens.

    Returns:
        For each of `counts`, the lengths, speeds and seconds per round from `summarize`, without its token counts.
    """
    variants = [replace(settings, num_speculative_tokens=length) for length in counts]
    names = (
        *("num_speculative_tokens", "acceptance_length", "acceptance_length_interval", "tokens_per_second"),
        *("target_only_tokens_per_second", "draft_seconds_per_round", "target_seconds_per_round"),
    )
    how = {"progress": progress, "template_kwargs": template_kwargs, "finished": finished, "rendered": rendered}
    found = decode_variants(target, draft, tokenizer, prompts, variants, **how)
    return [{name: summary[name] for name in names} for summary in map(summarize, found)]


def decode_prompts(
    target,
    draft,
    tokenizer,
    prompts: list[Prompt],
    settings: DecodingSettings,
    *,
    compare_to_target: bool = True,
    progress: bool = True,
    template_kwargs: dict | None = None,
    finished: Finished | None = None,
    rendered: Rendering | None = None,
    teacher_forced: bool = False,
    answers: dict[int, tuple] | None = None,
    warm: bool = True,
) -> Measurement:
    """
    Decodes every prompt with the draft and with the target alone, in alternation, so both run under equal conditions.

    Args:
        target (`FrozenTarget`), draft:
            The two models on one device: the target with the draft's taps, the draft with the target's embeddings.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            The target's tokenizer or processor. Its chat template renders the prompts, and its end-of-sequence token
            stops an answer. Prompts with images or videos need the processor.
        prompts (`list[Prompt]`):
            Prompts from `load_prompts`.
        settings ([`DecodingSettings`]):
            How to decode them.
        compare_to_target (`bool`, *optional*, defaults to `True`):
            Decode with the target alone as well.
        progress (`bool`, *optional*, defaults to `True`):
            Show a progress bar with the acceptance length so far.
        template_kwargs (`dict`, *optional*):
            Extra keyword arguments for the chat template, as in training: `{"enable_thinking": False}`.
        finished ([`Finished`], *optional*):
            Batches that an earlier run decoded, which are not decoded again. Also keeps those of this run.
        rendered ([`Rendering`], *optional*):
            The result of `check_rendering` for these prompts. If given, the check is not repeated.
        teacher_forced (`bool`, *optional*, defaults to `False`):
            Only count: the target answers greedily, alone, then reads prompt and answer once more, which gives the
            draft all that it needs for every round at once. The counts are those of decoding; speeds are not measured.
        answers (`dict[int, tuple]`, *optional*):
            The target's answers, kept from one teacher-forced measurement of the same prompts and settings to the next;
            at first empty.
        warm (`bool`, *optional*, defaults to `True`):
            Decode two tokens first, so that what is slow only once is not timed.

    Raises:
        `ValueError`: if there are no prompts, a prompt cannot be rendered, or the draft does not fit the target.
    """
    how = {"compare_to_target": compare_to_target, "progress": progress, "template_kwargs": template_kwargs}
    how |= {"finished": finished, "rendered": rendered, "teacher_forced": teacher_forced}
    how |= {"answers": answers, "warm": warm}
    return decode_variants(target, draft, tokenizer, prompts, [settings], **how)[0]


def decode_variants(
    target,
    draft,
    tokenizer,
    prompts: list[Prompt],
    variants: list[DecodingSettings],
    *,
    compare_to_target: bool = True,
    progress: bool = True,
    template_kwargs: dict | None = None,
    finished: Finished | None = None,
    rendered: Rendering | None = None,
    teacher_forced: bool = False,
    answers: dict[int, tuple] | None = None,
    warm: bool = True,
) -> list[Measurement]:
    """Decode prompts as `decode_prompts` does, alternating between settings that draft differently.

    `warm` decodes once before the first decoding that is timed.
    """
    if not prompts:
        raise ValueError("`prompts` is empty; give at least one prompt to measure acceptance on.")
    check_draft_fits(target, draft)
    variants = [settings.for_draft(draft) for settings in variants]

    processing, tokenizer = tokenizer, own_tokenizer(tokenizer)
    decoding = (target, draft, stop_token_ids(target.model, tokenizer))
    decoder = _Replay(*decoding, variants, answers) if teacher_forced else _Decoder(*decoding, compare_to_target)
    encode = partial(PromptBatch.of, processing=processing, template_kwargs=template_kwargs)

    # refuse prompts that cannot be rendered before decoding anything
    if rendered is None:
        rendered = check_rendering(prompts, processing, template_kwargs, variants[0].turns)
    finished = finished or Finished()
    dialogues, batches = list(prompts), planned_batches(prompts, variants[0], rendered)

    # the first decoding in a process also loads kernels and allocates memory: run it before timing starts
    if warm and not teacher_forced and any(finished.row(number) is None for number, *_ in batches):
        first = encode(prompts[:1], device=target.device)
        decoder.decode(first, [replace(settings, max_new_tokens=2) for settings in variants], 0)

    found = [Measurement(settings) for settings in variants]
    order: list[tuple[int, int]] = []  # turn and prompt of every run
    bar = tqdm(batches, desc="decoding", unit="batch", disable=not progress)
    for number, turn, places in bar:
        encoded = encode([dialogues[place] for place in places], device=target.device)
        decoded = finished.row(number)
        if decoded is None:
            decoded = decoder.decode(encoded, variants, number)
            finished.keep(number, decoded)

        for measurement, one in zip(found, decoded["variants"], strict=True):
            measurement.add(one, decoded["alone"], [prompts[place] for place in places], turn, encoded.token_ids)
        order += [(turn, place) for place in places]
        # later turns continue from the first variant's answers
        for place, answer in zip(places, decoded["variants"][0]["answers"], strict=True):
            dialogues[place] = dialogues[place].answered(tokenizer.decode(answer, skip_special_tokens=True))
        bar.set_postfix(acceptance_length=found[0].acceptance_length())

    for measurement in found:  # batches hold prompts of similar length, whatever the order of the file
        measurement.runs = [run for _, run in sorted(zip(order, measurement.runs, strict=True), key=lambda x: x[0])]
    return found


def stop_token_ids(model, tokenizer) -> frozenset[int]:
    """Return the tokens that end an answer: the tokenizer's and those of the generation config, as in vLLM."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [] if found is None else [found] if isinstance(found, int) else list(found)
    own = tokenizer.eos_token_id
    return frozenset(found if own is None else [*found, own])


class _Decoder:
    """Decode batches with every variant and with the target alone."""

    def __init__(self, target, draft, eos_token_ids: frozenset[int], compare_to_target: bool):
        self.target, self.draft, self.eos_token_ids = target, draft, eos_token_ids
        self.compare_to_target = compare_to_target

    def decode(self, batch: PromptBatch, variants: list[DecodingSettings], number: int) -> dict:
        """Decode one batch; its `number` seeds its draws.

        Returns:
            Results that JSON can hold and `Measurement.add` takes, of all `variants` and of the target `alone`.
        """
        found: dict = {"variants": [None] * len(variants), "alone": None}
        who = [*range(len(variants)), *([None] if self.compare_to_target else [])]
        # later decodings find warmer caches, so the order rotates
        shift = number % len(who)
        for place in who[shift:] + who[:shift]:
            settings = variants[place or 0]
            arguments = settings.choosing(self.target.device, number) | {"eos_token_ids": self.eos_token_ids}
            start = time.perf_counter()
            if place is None:
                answers = target_generate(self.target, **batch.inputs, **arguments)
                found["alone"] = {"answers": answers, "seconds": time.perf_counter() - start}
            else:
                output = speculative_generate(
                    self.target, self.draft, **batch.inputs, **arguments, **settings.drafting()
                )
                # the last round ended on the host, so the device is done too
                found["variants"][place] = _numbers(output) | {"seconds": time.perf_counter() - start}
        return found


class _Replay:
    """Let the target answer batches greedily, and count what each variant accepts of the answers."""

    def __init__(
        self,
        target,
        draft,
        eos_token_ids: frozenset[int],
        variants: list[DecodingSettings],
        answers: dict[int, tuple] | None = None,
    ):
        if variants[0].temperature:
            raise ValueError(
                f"`temperature` is {variants[0].temperature:g}, but `teacher_forced` counts what greedy decoding "
                "accepts: leave one of them out."
            )
        self.target, self.draft, self.eos_token_ids = target, draft, eos_token_ids
        self.answers = {} if answers is None else answers

    def decode(self, batch: PromptBatch, variants: list[DecodingSettings], number: int) -> dict:
        """As `_Decoder.decode`, without seconds."""
        shapes = [settings.shape for settings in variants]
        asked = {"max_new_tokens": variants[0].max_new_tokens, "eos_token_ids": self.eos_token_ids}
        beyond = max(shape.depth for shape in shapes) - 1
        if number not in self.answers:
            self.answers[number] = continued_answers(self.target, **batch.inputs, **asked, beyond=beyond)
        answers, after = self.answers[number]

        transcript = transcribe(self.target, **batch.inputs, answers=answers, after=after)
        no_time = dict.fromkeys(("seconds", "rounds", "draft_seconds", "target_seconds"), 0)
        found = []
        for shape in shapes:
            rounds = replay(self.draft, transcript, shape)
            counts = [per_position(of_prompt, shape.depth) for of_prompt in rounds]
            known = {"answers": answers, "drafts": list(map(len, rounds)), "accepted_per_position": counts}
            found.append(known | {"accepted_by_round": rounds} | no_time)
        return {"variants": found, "alone": None}


def _numbers(output: SpeculativeOutput) -> dict:
    return {name: getattr(output, name) for name in output.__dataclass_fields__ if name != "sequences"}
