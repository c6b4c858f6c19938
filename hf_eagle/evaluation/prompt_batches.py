"""Prompts as a model takes them: token ids padded on the left and, of images and videos, what the processor makes."""

from dataclasses import dataclass, replace

import torch

from ..data.media import KINDS, as_text, from_text, has_media, own_tokenizer, read_media_record
from .prompts import Prompt, encode_prompt, render_prompt


@dataclass(frozen=True)
class PromptBatch:
    """Prompts to be decoded together.

    Attributes:
        token_ids: of every prompt, those of media included.
        inputs: `input_ids` `(batch, longest)`, `attention_mask` (`None` for a single prompt) and media, as
            `speculative_generate` takes them.
    """

    token_ids: list[list[int]]
    inputs: dict[str, torch.Tensor | None]

    @classmethod
    def of(cls, prompts: list[Prompt], processing, device="cpu") -> "PromptBatch":
        """Render prompts and load their media.

        Args:
            prompts: what `load_prompts` returns.
            processing: the target's tokenizer, or its processor, which prompts with media need.

        Raises:
            ValueError: naming a prompt that the template refuses, or a medium that cannot be loaded or be shown.
        """
        tokenizer = own_tokenizer(processing)
        if not any(holds_media(prompt) for prompt in prompts):
            return cls._of_tokens([encode_prompt(prompt, tokenizer) for prompt in prompts], device)
        if tokenizer is processing:
            raise ValueError(
                f"Prompt {next(filter(holds_media, prompts)).id!r} holds images or videos, but the target takes text "
                "only: use a target that takes them, with its processor."
            )
        texts: list[str] = []
        media: dict[str, list] = {kind: [] for kind in KINDS}
        for prompt in prompts:
            text, loaded = _rendered(prompt, tokenizer)
            texts.append(text)
            for kind in KINDS:
                media[kind] += loaded[kind]
        given = {f"{kind}s": x or None for kind, x in media.items()}
        try:
            made = processing(text=texts, **given, return_tensors="pt", padding=True, padding_side="left")
        except Exception as problem:  # whatever a processor raises
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


def holds_media(prompt: Prompt) -> bool:
    """Whether a prompt shows an image or a video."""
    return has_media({"messages": prompt.messages})


def _rendered(prompt: Prompt, tokenizer) -> tuple[str, dict[str, list]]:
    """A prompt as text, with a placeholder for each medium, and its media by kind."""
    messages, media, _ = read_media_record({"messages": prompt.messages}, prompt.id)
    try:
        loaded = from_text(as_text(media))
    except Exception as problem:  # whatever a decoder of images raises
        raise ValueError(f"A medium of prompt {prompt.id!r} cannot be loaded: {str(problem)[:200]}") from problem
    return render_prompt(replace(prompt, messages=messages), tokenizer), loaded
