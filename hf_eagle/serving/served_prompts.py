"""Prompts in the form of `offline_engine`: token ids, and chats with images as a client would send them."""

from collections.abc import Iterable

from ..answers.served_target import sent_message
from ..data.picture_forms import kind_of, parts_of
from ..evaluation.prompt_batches import PromptBatch
from ..evaluation.prompts import Prompt


def served_prompts(
    prompts: Iterable[Prompt], processing, template_kwargs: dict | None = None
) -> tuple[list[list[int] | dict], int]:
    """Return an engine's prompts, and the tokens of the longest one, including those of images.

    Args:
        prompts, processing, template_kwargs: as for [`PromptBatch.of`].

    Returns:
        The token ids of each prompt. For one with images, which the server renders: its `messages`, with images as
        `image_url` parts with data URLs, its `tools` and its `chat_template_kwargs`.

    Raises:
        ValueError: as [`PromptBatch.of`], and for a video.
    """
    asked, longest = [], 0
    for prompt in prompts:
        kinds = kinds_of(prompt)
        if "video" in kinds:
            raise ValueError(
                f"Prompt {prompt.id!r} contains a video, but servers are measured with images only: leave it out."
            )
        (ids,) = PromptBatch.of([prompt], processing, template_kwargs=template_kwargs).token_ids
        longest = max(longest, len(ids))
        chat = {"messages": list(map(sent_message, prompt.messages)), "tools": prompt.tools}
        asked.append({**chat, "chat_template_kwargs": template_kwargs} if kinds else ids)
    return asked, longest


def kinds_of(prompt: Prompt) -> list[str]:
    """`"image"` or `"video"` for each medium that a prompt shows, in their order."""
    found = [kind_of(part) for message in prompt.messages for part in parts_of(message)]
    return [kind for kind in found if kind is not None]


def engine_arguments(prompts: Iterable[Prompt]) -> dict:
    """Return the arguments that vLLM needs for the images of these prompts; none for text.

    The cache of processed images is off, so that every round processes them as if it saw them for the first time.
    """
    most = max(map(len, map(kinds_of, prompts)), default=0)
    return {"limit_mm_per_prompt": {"image": most, "video": 0}, "mm_processor_cache_gb": 0} if most else {}
