"""Mend a copy of a draft folder, as far as the folder still holds what was trained."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..door.writing import output_folder
from .draft_folder import DraftFolder, TargetFacts
from .kinds import kind_of, serves
from .mending import Draft
from .rules_folder import SIZES


_NOT_COPIED = (".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin", "checkpoint_manifest.json")


def repair_draft(
    path: str | Path, output_dir: str | Path, target_config: Any = None, kind: str | None = None
) -> list[str]:
    """Write a mended copy of a draft folder.

    Args:
        path: the draft, which stays unchanged.
        output_dir: a new or empty folder.
        target_config (`PreTrainedConfig`, *optional*): its target's config, for context length and default taps.
        kind (`str`, *optional*): hf_eagle's name of the draft's kind. Without it the folder is assumed to be of a kind
            that servers know.

    Returns:
        One line per repair. `check_draft` still finds the faults that could not be mended.

    Raises:
        FileExistsError: if `output_dir` is not empty.
        ValueError: if there is no draft in the folder, or one of a kind that no server is known to run.
    """
    if kind is not None and not serves(kind):
        raise ValueError(
            f"{path} is a draft of kind `{kind}`, which no server is known to run, so there are no rules to mend it by."
        )

    output_dir, folder = Path(output_dir), DraftFolder.read(path)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"`fix` {output_dir} is not an empty folder, and nothing is overwritten: name a new one.")
    if not any(name.endswith("fc.weight") for name in folder.shapes):
        raise ValueError(f"{path} holds no `fc.weight`, which every draft has: it is another kind of model.")
    missing = [name for name in SIZES if not isinstance(folder.config.get(name), int)]
    if missing:
        raise ValueError(f"`{missing[0]}` is missing in {path}/config.json, without which nothing can be mended.")

    draft = Draft(
        config=json.loads(json.dumps(folder.config)),
        tensors={name: folder.tensor(name) for name in folder.shapes},
        num_layers=folder.num_layers,
        target=None if target_config is None else TargetFacts.of(target_config),
    )
    for step in kind_of(folder).mending:
        step(draft)
    _write(draft, Path(path), output_dir)
    return draft.done


def _write(draft: Draft, path: Path, output_dir: Path) -> None:
    """Write the draft, and copy the other files of its folder, except weights."""
    tensors = {name: tensor.contiguous() for name, tensor in draft.tensors.items()}
    with output_folder("fix", output_dir) as folder:
        for file in sorted(path.iterdir()):
            if file.is_file() and file.name != "config.json" and not file.name.endswith(_NOT_COPIED):
                shutil.copy(file, folder / file.name)
        (folder / "config.json").write_text(json.dumps(draft.config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / "model.safetensors")
