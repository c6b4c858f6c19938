"""Check how many tokens a target can read, from its config, before its weights are loaded."""

from typing import Any

from transformers import PreTrainedConfig

from .adapters import to_the_base
from .loading import load_config


def config_before_loading(
    target: str, *, revision: str = "main", trust_remote_code: bool = False, gguf_file: str | None = None
) -> PreTrainedConfig | None:
    """The config of a target, or of an adapter's base; `None` for a GGUF file, which has no config.

    Args:
        target: a folder or a Hub id, also of an adapter.
        revision, trust_remote_code, gguf_file: where the target comes from.

    Raises:
        OSError: if there is no such target.
    """
    if gguf_file is not None:
        return None

    _, name, revision = to_the_base(target, revision)
    return load_config(name, revision, trust_remote_code)


def check_room(
    target: str,
    argument: str,
    tokens: int,
    beside: int = 0,
    **source: Any,
) -> PreTrainedConfig | None:
    """Check that a target reads as many tokens as an argument asks for.

    Args:
        target, source: as for [`config_before_loading`].
        argument: the argument that asks for them, such as `max_new_tokens`.
        tokens: its value.
        beside: further tokens that need room, such as those of a prompt.

    Returns:
        The target's config; `None` for a GGUF file.

    Raises:
        OSError: if there is no such target.
        ValueError: naming the argument, if the target reads fewer.
    """
    config = config_before_loading(target, **source)
    if config is None:
        return None

    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and tokens + beside > longest:
        together = " with its prompt" if beside else ""
        raise ValueError(
            f"`{argument}` is {tokens}, but `target` {target} reads {longest} tokens at most{together}: set it to "
            f"{longest - beside} at most, or take another target."
        )

    return config
