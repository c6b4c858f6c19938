"""Read licences from the cards of models and data sets: a draft inherits its target's licence."""

import logging
from functools import cache
from pathlib import Path
from typing import Literal

from ..door.json_files import read_json
from ..door.names import at_home


logger = logging.getLogger(__name__)

# for a licence that the Hub has no name for, `license` is `other`
FIELDS = ("license", "license_name", "license_link")
# file with the origins of files and folders next to or below it, written by scripts/fetch_assets.py
SOURCES = "sources.json"


def license_of(source: str, kind: Literal["model", "dataset"] = "model", revision: str | None = None) -> dict[str, str]:
    """Return the licence of a model or a data set, if a card names it.

    Args:
        source: a folder with a `README.md`; a file or folder named by a `sources.json` above it; or a Hub id, whose
            card is read from the Hub or, without a network, from the cache.
        kind: kind of repository, for a Hub id.
        revision: revision, for a Hub id.

    Returns:
        `license` and, if the card has them, `license_name` and `license_link`, as the Hub spells them; empty if no card
        names a licence.
    """
    path = at_home(source)
    if path.exists():
        return _of_card(path / "README.md") or _of_sources(path.resolve())

    from huggingface_hub import hf_hub_download

    try:
        return _of_card(Path(hf_hub_download(source, "README.md", repo_type=kind, revision=revision)))
    except (OSError, ValueError):  # no network, no such repository, or one without a card
        return {}


@cache
def inherited_license(target: str, base_model: str | None = None) -> dict[str, str]:
    """Return the `license_of` a target, which may be a folder, else of its Hub id; warn once if there is none."""
    found = license_of(target) or (license_of(base_model) if base_model not in (None, target) else {})
    if not found:
        logger.warning(
            "The draft's card names no licence, because no card of %s names one: pass the draft's licence as "
            "`license`.",
            base_model or target,
        )
    return found


def _of_card(card: Path) -> dict[str, str]:
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        header = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}

    told = {name: header[name] for name in FIELDS if header.get(name) and isinstance(header[name], str)}
    return told if "license" in told else {}


def _of_sources(path: Path) -> dict[str, str]:
    for folder in path.parents[:3]:
        try:
            entry = read_json(folder / SOURCES, {})[path.relative_to(folder).as_posix()]
        except (ValueError, KeyError):
            continue

        found = _named(entry)
        return {"license": ", ".join(dict.fromkeys(found))} if found else {}
    return {}


def _named(entry) -> list[str]:
    """Return every licence in an entry, which may be composed of other entries."""
    if not isinstance(entry, dict):
        return []
    if isinstance(entry.get("license"), str):
        return [entry["license"]]
    return [name for part in entry.values() for name in _named(part)]
