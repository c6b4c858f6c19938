"""Check before a run that its repository on the Hub can be reached, while there is no draft to lose."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..door.sentences import first_line, is_sentence


def check_reachable(repo_id: str | None, output_dir: str | Path, token: str | None = None) -> None:
    """Raise an `OSError` if the Hub does not answer; create nothing there.

    Args:
        repo_id: the draft's repository, `None` if it has the folder's name.
        output_dir: folder of the run.
        token: token of the Hub.
    """
    from huggingface_hub import HfApi

    repo_id = repo_id or Path(output_dir).absolute().name
    with reaching_hub(repo_id):
        HfApi(token=token).repo_exists(repo_id)


@contextmanager
def reaching_hub(repo_id: str) -> Iterator[None]:
    """Turn whatever the Hub's client raises in the block into one sentence, an `OSError` that names the Hub."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        yield
    except (HTTPError, OfflineModeIsEnabled, OSError, RuntimeError) as problem:
        if is_sentence(problem):
            raise

        why = first_line(problem.__cause__ or problem) or type(problem).__name__
        raise OSError(
            f"`push_to_hub`: the Hub does not answer for {repo_id} ({why}); run again when it does, or leave out "
            "`push_to_hub` and publish the draft afterwards (scripts/publish_draft.py)."
        ) from problem
