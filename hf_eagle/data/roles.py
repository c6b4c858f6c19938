"""Read who speaks in a message, from the names that data sets use."""

from collections.abc import Mapping
from typing import Any


ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",  # ShareGPT's tool forms: the call is written by the model, the observation is not
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}
CALLS = ("function_call", "tool_call")


def role_of(turn: Mapping) -> str | None:
    """Return our name for a message's speaker; `None` if the speaker is not known."""
    said = speaker(turn)
    return ROLES.get(said) if isinstance(said, str) else None


def speaker(turn: Mapping) -> Any:
    """Return a message's name for its speaker, in lower case, since `User` and `ASSISTANT` are known too."""
    said = turn.get("role") or turn.get("from")
    return said.lower() if isinstance(said, str) else said
