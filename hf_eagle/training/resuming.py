"""Find the checkpoint that a run continues from, refuse to overwrite other runs, and recognise finished ones."""

import shutil
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME

from ..arguments.paths import refuse_torn_config
from ..drafts.adapters import ADAPTER_FOLDER
from ..drafts.misfits import misfits
from .checkpoints import (
    MANIFEST,
    STATES,
    checkpoints,
    last_complete_checkpoint,
    missing_states,
    read_manifest,
    read_state,
    why_incomplete,
)
from .stream_place import StreamPlace, check_stream_place


def is_last(resume: str | bool | None) -> bool:
    """Return whether `resume_from_checkpoint` asks for the newest checkpoint, rather than a named one."""
    return resume in (True, "last", "true")


def resolve_resume(
    output_dir: str | Path, resume: str | bool | None, ignore_missing_state: bool = False
) -> Path | None:
    """Return the folder to resume from: a path is checked, `True` or `"last"` finds the newest complete checkpoint.

    A checkpoint whose writing was interrupted has no manifest, and counts as absent. One that was finished, but has
    lost files since, is not skipped if there is no other, or a new run would overwrite it.

    Args:
        output_dir: folder of the run.
        resume: the value of `resume_from_checkpoint`.
        ignore_missing_state: accept a checkpoint without the states of optimizer and schedule.

    Returns:
        `None` for `resume=None` or `False`, and for `"last"` if no checkpoint was finished yet.

    Raises:
        ValueError: if the named checkpoint, or every one that `"last"` may choose, is incomplete; or if it does not say
            how far the run got.
    """
    if resume in (None, False, "false"):
        return None

    folder = _last(output_dir, ignore_missing_state) if is_last(resume) else Path(resume)
    if folder is None:
        return None

    problem = why_incomplete(folder, without_states=ignore_missing_state)
    if problem:
        mendable = (folder / MANIFEST).is_file() and why_incomplete(folder, without_states=True) is None
        raise ValueError(
            (f"`resume_from_checkpoint` {resume}: " if is_last(resume) else "`resume_from_checkpoint` ")
            + f"{folder} is not a complete checkpoint: {problem}. {_other_ways(folder, resume, mendable)}"
        )

    read_state(folder)
    return folder


def _last(output_dir: str | Path, ignore_missing_state: bool) -> Path | None:
    """Return the newest complete checkpoint; else the newest that was once complete, for the caller to judge."""
    finished = [p for p in reversed(checkpoints(output_dir)) if (p / MANIFEST).is_file()]
    usable = [p for p in finished if ignore_missing_state and why_incomplete(p, without_states=True) is None]
    return last_complete_checkpoint(output_dir) or next(iter([*usable, *finished]), None)


def _other_ways(folder: Path, resume: str | bool, mendable: bool) -> str:
    """Return what the user can do about an incomplete checkpoint."""
    last = None if is_last(resume) else last_complete_checkpoint(folder.parent)
    if last:
        ways = f"The newest complete one next to it is {last}."
    elif is_last(resume):
        ways = "Restore what is missing, or begin a new run with `--overwrite` and without `--resume_from_checkpoint`."
    else:
        ways = "There is no complete one next to it."

    anew = " `--ignore_missing_state` continues from it, and these states begin anew." if mendable else ""
    return ways + anew


def states_begun_anew(folder: str | Path) -> str | None:
    """A sentence on which states a run resumed from this checkpoint starts anew; `None` for none."""
    missing = missing_states(folder)
    if not missing:
        return None

    # neither helps without the other: a new schedule drives the rate up, which old momenta do not fit
    anew = [*STATES.values()] + ([] if any(Path(folder).glob("rng_state*.pth")) else ["the random numbers"])
    return f"{folder} has no {' and no '.join(missing)}: {', '.join(anew[:-1])} and {anew[-1]} begin anew."


def check_step(folder: str | Path, rows_per_step: int, stream: StreamPlace | None = None) -> None:
    """Check that a step takes as many rows as before: a resumed run finds its place in the data by counting steps.

    Args:
        folder: the checkpoint.
        rows_per_step: of this run, over all processes.
        stream: the place of a run on a stream, see `check_stream_place`.

    Raises:
        ValueError: if it does not, for instance on another number of processes, or takes other examples of a stream.
    """
    if stream is not None:
        check_stream_place(folder, stream)

    before = read_manifest(folder).get("rows_per_step")
    if before not in (None, rows_per_step):
        raise ValueError(
            "`per_device_train_batch_size` x `gradient_accumulation_steps` x processes is "
            f"{rows_per_step} rows per step, but {folder} was written with {before}: keep the product, or the run "
            "would continue at a different place in the data (`ignore_data_skip` starts the data over)."
        )


def refuse_other_run(output_dir: str | Path, overwrite: bool = False, last: bool = False) -> None:
    """Keep a new run from mixing with an earlier one.

    Args:
        output_dir: folder of the run.
        overwrite: allow deleting it.
        last: resuming from the newest checkpoint was asked for, and none was ever finished. Then what a killed run left
            of its first one does not matter, but a draft does.

    Raises:
        FileExistsError: if `output_dir` holds checkpoints, a draft, or a truncated config.json, and `overwrite` is
            not set.
    """
    output_dir = Path(output_dir)
    if overwrite:
        return

    if not last:
        refuse_torn_config("output_dir", output_dir)

    there = [*([] if last else checkpoints(output_dir)), *sorted(output_dir.glob("*.safetensors"))]
    if not there:
        return

    if last:
        raise FileExistsError(
            f"`output_dir` {output_dir} holds a draft ({there[-1].name}) but no checkpoint that "
            "`resume_from_checkpoint` last could continue from: choose another folder, or delete it with `--overwrite`."
        )
    raise FileExistsError(
        f"`output_dir` {output_dir} holds another run ({there[-1].name}): continue it with "
        "`--resume_from_checkpoint last`, choose another folder, or delete it with `--overwrite`."
    )


def clear_run(output_dir: str | Path) -> None:
    """Delete the checkpoints, the draft, the adapter and the end of an earlier run, and nothing else."""
    for path in checkpoints(output_dir):
        shutil.rmtree(path)
    shutil.rmtree(Path(output_dir) / ADAPTER_FOLDER, ignore_errors=True)
    for path in [*Path(output_dir).glob("*.safetensors"), Path(output_dir) / TRAINER_STATE_NAME]:
        path.unlink(missing_ok=True)


def was_written_to_the_end(output_dir: str | Path, step: int) -> bool:
    """Return whether a run at this step has left all its results in its folder; it writes its state last."""
    output_dir = Path(output_dir)
    if not (output_dir / TRAINER_STATE_NAME).is_file() or not any(output_dir.glob("*.safetensors")):
        return False
    return read_state(output_dir).global_step == step


def check_tensors(model: PreTrainedModel, folder: str | Path) -> None:
    """Check that the weights in a folder fit this draft, name by name and shape by shape.

    Raises:
        ValueError: naming the first tensors that are missing, unexpected or of another shape; or if an adapter was
            merged into them, without which its training cannot continue.
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
    tensors = {name: t for name, t in model.state_dict().items() if name not in skipped}
    wanted = {model.name_in_folder(name): list(t.shape) for name, t in tensors.items()}
    wrong = [f"{name} {what}" for name, what in misfits(found, wanted)]

    if wrong:
        raise ValueError(
            f"The checkpoint {folder} does not fit this draft: {'; '.join(wrong[:6])}. Was it trained with a different "
            "target, vocabulary size or version of hf_eagle?"
        )
