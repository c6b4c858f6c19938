"""What must be true of a run that was struck: sentences about what is not, none where all is well."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from hf_eagle.training.checkpoints import MANIFEST, checkpoints, last_complete_checkpoint, why_incomplete

from .plan import STEPS, Blow
from .processes import Ended


TOLERANCE = 1e-6  # of a loss whose sum was added in another order
_CODES = {"SIGTERM": 143, "SIGINT": 130}


@dataclass
class Steps:
    """What the surviving steps of a run trained on.

    Attributes:
        records: of each step, how often each record counted.
        losses: of each step.
    """

    records: dict[int, Counter] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)

    def add(self, ended: Ended) -> None:
        """The steps of a run that went on; those that it took once more were lost."""
        records, losses = {}, {}
        for rank in ended.journals:
            for line in rank:
                if "step" in line:
                    records.setdefault(line["step"], Counter()).update(line["records"])
                    losses.setdefault(line["step"], []).append(line["loss"] / len(ended.journals))
        self.records |= records
        self.losses |= {step: math.fsum(parts) for step, parts in losses.items()}


def first_step(ended: Ended) -> int | None:
    """The first step that ranks took, counted from 1; `None` where they took none."""
    return min((line["step"] for rank in ended.journals for line in rank if "step" in line), default=None)


def struck(ended: Ended) -> bool:
    """Return whether the fault struck."""
    return any("struck" in line for rank in ended.journals for line in rank)


# ---- how ranks end ----


def wrong_end(ended: Ended, blow: Blow | None, refused: bool = False, launcher: bool = False) -> list[str]:
    """What is wrong with how ranks ended.

    Args:
        ended: how they did.
        blow: what struck them.
        refused: whether they should have ended with an error by themselves.
        launcher: whether the others were ended as soon as one had ended badly.
    """
    wrong = [f"process {process} was left" for process in ended.left]
    if ended.hung:
        wrong.append(f"the ranks did not end in {ended.seconds:.0f} s; their codes are {ended.codes}")
    for rank, text in enumerate(ended.printed):
        if "Traceback (most recent call last)" in text:
            wrong.append(f"rank {rank} ended with {ended.codes[rank]} and a traceback")
        sentences = [line for line in text.splitlines() if line.startswith("error: ")]
        if ended.codes[rank] == 1 and len(sentences) != 1:
            wrong.append(f"rank {rank} ended with 1 and {len(sentences)} sentences")
        if ended.codes[rank] < 0 and ended.codes[rank] not in (-9, -15) and not ended.hung:
            wrong.append(f"rank {rank} was ended by signal {-ended.codes[rank]}")
    return wrong + _wrong_codes(ended, blow, refused, launcher)


def _wrong_codes(ended: Ended, blow: Blow | None, refused: bool, launcher: bool) -> list[str]:
    codes, told = ended.codes, f"the ranks ended with {ended.codes}"
    if refused:
        return [] if all(codes) else [f"{told}, though every one of them had to refuse"]
    if blow is None or not struck(ended) or blow.fault == "SIGSTOP":
        return [f"{told} instead of 0"] if any(codes) else []
    if blow.fault in _CODES:
        wanted = _CODES[blow.fault]
        if blow.moment == "data":  # before training no rank tells another
            # of all ranks, the one that sends the signal gets it last, and may lose the others before
            told_by = codes if blow.everywhere else [codes[blow.rank]]
            fine = wanted in told_by and all(codes)
            return [] if fine else [f"{told}, though rank {blow.rank} got {blow.fault}"]
        # a launcher may end ranks whose work is done, but which have not left yet
        fine = wanted in codes and set(codes) <= ({wanted, -15} if launcher else {wanted})
        # the last step may be too late to stop at
        fine = fine or (blow.step >= STEPS - 1 and not any(codes))
        return [] if fine else [f"{told} instead of {wanted}"]
    if blow.fault in ("full disk", "rank raises"):
        return [] if codes[blow.rank] == 1 and all(codes) else [f"{told}, though rank {blow.rank} failed"]
    # behind the last step the others may be done
    fine = codes[blow.rank] == -9 and (all(codes) or blow.moment == "results")
    return [] if fine else [f"{told}, though rank {blow.rank} was killed"]


# ---- checkpoints ----


def is_whole(folder: Path) -> bool:
    """Return whether every file of a checkpoint is there in full, read in the plainest way."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def newest_whole(output_dir: Path) -> Path | None:
    """The checkpoint to go on from."""
    return next((path for path in reversed(checkpoints(output_dir)) if is_whole(path)), None)


def wrong_checkpoints(output_dir: Path, weights: dict[int, str] | None, damaged: bool = False) -> list[str]:
    """What is wrong with the checkpoints of a run.

    Args:
        output_dir: of the run.
        weights: a hash of the undisturbed run's weights after each step; `None` where they are equal only nearly.
        damaged: whether the newest one was damaged on purpose. One that is rotated away may be half gone.
    """
    wrong = []
    finished = [path for path in checkpoints(output_dir) if (path / MANIFEST).is_file()]
    if finished and not is_whole(finished[-1]) and not damaged:
        wrong.append(f"{finished[-1].name} was finished and is torn")
    for path in checkpoints(output_dir):
        if (why_incomplete(path) is None) != is_whole(path):
            wrong.append(f"{path.name} is taken for {'torn' if is_whole(path) else 'complete'}, which it is not")
        if is_whole(path) and weights is not None:
            step = int(path.name.partition("-")[2])
            if hash_of(path / "model.safetensors") != weights.get(step):
                wrong.append(f"{path.name} holds other weights than the undisturbed run's")
    if newest_whole(output_dir) != last_complete_checkpoint(output_dir):
        wrong.append(f"`last` would be {last_complete_checkpoint(output_dir)}, not {newest_whole(output_dir)}")
    return wrong


