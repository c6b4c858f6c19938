"""Check whether vLLM and SGLang load a folder and run the draft as it was trained (contract section 5).

A finding has one of three levels. A `fault` keeps the draft from being served as it was trained. A `limit` means that a
server does not support this kind of draft, though nothing is wrong with the folder. A `note` is harmless.
"""

import logging
from pathlib import Path
from typing import Any

from ..door.config_numbers import wrong_numbers
from . import rules_folder
from .draft_folder import DraftFolder, Finding, TargetFacts
from .kinds import kind_of, serves


__all__ = ["check_draft", "require_servable", "serves"]

logger = logging.getLogger(__name__)


def check_draft(
    path: str | Path,
    target_config: Any = None,
    values: bool = True,
    kind: str | None = None,
    num_speculative_tokens: int | None = None,
) -> list[Finding]:
    """Find what is wrong with a draft folder, by the rules of both servers.

    Args:
        path: the folder.
        target_config (`PreTrainedConfig`, *optional*): config of the target to serve it with. Without it, taps, context
            length and vocabulary are only checked against the draft's own config.
        values: read all tensors, to find NaN and infinity. Otherwise read headers and the vocabulary alone, which takes
            milliseconds whatever the size.
        kind (`str`, *optional*): hf_eagle's name of the draft's kind. If no server is known to run that kind, the only
            finding says so. Without it the folder is assumed to be of a kind that servers know.
        num_speculative_tokens (`int`, *optional*): how many tokens will be drafted in a round.

    Returns:
        Findings; none for a folder that is served as it was trained. The module's docstring explains their levels.

    Raises:
        ValueError: if there is no draft in the folder.

    Example:
        >>> for finding in check_draft("outputs/my-draft"):
        ...     print(finding)
    """
    if kind is not None and not serves(kind):
        return [_unserved(kind)]
    folder = DraftFolder.read(path)
    row = kind_of(folder)
    found = rules_folder.other_model(folder) or rules_folder.speculators(folder, row.converted)
    found = found or (rules_folder.size_findings(folder) + _number_findings(folder))
    if found:
        return found

    target = None if target_config is None else TargetFacts.of(target_config)
    for rule in (*row.vllm.rules, *row.sglang.rules, *row.others):
        found += rule(folder, target)

    for rule in (*row.folder_rules, *(row.value_rules if values else ())):
        found += rule(folder)
    return found + _number_of_tokens(num_speculative_tokens, row.drafted(folder.config))


def _number_of_tokens(asked: int | None, trained: int | None) -> list[Finding]:
    """Note that more or fewer tokens are drafted in a round than the draft was trained for."""
    if asked is None or trained in (None, asked):
        return []
    return [
        Finding(
            "Servers",
            f"`num_speculative_tokens` is {asked}, but the draft was trained to draft {trained}: its slots see one "
            "another, so that it computes something else, and less may be accepted.",
            f"serve it with {trained}, or train it for {asked}",
            level="note",
        )
    ]


def _number_findings(folder: DraftFolder) -> list[Finding]:
    """Find numbers in the config that no reader can compute with."""
    fix = "write what it was trained with"
    return [Finding(rules_folder.READER, f"in config.json {one}.", fix) for one in wrong_numbers(folder.config)]


def _unserved(kind: str) -> Finding:
    return Finding(
        "Servers",
        f"This is a draft of kind `{kind}`, which no server is known to run, so it was not checked.",
        "decode with hf_eagle, which needs no server",
        level="limit",
    )


def require_servable(path: str | Path, target_config: Any, kind: str | None = None) -> None:
    """Run the fast part of the check on a draft that has just been saved.

    For a kind of draft that a server does not support it only warns, since the user asked to train it.

    Args:
        path: the draft's folder.
        target_config (`PreTrainedConfig`): config of its target.
        kind (`str`, *optional*): as for `check_draft`.

    Raises:
        ValueError: lists everything that keeps the folder from being served as it was trained.
    """
    if not (Path(path) / "config.json").is_file():
        return  # no server loads this folder; it may hold only a draft's adapter

    found = check_draft(path, target_config, values=False, kind=kind)
    for limit in (finding for finding in found if finding.level == "limit"):
        logger.warning("%s: %s", path, limit)

    faults = [str(finding) for finding in found if finding.level == "fault"]
    if faults:
        raise ValueError(f"{path} was saved, but would not be served as it was trained. " + " ".join(faults))
