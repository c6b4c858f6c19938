"""Prompts with the target's greedy answers, kept once: a change of the draft then costs the draft's part alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..decoding.checks import DraftShape
from ..decoding.continued import continued_answers
from ..decoding.replay import Transcript, replay, replay_places, transcribe
from ..decoding.verification import per_position
from ..evaluation.acceptance import decode_prompts, stop_token_ids
from ..evaluation.measurement import DecodingSettings, Measurement, PromptRun
from ..evaluation.prompt_batches import PromptBatch, check_rendering, planned_batches
from ..evaluation.prompts import Prompt


_KEPT = 2**30  # bytes of the target's readings that are kept; beyond, it reads again


class Sample:
    """A sample of prompts, each answered greedily by the target.

    Args:
        target ([`FrozenTarget`]): the target.
        tokenizer: its tokenizer.
        prompts: what it is asked, one turn each.
        settings: how it answers, and which chain is drafted.
        template_kwargs: further arguments of the chat template.

    Raises:
        ValueError: if a prompt cannot be rendered.
    """

    def __init__(
        self, target, tokenizer, prompts: list[Prompt], settings: DecodingSettings, template_kwargs: dict | None = None
    ):
        self.target, self.tokenizer, self.prompts = target, tokenizer, prompts
        self.settings, self.template_kwargs = replace(settings, turns=1), template_kwargs
        self.rendered = check_rendering(prompts, tokenizer, template_kwargs)
        self.places = [places for _, _, places in planned_batches(prompts, self.settings, self.rendered)]
        self._answers: dict[int, tuple] = {}  # with what follows them, by the number of a batch
        self._readings: dict[tuple, Transcript] = {}  # by the number of a batch, and what was tapped
        self._room = _KEPT

    def like(self, prompts: list[Prompt] | None = None, target=None, template_kwargs: dict | None = None) -> "Sample":
        """A sample with the same settings: other prompts, another target, or other options of the chat template."""
        return Sample(
            self.target if target is None else target,
            self.tokenizer,
            self.prompts if prompts is None else prompts,
            self.settings,
            self.template_kwargs if template_kwargs is None else template_kwargs,
        )

    def transcripts(self, tap_ids: list[int] | None = None) -> Iterator[tuple[list[int], PromptBatch, Transcript]]:
        """The target's reading of each batch: which prompts it holds, their tokens, and all that a draft is shown.

        Args:
            tap_ids: entry ids to read the target with, other than its own.
        """
        stop = stop_token_ids(self.target.model, self.tokenizer)
        asked = {"max_new_tokens": self.settings.max_new_tokens, "eos_token_ids": stop}
        for number, places in enumerate(self.places):
            prompts = [self.prompts[place] for place in places]
            batch = PromptBatch.of(prompts, self.tokenizer, self.target.device, self.template_kwargs)
            if number not in self._answers:
                beyond = self.settings.shape.depth - 1
                self._answers[number] = continued_answers(self.target, **batch.inputs, **asked, beyond=beyond)

            with tapped(self.target, tap_ids):
                yield places, batch, self._reading(number, batch)

    def _reading(self, number: int, batch: PromptBatch) -> Transcript:
        key = (number, *(self.target.tap_ids or ()))
        if key not in self._readings:
            answers, after = self._answers[number]
            found = transcribe(self.target, **batch.inputs, answers=answers, after=after)
            size = _bytes_of(found)
            if size > self._room:
                return found
            self._readings[key], self._room = found, self._room - size
        return self._readings[key]

    def said(self) -> list[tuple[list[int], list[int]]]:
        """Of every prompt the answer, and the tokens behind its end."""
        if len(self._answers) < len(self.places):
            for _ in self.transcripts():
                pass
        found = {}
        for number, places in enumerate(self.places):
            found |= dict(zip(places, zip(*self._answers[number], strict=True), strict=True))
        return [found[place] for place in range(len(self.prompts))]

    def keep_answers_of(self, other: "Sample") -> None:
        """Take the answers of a sample of the same prompts, which another target gave."""
        self._answers = dict(enumerate(self._batched(other.said())))
        self._readings, self._room = {}, _KEPT

    def _batched(self, said: list[tuple[list[int], list[int]]]) -> Iterator[tuple]:
        for places in self.places:
            yield tuple(map(list, zip(*(said[place] for place in places), strict=True)))

    def replayed(self, drafts: Sequence, tap_ids: list[int] | None = None) -> list[Measurement]:
        """What decoding these prompts with each draft accepts, see `hf_eagle.decoding.replay`."""
        runs: list[dict[int, PromptRun]] = [{} for _ in drafts]
        for places, batch, transcript in self.transcripts(tap_ids):
            answers = [transcript.ids[row, n : n + end].tolist() for row, n, end in _spans(transcript)]
            for draft, found in zip(drafts, runs, strict=True):
                rounds = replay(draft, transcript, self.settings.shape)
                for row, place in enumerate(places):
                    found[place] = self._run(place, batch.token_ids[row], answers[row], rounds[row])
        return [Measurement(self.settings, [found[place] for place in sorted(found)]) for found in runs]

    def at_every_place(self, draft, depth: int) -> list[list[int]] | None:
        """Of every prompt how many of `depth` drafted tokens are right behind each token of its answer but the last.

        `None` for a draft that can only propose round after round.
        """
        found: dict[int, list[int]] = {}
        for places, _, transcript in self.transcripts():
            counts = replay_places(draft, transcript, DraftShape.of(num_speculative_tokens=depth))
            if counts is None:
                return None
            found |= dict(zip(places, counts, strict=True))
        return [found[place] for place in range(len(self.prompts))]

    def decoded(self, draft, tap_ids: list[int] | None = None, **changed) -> Measurement:
        """Decode the prompts with a draft, which is what a replay foresees.

        Args:
            draft, tap_ids: the draft, and the layers that it is shown, if not the target's.
            changed: settings other than the sample's.
        """
        how = {"compare_to_target": False, "progress": False, "template_kwargs": self.template_kwargs, "warm": False}
        with tapped(self.target, tap_ids):
            return decode_prompts(
                self.target,
                draft,
                self.tokenizer,
                self.prompts,
                replace(self.settings, **changed),
                rendered=self.rendered,
                **how,
            )

    def _run(self, place: int, token_ids: list[int], answer: list[int], rounds: list[int]) -> PromptRun:
        counts = per_position(rounds, self.settings.shape.depth)
        return PromptRun(self.prompts[place], 0, token_ids, answer, len(rounds), counts, rounds, None)


def _bytes_of(transcript: Transcript) -> int:
    """Bytes of the features in it."""
    tensors = [x for part in (transcript.read, transcript.said) if part is not None for x in vars(part).values()]
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))


def _spans(transcript: Transcript) -> Iterator[tuple[int, int, int]]:
    """Row, length of the prompt and length of the answer."""
    lengths = transcript.prompts.lengths.host
    return zip(range(len(lengths)), lengths, transcript.ends, strict=True)


@contextmanager
def tapped(target, tap_ids: list[int] | None) -> Iterator[None]:
    """Read a target with other taps inside the block; with its own for `None`."""
    before = target.tap_ids
    if tap_ids is not None:
        target.tap_ids = tap_ids
    try:
        yield
    finally:
        target.tap_ids = before
