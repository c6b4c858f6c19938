"""Measure acceptance: decode every prompt with the draft, and with the target alone for comparison."""

import time
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from tqdm.auto import tqdm

from ..data.media import own_tokenizer
from ..decoding import SpeculativeOutput, speculative_generate, target_generate
from ..decoding.checks import DraftShape, check_draft_fits, check_sampling
from .acceptance_length import acceptance_length
from .finished import Finished
from .prompt_batches import PromptBatch, check_rendering
from .prompts import Prompt
from .summary import summarize


@dataclass(frozen=True)
class DecodingSettings:
    """How prompts are decoded. The first fields are arguments of `speculative_generate`; `None` means its default.

    Args:
        method, num_speculative_tokens, depth, top_k, total_tokens:
            Which tokens are drafted.
        temperature, top_p, sampling_top_k:
            How the target chooses.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Maximum number of tokens in an answer.
        batch_size (`int`, *optional*, defaults to `1`):
            Prompts that are decoded together.
        turns (`int`, *optional*, defaults to `1`):
            Number of turns that are decoded, if a prompt has several; later turns follow the target's answers.
        seed (`int`, *optional*, defaults to `0`):
            Seed of random draws.

    Raises:
        `ValueError`: if a value is out of range, or has no effect in combination with the others.
    """

    method: str = "chain"
    num_speculative_tokens: int | None = None
    depth: int | None = None
    top_k: int | None = None
    total_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    sampling_top_k: int | None = None
    max_new_tokens: int = 64
    batch_size: int = 1
    turns: int = 1
    seed: int = 0

    def __post_init__(self):
        self.shape  # noqa: B018 - refuse bad values here, not at first use
        check_sampling(self.temperature, self.top_p, self.sampling_top_k)
        for name in ("max_new_tokens", "batch_size", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}.")

    @property
    def shape(self) -> DraftShape:
        return DraftShape.of(self.method, self.num_speculative_tokens, self.depth, self.top_k, self.total_tokens)

    def for_draft(self, draft) -> "DecodingSettings":
        """The same settings, with the number of tokens that this draft proposes if none was asked for."""
        if self.method != "chain" or self.num_speculative_tokens is not None:
            return self
        return replace(self, num_speculative_tokens=draft.config.chain_length)

    def choosing(self, device, batch: int) -> dict:
        """Return the arguments that target and draft share, with a generator for this batch."""
        names = ("temperature", "top_p", "sampling_top_k", "max_new_tokens")
        generator = torch.Generator(device).manual_seed(self.seed + batch) if self.temperature else None
        return {name: getattr(self, name) for name in names} | {"generator": generator}

    def drafting(self) -> dict:
        names = ("method", "num_speculative_tokens", "depth", "top_k", "total_tokens")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class PromptRun:
    """One turn of one prompt, decoded with the draft and, if requested, by the target alone."""

    prompt: Prompt
    turn: int
    prompt_token_ids: list[int]
    token_ids: list[int]  # the answer, with the token that ended it
    drafts: int
    accepted_per_position: list[int]
    target_token_ids: list[int] | None


@dataclass
class Measurement:
    """All prompts, decoded with one choice of settings, and the seconds this took, including the prompts' forward pass.

    Seconds are summed over batches, as measured in the run that decoded each batch.
    """

    settings: DecodingSettings
    runs: list[PromptRun] = field(default_factory=list)
    seconds: float = 0.0
    rounds: int = 0  # forward passes of the target after those of the prompts, each for a whole batch
    draft_seconds: float = 0.0  # spent on drafting in these rounds
    target_seconds: float = 0.0  # spent in the target's forward passes
    target_only_seconds: float | None = None

    def add(self, decoded: dict, alone: dict | None, prompts: list[Prompt], turn: int, token_ids) -> None:
        """Add a batch's runs and seconds, as `_Decoder` returns them."""
        for name in ("seconds", "rounds", "draft_seconds", "target_seconds"):
            setattr(self, name, getattr(self, name) + decoded[name])

        if alone is not None:
            self.target_only_seconds = (self.target_only_seconds or 0.0) + alone["seconds"]

        for row, prompt in enumerate(prompts):
            found = [decoded[name][row] for name in ("answers", "drafts", "accepted_per_position")]
            self.runs.append(PromptRun(prompt, turn, token_ids[row], *found, alone and alone["answers"][row]))

    def acceptance_length(self) -> float | None:
        return acceptance_length([sum(r.accepted_per_position) for r in self.runs], [r.drafts for r in self.runs])


