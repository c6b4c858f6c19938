"""Set up a verb's log: it shows this package's lines, but not one per request to the Hub. And silence a part of it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .sentences import without_secrets


# these log every request at INFO; which one is there depends on huggingface_hub
_CLIENTS = ("httpx", "httpx2", "httpcore", "urllib3")


def show_log(level: int = logging.INFO, **options: Any) -> None:
    """Show lines of this level and above, without secrets; of HTTP clients, warnings only.

    Args:
        level: the lowest level to show.
        options: as for `logging.basicConfig`.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_WithoutSecrets("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler], **options)
    for client in _CLIENTS:
        logging.getLogger(client).setLevel(logging.WARNING)


@contextmanager
def errors_only(name: str) -> Iterator[None]:
    """Suppress warnings of the logger of this name, and of those below it."""
    logger = logging.getLogger(name)
    level = logger.level

    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _WithoutSecrets(logging.Formatter):
    """A library's error, which a line may tell, may repeat what was sent to the Hub."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))
