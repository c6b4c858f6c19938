"""Checkpoints that are whole or not there: a manifest written last, and what a folder may be resumed or overwritten."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ..drafts.adapters import ADAPTER_FOLDER
from ..drafts.misfits import misfits
from ..files import write_atomically


MANIFEST = "checkpoint_manifest.json"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
# what torch, safetensors and the file system raise when a file cannot be written
_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def write_manifest(folder: str | Path, rows_per_step: int | None = None) -> None:
    """List the files of a finished checkpoint with their sizes; its presence says that all of them were written.

    Args:
        rows_per_step: rows of data that the run took a step, over all processes.
    """
    folder = Path(folder)
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(MANIFEST, None)
    write_atomically(folder / MANIFEST, [json.dumps({"files": files, "rows_per_step": rows_per_step}, indent=2)])


def why_incomplete(folder: str | Path) -> str | None:
    """What is wrong with a checkpoint folder, `None` when every file of its manifest is there in full."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}, which is written last"
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (ValueError, KeyError):
        return f"its {MANIFEST} cannot be read"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def remove_incomplete(folder: str | Path) -> None:
    """Delete a checkpoint folder that was not written to the end, if it is there."""
    if Path(folder).exists() and why_incomplete(folder):
        shutil.rmtree(folder)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-*` folders of a run, by step, complete or not."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir() and _CHECKPOINT.match(p.name)]
    return sorted(found, key=lambda p: int(_CHECKPOINT.match(p.name).group(1)))


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that was written to the end."""
    return next((p for p in reversed(checkpoints(output_dir)) if why_incomplete(p) is None), None)


def resolve_resume(output_dir: str | Path, resume: str | bool | None) -> Path | None:
    """The folder to resume from: a path is checked, `True` or `"last"` finds the newest complete one.

    Returns:
        `None` for `resume=None` or `False`, and for `"last"` when no checkpoint was finished yet.

    Raises:
        ValueError: if the named checkpoint is not complete.
    """
    if resume in (None, False, "false"):
        return None
    if resume in (True, "last", "true"):
        return last_complete_checkpoint(output_dir)
    problem = why_incomplete(resume)
    if problem:
        last = last_complete_checkpoint(Path(resume).parent)
        raise ValueError(
            f"`resume_from_checkpoint` {resume} is not a complete checkpoint: {problem}. "
            + (f"The newest complete one beside it is {last}." if last else "There is no complete one beside it.")
        )
    return Path(resume)


def check_rows_per_step(folder: str | Path, rows_per_step: int) -> None:
    """A resumed run finds its place in the data by counting steps, so a step must be as many rows as before.

    Raises:
        ValueError: if it is not, on another number of processes for instance.
    """
    before = json.loads((Path(folder) / MANIFEST).read_text()).get("rows_per_step")
    if before not in (None, rows_per_step):
        raise ValueError(
            "`per_device_train_batch_size` x `gradient_accumulation_steps` x processes is "
            f"{rows_per_step} rows a step, but {folder} was written with {before}: keep the product, or the run would "
            "go on at another place of the data (`ignore_data_skip` starts the data over)."
        )


def refuse_other_run(output_dir: str | Path, overwrite: bool = False) -> None:
    """Keep a new run from mixing with an earlier one.

    Raises:
        FileExistsError: if `output_dir` holds checkpoints or a draft and `overwrite` is not set.
    """
    output_dir = Path(output_dir)
    there = [*checkpoints(output_dir), *output_dir.glob("*.safetensors")]
    if there and not overwrite:
        raise FileExistsError(
            f"`output_dir` {output_dir} holds another run ({there[-1].name}): continue it with "
            "`--resume_from_checkpoint last`, choose another folder, or delete it with `--overwrite`."
        )


def clear_run(output_dir: str | Path) -> None:
    """Delete the checkpoints, the draft and the adapter of an earlier run, and nothing else."""
    for path in checkpoints(output_dir):
        shutil.rmtree(path)
    shutil.rmtree(Path(output_dir) / ADAPTER_FOLDER, ignore_errors=True)
    for path in Path(output_dir).glob("*.safetensors"):
        path.unlink()


@contextmanager
def explain_write_errors(folder: str | Path, remove: bool = False) -> Iterator[None]:
    """Inside, a folder is written; what prevents it is raised as `write_failure` describes it.

    Args:
        remove: delete the folder then, so that it is complete or absent.

    Raises:
        OSError: if a file cannot be written.
    """
    try:
        yield
    except _WRITE_ERRORS as problem:
        if remove:
            shutil.rmtree(folder, ignore_errors=True)
        raise write_failure(folder, problem) from problem


def write_failure(folder: str | Path, problem: Exception) -> OSError:
    """One sentence for a checkpoint that could not be written: how much space is left, and what is still whole."""
    run = Path(folder).parent if _CHECKPOINT.match(Path(folder).name) else Path(folder)
    last = last_complete_checkpoint(run)
    space = next((p for p in [run, *run.parents] if p.exists()), Path("."))
    free = shutil.disk_usage(space).free / 2**30
    return OSError(
        f"`output_dir`: {folder} could not be written ({problem}); {free:.1f} GiB are free there. "
        + (f"{last} is complete: " if last else "No checkpoint was finished yet: ")
        + "make room and run again with `--resume_from_checkpoint last`."
    )


def check_tensors(model: PreTrainedModel, folder: str | Path) -> None:
    """Do the weights in a folder fit this draft, name by name and shape by shape?

    Raises:
        ValueError: naming the first tensors that are missing, unexpected or of another shape; or if they are what an
            adapter was merged into, whose training cannot go on without it.
    """
    if (Path(folder) / ADAPTER_FOLDER).is_dir():
        raise ValueError(
            f"The checkpoint {folder} holds an adapter, so it was trained with `use_peft`: set it, or start a new run "
            "with `init_from` that checkpoint."
        )
    found = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({name: list(file.get_slice(name).get_shape()) for name in file.keys()})
    skipped = set(model._keys_to_ignore_on_save or ())
    wanted = {name: list(t.shape) for name, t in model.state_dict().items() if name not in skipped}
    wrong = [f"{name} {what}" for name, what in misfits(found, wanted)]
    if wrong:
        raise ValueError(
            f"The checkpoint {folder} does not fit this draft: {'; '.join(wrong[:6])}. Was it trained with another "
            "target, vocabulary size or code?"
        )
