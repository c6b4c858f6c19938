"""Licences, as the cards of models and data sets name them: a draft has its target's."""

import logging
from functools import cache
from pathlib import Path
from typing import Literal

from ..door.json_files import read_json


logger = logging.getLogger(__name__)

# of a licence that the Hub has no word for, `license` is `other`
FIELDS = ("license", "license_name", "license_link")
# what each of several files and folders came from, beside or above them, as scripts/fetch_assets.py writes it
SOURCES = "sources.json"


def license_of(source: str, kind: Literal["model", "dataset"] = "model", revision: str | None = None) -> dict[str, str]:
    """The licence of a model or a data set, where a card tells it.

    Args:
        source: a folder with a `README.md`; a file or folder that a `sources.json` above it names; or a Hub id, whose
            card is read from the Hub or, without a network, from the cache.
        kind: what a Hub id is one of.
        revision: of a Hub id.

    Returns:
        `license` and, where the card has them, `license_name` and `license_link`, as the Hub spells them; nothing where
        no licence is told.
    """
    path = Path(source).expanduser()
    if path.exists():
        return _of_card(path / "README.md") or _of_sources(path.resolve())
    from huggingface_hub import hf_hub_download

    try:
        return _of_card(Path(hf_hub_download(source, "README.md", repo_type=kind, revision=revision)))
    except (OSError, ValueError):  # no network, no such repository, or one without a card
        return {}


@cache
def inherited_license(target: str, base_model: str | None = None) -> dict[str, str]:
    """As `license_of` a target, a folder perhaps, or else of its Hub id; with a warning, once, where none is told."""
    found = license_of(target) or (license_of(base_model) if base_model not in (None, target) else {})
    if not found:
        logger.warning(
            "The draft's card names no licence, for %s has no card that tells one: give the draft's with `license`.",
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
    """Every licence in an entry, which may be put together from others."""
    if not isinstance(entry, dict):
        return []
    if isinstance(entry.get("license"), str):
        return [entry["license"]]
    return [name for part in entry.values() for name in _named(part)]
