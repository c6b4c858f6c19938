"""Prompts as `offline_engine` takes them: token ids, and chats with pictures as a client would send them."""

from collections.abc import Iterable

from ..answers.served_target import sent_message
from ..data.picture_forms import kind_of, parts_of
from ..evaluation.prompt_batches import PromptBatch
from ..evaluation.prompts import Prompt


def served_prompts(
    prompts: Iterable[Prompt], processing, template_kwargs: dict | None = None
) -> tuple[list[list[int] | dict], int]:
    """What an engine is asked, and the tokens of the longest prompt, those of pictures included.

    Args:
        prompts, processing, template_kwargs: as for [`PromptBatch.of`].

    Returns:
        Of each prompt its token ids; of one with pictures its `messages`, whose pictures are `image_url` parts with
        data addresses, its `tools` and `chat_template_kwargs`: the server renders it.

    Raises:
        ValueError: as [`PromptBatch.of`], and for a video.
    """
    asked, longest = [], 0
    for prompt in prompts:
        kinds = kinds_of(prompt)
        if "video" in kinds:
            raise ValueError(
                f"Prompt {prompt.id!r} shows a video, but servers are measured with pictures: leave it out."
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
    """What vLLM must be started with for the pictures of these prompts; nothing for text.

    Without a cache of processed pictures every round processes them, as if it were asked for the first time.
    """
    most = max(map(len, map(kinds_of, prompts)), default=0)
    return {"limit_mm_per_prompt": {"image": most, "video": 0}, "mm_processor_cache_gb": 0} if most else {}