def load_checkpoints(output_dir: Path, target: Path) -> None:
    """Load every complete checkpoint, whatever may be in it; in a process of its own.

    Raises:
        ValueError: naming the first that cannot be loaded.
    """
    import torch

    from hf_eagle import FrozenTarget, load_draft
    from hf_eagle.training.resuming import read_state

    whole = [path for path in checkpoints(output_dir) if why_incomplete(path) is None]
    model = FrozenTarget.from_pretrained(str(target)) if whole else None
    for path in whole:
        try:
            load_draft(path, model)
            read_state(path)
            for file in [*path.glob("*.pt"), *path.glob("*.pth")]:
                torch.load(file, map_location="cpu", weights_only=False)  # they were written a moment ago
        except Exception as problem:
            raise ValueError(f"{path.name} is complete but cannot be loaded ({problem}).") from problem


def hash_of(path: Path) -> str | None:
    """Of a file's bytes; `None` where there is none."""
    return sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def weights_by_step(output_dir: Path) -> dict[int, str]:
    """A hash of the weights of each checkpoint."""
    folders = checkpoints(output_dir)
    return {int(path.name.partition("-")[2]): hash_of(path / "model.safetensors") for path in folders}


# ---- the whole run ----


def wrong_counts(steps: Steps, records: int) -> list[str]:
    """Return whether passes over so many records saw each of them once: all counts are `n`, or `n` and `n + 1`."""
    total = sum(steps.records.values(), Counter())
    counts = {record: total.get(record, 0) for record in range(records)}
    least = sum(counts.values()) // records
    wrong = [f"record {record} was seen {n} times" for record, n in counts.items() if n not in (least, least + 1)]
    return [f"{'; '.join(wrong[:4])}; {len(wrong)} in all, where {least} to {least + 1} are right"] if wrong else []


def wrong_steps(steps: Steps, wanted: Steps, exact: bool) -> list[str]:
    """Where the steps of a run are not those of the undisturbed one."""
    wrong = []
    if sorted(steps.losses) != list(range(1, STEPS + 1)):
        wrong.append(f"the run took the steps {sorted(steps.losses)}")
    for step in sorted(steps.losses.keys() & wanted.losses.keys()):
        if steps.records[step] != wanted.records[step]:
            more, less = steps.records[step] - wanted.records[step], wanted.records[step] - steps.records[step]
            wrong.append(f"step {step} trained on {_told(more)} instead of {_told(less)}")
        if not _alike(steps.losses[step], wanted.losses[step], exact):
            wrong.append(f"the loss of step {step} is {steps.losses[step]!r} instead of {wanted.losses[step]!r}")
    return wrong


def wrong_results(output_dir: Path, wanted_dir: Path, exact: bool) -> list[str]:
    """Where the folder of a run is not the undisturbed one's."""
    wrong, curves, names = [], [], []
    for folder in (output_dir, wanted_dir):
        found = {path.name for path in folder.glob("*") if not path.name.startswith("checkpoint-")}
        names.append(found - {"acceptance_history.png"})  # the undisturbed run measures none
        curves.append([(entry["step"], entry["loss"]) for entry in _history(folder) if "loss" in entry])
    if names[0] ^ names[1]:
        wrong.append(f"the folder differs in {sorted(names[0] ^ names[1])}")
    if [step for step, _ in curves[0]] != [step for step, _ in curves[1]]:
        wrong.append(f"steps {[step for step, _ in curves[0]]} were logged")
    elif not all(_alike(x[1], y[1], exact) for x, y in zip(*curves, strict=True)):
        wrong.append(f"the logged losses are {curves[0]} instead of {curves[1]}")
    if hash_of(output_dir / "model.safetensors") != hash_of(output_dir / f"checkpoint-{STEPS}" / "model.safetensors"):
        wrong.append("the final weights are not the last checkpoint's")
    if exact and hash_of(output_dir / "model.safetensors") != hash_of(wanted_dir / "model.safetensors"):
        wrong.append("the final weights are not the undisturbed run's")
    return wrong


def wrong_acceptance(output_dir: Path, steps: list[int]) -> list[str]:
    """Return whether acceptance was measured at these steps, once each."""
    found = [entry["step"] for entry in _history(output_dir) if "acceptance_length" in entry]
    return [f"acceptance was measured at the steps {found} instead of {steps}"] if found != steps else []


def _history(output_dir: Path) -> list[dict]:
    path = output_dir / "trainer_state.json"
    return json.loads(path.read_text())["log_history"] if path.exists() else []


def _alike(value: float, wanted: float, exact: bool) -> bool:
    return value == wanted if exact else math.isclose(value, wanted, rel_tol=TOLERANCE)


def _told(records: Counter) -> str:
    return ", ".join(map(str, sorted(records.elements()))) or "nothing"
