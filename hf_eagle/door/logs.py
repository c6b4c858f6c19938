"""What a verb's log shows: this package's lines, but not a line for each request of the Hub's client."""

import logging
from typing import Any


# these log every request at INFO; which one is there depends on huggingface_hub
_CLIENTS = ("httpx", "httpx2", "httpcore", "urllib3")


def show_log(level: int = logging.INFO, **options: Any) -> None:
    """Show lines of this level and above; of HTTP clients, warnings only.

    Args:
        level: of the lines.
        options: as for `logging.basicConfig`.
    """
    logging.basicConfig(level=level, format="%(message)s", **options)
    for client in _CLIENTS:
        logging.getLogger(client).setLevel(logging.WARNING)
