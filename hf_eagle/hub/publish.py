"""Put a draft's folder on the Hub: the files that servers and readers need, and no training state."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

from ..door.connection import read_key
from ..door.names import at_home, check_hub_id, is_hub_id
from ..door.writing import link_or_copy
from ..drafts.kinds import architectures_of
from .card_facts import CardFacts, facts_from, with_measured
from .custom_generate import FOLDER, bundle
from .licenses import inherited_license
from .model_card import CARD, card_text, facts_of_card, is_edited


# optimizer states, checkpoints, `training_args.bin` and logs are not published
PUBLISHED = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.png", "acceptance*.json", "serving*.json")


def contents(
    folder: str | Path,
    repo_id: str,
    include: tuple[str, ...] | list[str] = (),
    facts: dict[str, object] | None = None,
    leave_out_broken: bool = False,
) -> dict[str, Path | bytes]:
    """
    Return the contents of a repository for this draft.

    An unedited or missing card is rendered again: it names the repository as the draft, and shows every
    `acceptance*.json` in the folder. An edited card is sent as it is. The files of `custom_generate/` are made for this
    repository. The folder does not change.

    Args:
        folder (`str` or `Path`):
            The draft's folder.
        repo_id (`str`):
            The repository's name.
        include (list of `str`, *optional*):
            Patterns of further files in the folder, for example `checkpoint-*/*`.
        facts (`dict`, *optional*):
            Fields of `CardFacts` that the card lacks, for example `license`.
        leave_out_broken (`bool`, *optional*, defaults to `False`):
            With a warning, leave out measurements that cannot be read, and keep a card whose facts cannot be read.

    Returns:
        `dict[str, Path | bytes]`: from the path in the repository to a file or a content.

    Raises:
        ValueError: if the folder holds no draft, a pattern of `include` matches nothing, a repository's name is
            invalid, `facts` are given for a card that has none or was edited, or a measurement or the card's facts
            cannot be read.
    """
    folder = at_home(folder)
    files: dict[str, Path | bytes] = dict(files_of(folder, include))

    known = facts_to_publish(folder, repo_id, facts, leave_out_broken)
    if known is not None:
        files[CARD] = card_text(folder, known).encode()
    elif (folder / CARD).is_file():
        files[CARD] = (folder / CARD).read_bytes()

    carried = bundle(repo_id, architectures_of(folder))
    files |= {f"{FOLDER}/{name}": source.encode() for name, source in carried.items()}
    return dict(sorted(files.items()))


def facts_to_publish(
    folder: str | Path, repo_id: str, facts: dict[str, object] | None = None, leave_out_broken: bool = False
) -> CardFacts | None:
    """Return the facts for the card of `contents`, `None` if a person edited it; raise as `contents` does."""
    folder, given = (
        at_home(folder),
        {name: value for name, value in (facts or {}).items() if value is not None},
    )

    if not is_hub_id(repo_id):
        raise ValueError(f"`repo_id` is {repo_id!r}, which is no repository's name: give one like `you/your-draft`.")
    if given.get("base_model") is not None:
        check_hub_id("base_model", given["base_model"])

    found = None if leave_out_broken and is_edited(folder) else facts_of_card(folder)
    if found is None:
        if given:
            problem = "was edited: write it there" if (folder / CARD).is_file() else "is missing: write one first"
            raise ValueError(f"`{next(iter(given))}` belongs on the card, but {folder / CARD} {problem}.")
        return None

    found = facts_from(asdict(found) | {"draft": repo_id} | given)
    if found.license is None:
        found = replace(found, **inherited_license(found.target, found.base_model))

    return with_measured(found, folder, leave_out_broken)


def files_of(folder: str | Path, include: tuple[str, ...] | list[str] = ()) -> dict[str, Path]:
    """Return the part of `contents` that is sent unchanged from the folder; raise as `contents` does."""
    folder = at_home(folder)
    missing = [name for name in ("config.json", "*.safetensors") if not any(folder.glob(name))]
    if missing:
        raise ValueError(f"`draft` {folder} holds no {' and no '.join(missing)}: name a folder that training has left.")

    found = {path for pattern in PUBLISHED for path in folder.glob(pattern)}
    for pattern in include:
        try:
            more = [path for path in folder.glob(pattern) if path.is_file()]
            inside = ".." not in Path(pattern).parts
        except (NotImplementedError, ValueError):  # an empty or absolute pattern
            inside = False

        if not inside:
            raise ValueError(f"`include` {pattern!r} is no pattern of files in {folder}: give one like checkpoint-*/*.")
        if not more:
            raise ValueError(f"`include` {pattern!r} matches no file in {folder}.")
        for path in set(more) - found:
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"`include` {pattern!r} matches {path}, a link to {path.resolve()}, which lies outside of the "
                    "draft's folder: copy the file there if it is to be published."
                )
        found.update(more)

    return {path.relative_to(folder).as_posix(): path for path in found}


def check_card(folder: str | Path) -> None:
    """Raise a `ValueError` if the Hub would not accept the README.md as a card."""
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    card = at_home(folder) / CARD
    if not card.exists():
        return

    mend = "correct it, or move it away"
    if not card.is_file():
        raise ValueError(f"{card} is a folder, where the draft's card belongs: {mend}.")
    try:
        metadata_load(card)
    except UnicodeDecodeError as problem:
        raise ValueError(f"{card} is not UTF-8 (byte {problem.start}), so no card: {mend}.") from problem
    except (OSError, ValueError, YAMLError) as problem:
        why = " ".join(str(problem).split())
        raise ValueError(f"{card} does not begin with YAML as cards do ({why}): {mend}.") from problem


def _freeze(files: dict[str, Path | bytes], folder: Path) -> dict[str, Path | bytes]:
    """Link or copy the files of `contents` into `folder`, and return `contents` that are read from there."""
    frozen = {name: folder / name for name, content in files.items() if isinstance(content, Path)}
    for name, path in frozen.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        keep = link_or_copy if path.suffix == ".safetensors" else shutil.copy
        keep(files[name], path)

    return files | frozen


def publish_draft(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload draft",
    include: tuple[str, ...] | list[str] = (),
    facts: dict[str, object] | None = None,
    run_as_future: bool = False,
    frozen_in: str | Path | None = None,
    leave_out_broken: bool = False,
):
    """
    Upload a draft in one commit. After an interruption, the same call continues: it sends no weights twice.

    Args:
        folder, include, facts, leave_out_broken: as for `contents`.
        repo_id (`str`):
            Repository, created if it does not exist.
        private (`bool`, *optional*):
            Whether a new repository is private.
        revision (`str`, *optional*):
            Branch, created if it does not exist. By default `main`.
        token (`str`, *optional*):
            Token of the Hub. By default the one that `hf auth login` stored.
        commit_message (`str`, *optional*):
            Message of the commit.
        run_as_future (`bool`, *optional*, defaults to `False`):
            Return at once, with a future of the result.
        frozen_in (`str` or `Path`, *optional*):
            For a future: a new folder that keeps the files as they are now until the upload ends. Meanwhile others may
            be written, and weights replaced by new files. On the draft's disk weights are linked, not copied.

    Returns:
        [`~huggingface_hub.CommitInfo`], or a future of it.

    Raises:
        ValueError: as for `contents` and, unless broken files are left out, `check_card`.
        OSError: if the Hub refuses the token or cannot be reached, in one sentence.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    # the client's HTTP library differs between releases, so import its error as the client does
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    # report errors in the folder before there is a repository
    files_of(folder, include)
    if not leave_out_broken:
        check_card(folder)
    facts_to_publish(folder, repo_id, facts, leave_out_broken)

    api = HfApi(token=read_key(token, "`token`"))
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # completed with its owner's name
        files = contents(folder, repo_id, include, facts, leave_out_broken)
        if frozen_in is not None:
            files = _freeze(files, Path(frozen_in))
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)

        job = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=commit_message,
            revision=revision,
            run_as_future=run_as_future,
        )
        if frozen_in is not None:
            job.add_done_callback(lambda _: shutil.rmtree(frozen_in, ignore_errors=True))
        return job
    except HfHubHTTPError as problem:
        status = problem.response.status_code if problem.response is not None else None
        if status in (401, 403):
            raise OSError(
                f"The Hub does not let this token write to `repo_id` {repo_id} ({status}): pass another `token`, or "
                "log in again with `hf auth login`."
            ) from problem
        raise OSError(f"The Hub refused {repo_id} ({problem}): nothing was committed, run it again.") from problem
    except (HTTPError, OSError, RuntimeError) as problem:
        raise OSError(
            f"The connection to the Hub failed ({problem.__cause__ or problem}): nothing was committed. Run it again; "
            "files that have arrived are not sent twice."
        ) from problem
