"""Checkpoints that are whole or not there: a manifest written last, and what a folder may be resumed or overwritten."""

import json
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ..answers.journal import write_atomically
from ..drafts.adapters import ADAPTER_FOLDER


MANIFEST = "checkpoint_manifest.json"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
# what torch, safetensors and the file system raise when a file cannot be written
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


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


def misfits(found: dict[str, list[int]], wanted: dict[str, list[int]]) -> list[tuple[str, str]]:
    """Tensors that are missing, unexpected or of another shape, by name, each with what is wrong with it."""
    wrong = [(name, "is missing") for name in wanted if name not in found]
    wrong += [(name, "is unexpected") for name in found if name not in wanted]
    both = [name for name in wanted if name in found and found[name] != wanted[name]]
    return wrong + [(name, f"is {found[name]} instead of {wanted[name]}") for name in both]


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