def measure_acceptance(
    target,
    draft,
    tokenizer,
    prompts: list[Prompt],
    *,
    compare_to_target: bool = True,
    progress: bool = True,
    template_kwargs: dict | None = None,
    **settings,
) -> dict:
    """
    Decodes `prompts` and returns their `summarize` result.

    Args:
        target, draft, tokenizer, prompts, compare_to_target, progress, template_kwargs: as for `decode_prompts`.
        settings: fields of [`DecodingSettings`].

    Example:
        >>> target = FrozenTarget.from_pretrained(path, tap_ids=draft.config.tap_ids)
        >>> draft = load_draft("outputs/quickstart", target)
        >>> measure_acceptance(target, draft, tokenizer, load_prompts("question.jsonl", limit=8))["acceptance_length"]
        1.475
    """
    settings = DecodingSettings(**settings)
    how = {"compare_to_target": compare_to_target, "progress": progress, "template_kwargs": template_kwargs}
    return summarize(decode_prompts(target, draft, tokenizer, prompts, settings, **how))


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
    rendered: str | None = None,
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
    rendered: str | None = None,
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
        rendered (`str`, *optional*):
            The result of `check_rendering` for these prompts. If given, the check is not repeated.

    Raises:
        `ValueError`: if there are no prompts, a prompt cannot be rendered, or the draft does not fit the target.
    """
    how = {"compare_to_target": compare_to_target, "progress": progress, "template_kwargs": template_kwargs}
    how |= {"finished": finished, "rendered": rendered}
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
    rendered: str | None = None,
) -> list[Measurement]:
    """Decode prompts as `decode_prompts` does, alternating between settings that draft differently."""
    if not prompts:
        raise ValueError("`prompts` is empty; give at least one prompt to measure acceptance on.")
    check_draft_fits(target, draft)
    variants = [settings.for_draft(draft) for settings in variants]

    processing, tokenizer = tokenizer, own_tokenizer(tokenizer)
    decoder = _Decoder(target, draft, stop_token_ids(target.model, tokenizer), compare_to_target)
    dialogues, batches = list(prompts), _batches(prompts, variants[0])
    encode = partial(PromptBatch.of, processing=processing, template_kwargs=template_kwargs)

    # refuse prompts that cannot be rendered before decoding anything
    if rendered is None:
        check_rendering(prompts, processing, template_kwargs, variants[0].turns)
    finished = finished or Finished()

    # the first decoding in a process also loads kernels and allocates memory: run it before timing starts
    if any(finished.row(number) is None for number, *_ in batches):
        first = encode(prompts[:1], device=target.device)
        decoder.decode(first, [replace(settings, max_new_tokens=2) for settings in variants], 0)

    found = [Measurement(settings) for settings in variants]
    bar = tqdm(batches, desc="decoding", unit="batch", disable=not progress)
    for number, turn, places in bar:
        encoded = encode([dialogues[place] for place in places], device=target.device)
        decoded = finished.row(number)
        if decoded is None:
            decoded = decoder.decode(encoded, variants, number)
            finished.keep(number, decoded)

        for measurement, one in zip(found, decoded["variants"], strict=True):
            measurement.add(one, decoded["alone"], [prompts[place] for place in places], turn, encoded.token_ids)
        # later turns continue from the first variant's answers
        for place, answer in zip(places, decoded["variants"][0]["answers"], strict=True):
            dialogues[place] = dialogues[place].answered(tokenizer.decode(answer, skip_special_tokens=True))
        bar.set_postfix(acceptance_length=found[0].acceptance_length())
    return found


def _batches(prompts: list[Prompt], settings: DecodingSettings) -> list[tuple[int, int, list[int]]]:
    """Return `(number from 1 on, turn, indices of prompts)` of every batch, the same in every run."""
    asked = [[p for p, x in enumerate(prompts) if len(x.follow_ups) >= turn] for turn in range(settings.turns)]
    size = settings.batch_size
    batches = [(turn, x[i : i + size]) for turn, x in enumerate(asked) for i in range(0, len(x), size)]
    return [(number, *batch) for number, batch in enumerate(batches, 1)]


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


def _numbers(output: SpeculativeOutput) -> dict:
    return {name: getattr(output, name) for name in output.__dataclass_fields__ if name != "sequences"}
