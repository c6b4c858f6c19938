"""Would vLLM and SGLang load this folder, and run the draft that was trained? (contract section 5)"""

import logging
from pathlib import Path
from typing import Any

from . import rules_folder, rules_sglang, rules_vllm
from .draft_folder import DraftFolder, Finding, TargetFacts


logger = logging.getLogger(__name__)


def check_draft(path: str | Path, target_config: Any = None, values: bool = True) -> list[Finding]:
    """What is wrong with a draft folder, by the rules of both servers.

    Args:
        path: the folder.
        target_config (`PreTrainedConfig`, *optional*): of the target that it will be served beside. Without it taps,
            context length and vocabulary are only checked against the draft's own config.
        values: read all tensors, to find what is not a number; without it, headers and the vocabulary alone, which
            takes milliseconds whatever the size.

    Returns:
        Findings, none for a folder that is served as it was trained. Those of level `note` do no harm.

    Raises:
        ValueError: if there is no draft in the folder.

    Example:
        >>> for finding in check_draft("outputs/my-draft"):
        ...     print(finding)
    """
    folder = DraftFolder.read(path)
    found = rules_folder.size_findings(folder)
    if found:
        return found
    target = None if target_config is None else TargetFacts.of(target_config)
    found = rules_folder.findings(folder, values)
    return [*rules_vllm.findings(folder, target), *rules_sglang.findings(folder, target), *found]


def require_servable(path: str | Path, target_config: Any) -> None:
    """The fast part of the check, for a draft that has just been saved.

    A kind of draft that a server does not serve is warned of, since whoever trains it asked for it.

    Raises:
        ValueError: naming all that keeps the folder from being served as it was trained.
    """
    if not (Path(path) / "config.json").is_file():
        return  # nothing that a server would load, such as the adapter of a draft alone
    found = check_draft(path, target_config, values=False)
    for limit in (finding for finding in found if finding.level == "limit"):
        logger.warning("%s: %s", path, limit)
    faults = [str(finding) for finding in found if finding.level == "fault"]
    if faults:
        raise ValueError(f"{path} was saved, but would not be served as it was trained. " + " ".join(faults))
