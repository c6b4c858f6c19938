"""The paths of a recipe, and the folders of drafts: looked at before anything is loaded or written."""

from pathlib import Path

from ..door.inputs import check_data, check_draft, check_file, check_target
from ..door.outputs import check_output_folder
from ..drafts.kinds import kind_of_folder
from .groups import DataArguments, DraftArguments, TargetArguments


def paths_read(target: TargetArguments, data: DataArguments, draft: DraftArguments | None = None) -> dict[str, object]:
    """What a recipe reads, by argument, to be kept from being written over."""
    return {
        "target": target.target,
        **{name: getattr(data, name) for name in ("train_data", "eval_data", "acceptance_prompts", "tools")},
        "init_from": None if draft is None else draft.init_from,
    }


def check_data_paths(target: TargetArguments, data: DataArguments) -> None:
    """`ValueError` naming the first argument for target or data that names what is not there, or cannot be read."""
    check_target("target", target.target, target.gguf_file)
    check_data("train_data", data.train_data)
    check_data("eval_data", data.eval_data or [])


def check_training_paths(data: DataArguments, draft: DraftArguments) -> None:
    """As [`check_data_paths`], for what training alone reads beside these."""
    if data.acceptance_prompts is not None:
        check_file("acceptance_prompts", data.acceptance_prompts)
    if draft.init_from is not None:
        check_draft("init_from", draft.init_from)


def check_draft_folder(
    argument: str, path: str, reads: dict[str, object] | None = None, overwrite: bool = False
) -> None:
    """`FileExistsError` or `ValueError` unless a draft can be saved here and nobody loses anything by it."""
    check_output_folder(argument, path, reads, overwrite, ours=is_draft)


def is_draft(folder: Path) -> bool:
    """Whether a folder holds a draft of a kind that is known, or a run of one: a full disk may have cut its config."""
    return any(kind_of_folder(place) is not None for place in (folder, *folder.glob("checkpoint-*")))
