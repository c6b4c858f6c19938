"""Reads data sets of a Hub, in a child of a process that has imported what it needs."""

import json
import os
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from forks import serve_forks  # noqa: E402


def read(output: str, token: str, offline: str, source: str, options: str) -> None:
    """Writes the records, or the error, as JSON into the file `output`."""
    import logging

    import datasets
    import huggingface_hub

    from hf_eagle.data.records import load_records

    if token:
        os.environ["HF_TOKEN"] = token
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = bool(offline)
    told = Told()
    logging.getLogger("hf_eagle").addHandler(told)
    try:
        records = [dict(record) for record in load_records(source, **json.loads(options))]
        found = {"records": records, "warnings": told.lines}
    except (OSError, ValueError) as problem:
        found = {"error": f"{type(problem).__name__}: {problem}"}
    Path(output).write_text(json.dumps(found))


class Told:
    """A handler of warnings."""

    level = 30

    def __init__(self):
        self.lines = []

    def handle(self, record):
        self.lines.append(record.getMessage())


if __name__ == "__main__":
    import hf_eagle.data.records  # noqa: F401

    serve_forks(read)
