"""Runs scripts/publish_draft.py, in a child of a process that has imported what it needs."""

import os
import runpy
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from forks import serve_forks  # noqa: E402


def publish(printed: str, *arguments: str) -> None:
    """What the script prints goes into the file `printed`."""
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["publish_draft.py", *arguments]
    try:
        runpy.run_path(str(ROOT / "scripts" / "publish_draft.py"), run_name="__main__")
    except SystemExit as end:
        print(end.code, file=sys.stderr, flush=True)
        os._exit(1)
    finally:
        sys.stdout.flush()


if __name__ == "__main__":
    from huggingface_hub import HfApi, ModelCard  # noqa: F401
    from transformers import AutoConfig, LlamaConfig  # noqa: F401

    import hf_eagle.hub.publish  # noqa: F401
    import hf_eagle.serving.check  # noqa: F401

    serve_forks(publish)
