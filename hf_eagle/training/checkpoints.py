"""Save checkpoints that are complete or absent: a manifest is written last, and shows what a folder lacks."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from ..door.json_files import check_fields, read_json
from ..door.memory import ran_out_of_memory
from ..door.writing import is_write_error, write_atomically


MANIFEST = "checkpoint_manifest.json"
# without these, training does not continue as if it had never stopped
STATES = {OPTIMIZER_NAME: "the optimizer's state", SCHEDULER_NAME: "the learning rate schedule"}
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_PLACE_FIELDS = {**dict.fromkeys(("number", "steps", "ranks", "batch", "workers"), int), "by_number": bool}
_READS = [{"source": str, "share": float, "files?": {str: int}}]  # as `what_is_read` gives them
_MANIFEST_FIELDS = {"files": dict[str, int], "rows_per_step?": int | None, "stream?": dict | None}
# the fields read from transformers' own file
_STATE_FIELDS = {
    "global_step": int,
    "log_history": list[dict],
    **dict.fromkeys(("epoch?", "num_train_epochs?", "total_flos?"), float),
    **dict.fromkeys(("max_steps?", "num_input_tokens_seen?"), int),
    **dict.fromkeys(("logging_steps?", "eval_steps?", "save_steps?", "best_metric?"), float | None),
    **dict.fromkeys(("best_global_step?", "train_batch_size?"), int | None),
    "best_model_checkpoint?": str | None,
    "stateful_callbacks?": dict | None,
}


def write_manifest(folder: str | Path, rows_per_step: int | None = None, stream=None) -> None:
    """List the files of a finished checkpoint with their sizes; its presence means that all of them were written.

    Args:
        rows_per_step: rows of data per step of the run, over all processes.
        stream ([`StreamPlace`], *optional*): the position of a run on a stream; `None` for other data, which is written
            too. Checkpoints of earlier versions say nothing about it.
    """
    folder = Path(folder)
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(MANIFEST, None)
    held = {"files": files, "rows_per_step": rows_per_step, "stream": None if stream is None else asdict(stream)}
    write_atomically(folder / MANIFEST, [json.dumps(held, indent=2)])


def read_manifest(folder: str | Path) -> dict:
    """Read what `write_manifest` wrote.

    Raises:
        ValueError: if it cannot be read, or is not a manifest.
    """
    path = Path(folder) / MANIFEST
    found = read_json(path, _MANIFEST_FIELDS, "choose another checkpoint")
    if found.get("stream") is None:
        return found

    knows_data = found["stream"].get("reads") is not None  # earlier versions and runs in Python do not
    fields = {**_PLACE_FIELDS, "reads": _READS} if knows_data else _PLACE_FIELDS
    check_fields({"stream": found["stream"]}, {"stream": fields}, path, "choose another checkpoint")
    below = [name for name in _PLACE_FIELDS if found["stream"][name] < 0]
    if below:
        raise ValueError(f"{path} holds a `stream.{below[0]}` below 0: choose another checkpoint.")
    return found


def why_incomplete(folder: str | Path, without_states: bool = False) -> str | None:
    """Return what is wrong with a checkpoint folder; `None` if every file that resuming needs is complete.

    Args:
        without_states: require only the weights and the position in the run, not the states.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}, which is written last"

    try:
        files = read_manifest(folder)["files"]
    except ValueError as problem:
        return f"its {MANIFEST} cannot be read ({str(problem).rstrip('.')})"

    for name in [TRAINER_STATE_NAME, *files]:
        problem = None if without_states and name in STATES else _why_not_whole(folder, name, files)
        if problem:
            return problem

    missing = [] if without_states else missing_states(folder)
    return f"it has no {' and no '.join(missing)}, as `save_only_model` leaves one" if missing else None


def missing_states(folder: str | Path) -> list[str]:
    """Return the files of `STATES` that are missing or incomplete in a checkpoint."""
    folder = Path(folder)
    files = read_manifest(folder)["files"]
    return [name for name in STATES if _why_not_whole(folder, name, files)]


def _why_not_whole(folder: Path, name: str, files: dict[str, int]) -> str | None:
    path = folder / name
    if not os.path.isfile(path):  # false, not an error, for a name that no file can have
        return f"{name} is missing"

    size = path.stat().st_size
    return f"{name} has {size} bytes instead of {files[name]}" if size != files.get(name, size) else None


def read_state(folder: str | Path) -> TrainerState:
    """Read how far a run got: `trainer_state.json` of a checkpoint, or of the folder of a whole run.

    Raises:
        ValueError: if it cannot be read, or is not such a state.
    """
    path = Path(folder) / TRAINER_STATE_NAME
    found = read_json(path, _STATE_FIELDS, "choose another checkpoint")
    if found["global_step"] < 0:
        raise ValueError(f"{path} holds {found['global_step']} as `global_step`: choose another checkpoint.")

    try:
        return TrainerState(**found)
    except TypeError as problem:  # a field that this version of transformers does not have
        raise ValueError(f"{path} cannot be read ({problem}): choose another checkpoint.") from problem


def begin_checkpoint(folder: str | Path) -> None:
    """Make way for a checkpoint: delete what a killed run left of it, and mark a complete one as incomplete."""
    folder = Path(folder)
    if folder.exists() and why_incomplete(folder, without_states=True):
        shutil.rmtree(folder)

    # its files are overwritten one by one with files of the same sizes, which a manifest could not tell apart
    (folder / MANIFEST).unlink(missing_ok=True)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the `checkpoint-*` folders of a run, by step, complete or not."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir() and _CHECKPOINT.match(p.name)]
    return sorted(found, key=lambda p: int(_CHECKPOINT.match(p.name).group(1)))


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint; `None` without one."""
    return next((p for p in reversed(checkpoints(output_dir)) if why_incomplete(p) is None), None)


@contextmanager
def explain_write_errors(folder: str | Path, remove: bool = False) -> Iterator[None]:
    """Raise what prevents writing a folder inside the block as `write_failure` describes it.

    Args:
        remove: then, or if memory runs out, delete the folder, so that it is complete or absent.

    Raises:
        OSError: if a file cannot be written.
    """
    try:
        yield
    except Exception as problem:
        refused = is_write_error(problem)
        if remove and (refused or ran_out_of_memory(problem)):
            shutil.rmtree(folder, ignore_errors=True)
        if not refused:
            raise
        raise write_failure(folder, problem) from problem


def write_failure(folder: str | Path, problem: Exception) -> OSError:
    """Return the error for a checkpoint that could not be written, with free space and last complete checkpoint."""
    run = Path(folder).parent if _CHECKPOINT.match(Path(folder).name) else Path(folder)
    last = last_complete_checkpoint(run)

    space = next((p for p in [run, *run.parents] if p.exists()), Path("."))
    free = shutil.disk_usage(space).free / 2**30

    return OSError(
        f"`output_dir`: {folder} could not be written ({problem}); {free:.1f} GiB are free there. "
        + (f"{last} is complete: " if last else "No checkpoint was finished yet: ")
        + "make room and run again with `--resume_from_checkpoint last`."
    )
