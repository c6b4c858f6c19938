"""Find the files of a source: those of its split, without hidden files and files that are not data."""

import logging
import mimetypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

from datasets import get_dataset_config_names, load_dataset_builder
from huggingface_hub import HfFileSystem, hf_hub_download, snapshot_download

from .opening import COMPRESSED
from .tables import KINDS, TEXTS, ending_of


logger = logging.getLogger(__name__)

# how `datasets` reads the names of files and folders
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_COLON = re.compile(r":(?![^\[]*\])")  # except a colon in `train[:100]`
_BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")
_NO_DATA = {
    "config.json",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "generation_config.json",
    "metadata.json",
    "package.json",
    "special_tokens_map.json",
    "state.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def saved_form(folder: Path) -> str | None:
    """Return `"one"` or `"splits"` if `save_to_disk` wrote the folder, without or with several splits; else `None`."""
    if os.path.isfile(folder / "state.json"):
        return "one"
    return "splits" if os.path.isfile(folder / "dataset_dict.json") else None


def files_of(folder: Path, split: str, tell: bool = True) -> list[Path]:
    """Return the data files of a folder, sorted by name.

    A file belongs to the split that the names of its folders mention, else its file name, else to `train`. Hidden files
    and folders (`.name`, `__name__`), JSON files of metadata, and files with other endings are not data. One line of
    the log names the files left out, except for media and texts about the data.

    Args:
        folder: folder to search, at any depth.
        split: the split to return.
        tell: log the files left out.

    Raises:
        ValueError: if no file is left.
    """
    try:
        there = sorted(file for file in folder.rglob("*") if os.path.isfile(file))
    except OSError as problem:
        said = f"{folder} cannot be read as a folder of data ({problem.strerror}): name a different one."
        raise ValueError(said) from problem

    names = {file: file.relative_to(folder) for file in there}
    all_hidden = {file for file in there if any(part.startswith((".", "__")) for part in names[file].parts)}

    found = [file for file in there if ending_of(file) in KINDS]
    unread = [file for file in there if file not in all_hidden and _may_hold_data(file)]
    hidden = [file for file in found if file in all_hidden]
    no_data = [file for file in found if file not in hidden and file.name in _NO_DATA]
    rest = [file for file in found if file not in hidden and file not in no_data]

    plain = set(rest)
    twins = [file for file in rest if file.suffix in COMPRESSED and file.with_suffix("") in plain]
    rest = [file for file in rest if file not in twins]

    taken = [file for file in rest if split_of(names[file]) == split]
    other = [file for file in rest if file not in taken]

    said = (
        (other, f"of a different split from {split}"),
        (hidden, "hidden"),
        (no_data, "not data"),
        (twins, "also there without compression"),
        (unread, "of an unsupported format, to be decompressed or converted first"),
    )
    left_out = "; ".join(f"{kind}: {_listed(names[file] for file in files)}" for files, kind in said if files)
    advice = "; to use a file, name the file itself" if other or hidden or no_data or twins else ""
    if not taken:
        raise ValueError(
            f"The folder {folder} holds no {', '.join(KINDS)} file"
            + (f" to use ({left_out}){advice}." if left_out else ".")
        )

    if left_out and tell:
        logger.warning("%s: files are left out, which are %s%s.", folder, left_out, advice)
    return taken


def _may_hold_data(file: Path) -> bool:
    """Whether a file that cannot be read may hold records; media and texts about the data cannot."""
    about = file.stem.upper().startswith(("README", "LICENSE", "NOTICE"))
    medium = (mimetypes.guess_type(file.name)[0] or "").startswith(("image/", "video/", "audio/"))
    return ending_of(file) not in KINDS and not about and not medium


def split_of(path: Path) -> str:
    """Return the split that the names in a path below the data's folder mention; `train` if none does."""
    for part in (*path.parts[:-1], path.name):
        splits = {_SPLITS[word] for word in _BETWEEN_WORDS.split(part.lower()) if word in _SPLITS}
        if splits:
            return "train" if "train" in splits else sorted(splits)[0]
    return "train"


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hub: `id`, `id:split` or `id:subset:split`, each also with `id@revision` in place of `id`."""

    id: str
    subset: str | None
    split: str
    revision: str | None = None

    @classmethod
    def of(cls, source: str, split: str = "train") -> "HubSource":
        """Parse a source; `split` is used if it names none."""
        whole_id, *named = _COLON.split(source, 2)
        hub_id, _, revision = whole_id.partition("@")

        subset = named[0] if len(named) == 2 else None
        return cls(hub_id, subset or None, (named[-1] if named else "") or split, revision or None)

    @property
    def named(self) -> dict[str, str]:
        """Subset and revision as arguments of `datasets`."""
        given = {"name": self.subset, "revision": self.revision}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def revision_named(self) -> dict[str, str]:
        return {} if self.revision is None else {"revision": self.revision}


def hub_files(source: HubSource, remote: bool = False) -> list[str]:
    """Return the files of a Hub data set's split if all are JSON or CSV, for which `datasets` would infer types.

    Args:
        source: the data set.
        remote: return addresses, which are read as needed, instead of local copies.

    Returns:
        Paths or addresses; none if the data set has other files, or they cannot be listed.

    Raises:
        ValueError: if the data set has no such split.
    """
    found = _seen_files(source)
    if found and source.split not in found and source.split.isidentifier() and source.split != "all":  # no slice
        raise ValueError(f"The Hub data set {source.id} has the splits {', '.join(found)}, but no {source.split!r}.")

    files = found.get(source.split, [])
    if not all(ending_of(file) in TEXTS for file in files):
        return []
    return files if remote else [_local(file) for file in files]


def _seen_files(source: HubSource) -> dict[str, list[str]]:
    """Return the files of each split, as far as the Hub, or an earlier download, shows them."""
    try:
        found = load_dataset_builder(source.id, **source.named).config.data_files
    except Exception:  # whatever the Hub, the network or the data set raises; an earlier download may be there
        try:
            known = {"repo_type": "dataset", "local_files_only": True, **source.revision_named}
            subset = {"name": source.subset} if source.subset else {}
            found = load_dataset_builder(snapshot_download(source.id, **known), **subset).config.data_files
        except Exception:
            return {}

    return {str(split): [str(file) for file in files] for split, files in (found or {}).items()}


def why_not(source: HubSource, problem: Exception) -> str:
    """Say why a data set cannot be read, as the end of a sentence; `problem` is the error that reading it raised."""
    try:
        subsets = get_dataset_config_names(source.id, **source.revision_named)
    except Exception:  # for the same reasons as the data set itself
        subsets = []

    if len(subsets) > 1 and source.subset not in subsets:
        whole_id = source.id + (f"@{source.revision}" if source.revision else "")
        return f"name one of its subsets {', '.join(subsets)}, as {whole_id}:{subsets[0]}:{source.split}."
    return " ".join(str(problem).split())


def _local(file: str) -> str:
    if not file.startswith("hf://"):
        return file
    place = HfFileSystem().resolve_path(file)
    return hf_hub_download(place.repo_id, place.path_in_repo, repo_type="dataset", revision=place.revision)


def _listed(names) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
