"""Turn prompts into model inputs: token ids padded on the left, and the processor's tensors of images and videos."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch

from ..data.frames import NoDecoder
from ..data.media import as_text, from_text, own_tokenizer, read_media_record, shown
from ..data.rendering import ChatRenderer
from .measurement import DecodingSettings
from .prompts import Prompt, encode_prompt, holds_media, render_chat


__all__ = ["PromptBatch", "check_rendering", "holds_media"]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts to be decoded together.

    Attributes:
        token_ids: token ids of every prompt, including those of its media.
        inputs: `input_ids` `(batch, longest)`, `attention_mask` (`None` for a single prompt) and media, as
            `speculative_generate` takes them.
    """

    token_ids: list[list[int]]
    inputs: dict[str, torch.Tensor | None]

    @classmethod
    def of(cls, prompts: list[Prompt], processing, device="cpu", template_kwargs: dict | None = None) -> "PromptBatch":
        """Render prompts and load their media.

        Args:
            prompts: prompts from `load_prompts`.
            processing: the target's tokenizer, or its processor, which prompts with media need.
            device: device of the tensors.
            template_kwargs: extra keyword arguments for the chat template, as in training: `{"enable_thinking":
                False}`.

        Raises:
            ValueError: names a prompt that the template refuses, or a medium that cannot be loaded or shown.
        """
        tokenizer = own_tokenizer(processing)
        if tokenizer is processing:
            return cls._of_tokens([encode_prompt(prompt, tokenizer, template_kwargs) for prompt in prompts], device)

        renderer = ChatRenderer(tokenizer, template_kwargs)
        if not any(map(holds_media, prompts)):
            rendered = [render_chat(prompt, renderer) for prompt in prompts]
            return cls._of_tokens(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"], device)

        rendered = [_rendered(prompt, renderer, processing) for prompt in prompts]
        texts, media = zip(*rendered, strict=True)
        try:
            made = shown(processing, texts, media, return_tensors="pt", padding=True, padding_side="left")
        except ImportError:  # something is to be installed
            raise
        except Exception as problem:  # a processor may raise anything
            names = ", ".join(repr(prompt.id) for prompt in prompts)
            raise ValueError(f"The processor refuses the media of the prompts {names}: {problem}") from problem

        batch = {name: torch.as_tensor(x).to(device) for name, x in made.items()}
        present = batch["attention_mask"].bool()
        ids = [row[seen].tolist() for row, seen in zip(batch["input_ids"], present, strict=True)]
        return cls(ids, batch)

    @classmethod
    def _of_tokens(cls, token_ids: list[list[int]], device) -> "PromptBatch":
        longest = max(map(len, token_ids))
        ids = [[0] * (longest - len(row)) + row for row in token_ids]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in token_ids]
        inputs = {"input_ids": torch.tensor(ids, device=device), "attention_mask": None}
        if len(ids) > 1:
            inputs["attention_mask"] = torch.tensor(mask, device=device)
        return cls(token_ids, inputs)


class Rendering(NamedTuple):
    """What is known of prompts that can be rendered.

    Attributes:
        digest: a hash of the resulting tensors and of the prompts, 16 hex digits.
        lengths: tokens of every prompt, turn by turn, with a word in place of each answer.
    """

    digest: str
    lengths: list[list[int]]


_TOKENS = 16_384  # of prompts and answers in a batch: keys of a long context need memory


def planned_batches(
    prompts: list[Prompt], settings: DecodingSettings, rendered: Rendering
) -> list[tuple[int, int, list[int]]]:
    """
    Return `(number from 1 on, turn, indices of prompts)` of every batch, the same in every run.

    A batch holds prompts of similar length, and fewer than `batch_size` of them if they are long.

    Args:
        prompts: the prompts, of which turns after the first are not known yet.
        settings: how many turns are decoded, and in what batches.
        rendered: their lengths, which count only for batches of several prompts.
    """
    together = settings.batch_size > 1
    batches: list[tuple[int, list[int]]] = []
    for turn in range(settings.turns):
        asked = [place for place, prompt in enumerate(prompts) if len(prompt.follow_ups) >= turn]
        # earlier answers are still unknown, and as long as they can be
        lengths = {place: rendered.lengths[place][turn] if together else 0 for place in asked}
        places: list[int] = []
        for place in sorted(asked, key=lengths.__getitem__):
            longest = lengths[place] + (turn + 1) * settings.max_new_tokens
            if len(places) == settings.batch_size or places and (len(places) + 1) * longest > _TOKENS:
                batches.append((turn, places))
                places = []
            places.append(place)
        batches += [(turn, places)] * bool(places)
    return [(number, *batch) for number, batch in enumerate(batches, 1)]


def check_rendering(
    prompts: list[Prompt], processing, template_kwargs: dict | None = None, turns: int = 1
) -> Rendering:
    """Render every turn that will be decoded, with a word in place of each answer, and load all media.

    Args:
        prompts, processing, template_kwargs: as for [`PromptBatch.of`].
        turns: number of turns that will be decoded, if a prompt has several.

    Raises:
        ValueError: as for [`PromptBatch.of`].
    """
    digest, lengths = hashlib.sha256(), []
    for prompt in prompts:
        lengths.append([])
        digest.update(json.dumps(asdict(prompt), default=str).encode())
        for turn in range(1 + min(len(prompt.follow_ups), turns - 1)):
            prompt = prompt.answered("x") if turn else prompt
            batch = PromptBatch.of([prompt], processing, template_kwargs=template_kwargs)
            lengths[-1].append(len(batch.token_ids[0]))
            for name, tensor in sorted(batch.inputs.items()):
                if tensor is not None:
                    digest.update(f"{name} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return Rendering(digest.hexdigest()[:16], lengths)


def _rendered(prompt: Prompt, renderer: ChatRenderer, processor) -> tuple[str, dict[str, list]]:
    """Return a prompt's text, with a placeholder for each medium, and its media by kind."""
    messages, media, _ = read_media_record({"messages": prompt.messages}, prompt.id)
    try:
        loaded = from_text(as_text(media), processor)
    except NoDecoder:
        raise
    except Exception as problem:  # a decoder of images may raise anything
        raise ValueError(f"A medium of prompt {prompt.id!r} cannot be loaded: {str(problem)[:200]}") from problem
    return render_chat(replace(prompt, messages=messages), renderer), loaded
