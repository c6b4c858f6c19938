"""The Hub before a run: a repository that cannot be reached is told of before there is a draft to lose."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..door.sentences import first_line, is_sentence


def check_reachable(repo_id: str | None, output_dir: str | Path, token: str | None = None) -> None:
    """`OSError` if the Hub does not answer; nothing is made there.

    Args:
        repo_id: where the draft is to go, `None` for a repository that has the folder's name.
        output_dir: folder of the run.
        token: of the Hub.
    """
    from huggingface_hub import HfApi

    repo_id = repo_id or Path(output_dir).absolute().name
    with reaching_hub(repo_id):
        HfApi(token=token).repo_exists(repo_id)


@contextmanager
def reaching_hub(repo_id: str) -> Iterator[None]:
    """Whatever the Hub's client raises in here becomes one sentence, an `OSError` that names the Hub."""
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
