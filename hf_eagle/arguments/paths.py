"""Check the paths of a recipe, and the folders of drafts, before anything is loaded or written."""

import os
from pathlib import Path

from ..door.inputs import check_data, check_draft, check_file, check_folder, check_target
from ..door.json_files import read_json
from ..door.outputs import check_output_folder
from ..drafts.kinds import kind_of_folder
from .groups import DataArguments, DraftArguments, TargetArguments


# if these lie beside a config.json that cannot be read, the folder may hold a model worth keeping
_WORTH_KEEPING = ("*.safetensors", "pytorch_model*.bin", "*.gguf", "checkpoint-*")


def paths_read(target: TargetArguments, data: DataArguments, draft: DraftArguments | None = None) -> dict[str, object]:
    """Return the paths that a recipe reads, by argument, so that none of them is overwritten."""
    return {
        "target": target.target,
        "features_folder": target.features_folder,
        **{name: getattr(data, name) for name in ("train_data", "eval_data", "acceptance_prompts", "tools")},
        "init_from": None if draft is None else draft.init_from,
    }


def check_data_paths(target: TargetArguments, data: DataArguments) -> None:
    """Raise `ValueError` naming the first argument for target or data whose path does not exist, or cannot be read."""
    check_target("target", target.target, target.gguf_file)
    check_data("train_data", data.train_data)
    check_data("eval_data", data.eval_data or [])

    if data.media_root is not None:
        check_folder("media_root", data.media_root)
    if target.features_folder is not None:
        check_folder("features_folder", target.features_folder)


def check_training_paths(data: DataArguments, draft: DraftArguments) -> None:
    """[`check_data_paths`] for the paths that only training reads."""
    if data.acceptance_prompts is not None:
        check_file("acceptance_prompts", data.acceptance_prompts)
    if draft.init_from is not None:
        check_draft("init_from", draft.init_from)


def check_draft_folder(
    argument: str, path: str, reads: dict[str, object] | None = None, overwrite: bool = False
) -> None:
    """Raise `FileExistsError` or `ValueError` unless a draft can be saved here without destroying anything."""
    if not overwrite:
        refuse_torn_config(argument, path)
    check_output_folder(
        argument, path, reads, overwrite, ours=lambda there: is_draft(there) or holds_torn_config(there)
    )


def is_draft(folder: Path) -> bool:
    """Return whether a folder holds a draft of a known kind, or a run of one: a full disk may have cut its config."""
    return any(kind_of_folder(place) is not None for place in (folder, *folder.glob("checkpoint-*")))


def holds_torn_config(folder: str | Path) -> bool:
    """Return whether a folder holds nothing of a model except a config.json that is not JSON.

    A run leaves one if it is killed, or finds the disk full, while it saves a draft before any checkpoint exists.
    """
    folder = Path(folder)
    if not os.path.isfile(folder / "config.json") or any(any(folder.glob(each)) for each in _WORTH_KEEPING):
        return False

    try:
        read_json(folder / "config.json")
    except ValueError:
        return True
    return False


def refuse_torn_config(argument: str, folder: str | Path) -> None:
    """Raise `FileExistsError` for a folder that `holds_torn_config`."""
    if holds_torn_config(folder):
        raise FileExistsError(
            f"`{argument}` {folder} holds a config.json that is not JSON, probably from a run that ended while it "
            "saved its draft: replace it with `--overwrite`, or name another folder."
        )
