"""Record 20 optimizer steps of every kind of training to the last bit: proof that moving code changed nothing.

    python scripts/dev/record_steps.py before.json                          record, before a change
    python scripts/dev/record_steps.py after.json --against before.json     record again and compare
    python scripts/dev/record_steps.py some.json --only eagle3 mla          only some of the configurations

Of each configuration it keeps the loss of every micro batch and the gradient norm of every step, the loss of every
batch of an evaluation, a hash of every tensor of the last checkpoint (weights, optimizer, random state), its config and
the names of its files, and what was logged but for times and rates. Floats are written as `float.hex()`. A comparison
prints one line per configuration, `equal` or the first difference, and ends with 1 if there was one.

Both recordings must come from the same machine and the same libraries: another processor rounds differently.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any


# read while libraries are imported: one thread adds in one order, on a CPU, and nothing comes from the network
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": ""}

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate import PartialState  # noqa: E402
from accelerate.utils import DistributedType, gather_object  # noqa: E402
from recording.configurations import ARGUMENTS, CONFIGURATIONS, STEPS  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import PrinterCallback, set_seed  # noqa: E402

from hf_eagle import EagleTrainer, EagleTrainingArguments  # noqa: E402

# not public: where it moves, only this line changes
from hf_eagle.training.distributed import leave  # noqa: E402


# endings of what is logged and depends on the clock
CLOCK = ("runtime", "per_second")


# ---- recording ----


class RecordingTrainer(EagleTrainer):
    """Keeps the loss of every micro batch; of what is logged, only a mean over them is left."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        # by optimizer step, those of training and those of evaluation
        self.losses = {True: defaultdict(list), False: defaultdict(list)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result

        # a step is counted at its end, and evaluated after that
        step = self.state.global_step + model.training
        self.losses[model.training][step].append(exact(loss.item()))
        return result


def exact(value: Any) -> Any:
    """A float to the last bit, which also makes a NaN equal to a NaN; anything else as it is."""
    return value.hex() if isinstance(value, float) else value


def train(name: str, folder: Path) -> dict:
    """Train one configuration, in this process or as one of its ranks, and say what came of it."""
    configuration = CONFIGURATIONS[name]
    # so that a configuration does not depend on those before it
    set_seed(0)

    args = EagleTrainingArguments(output_dir=str(folder / "run"), **{**ARGUMENTS, **configuration.arguments})
    args.device  # noqa: B018  the processes meet
    if args.fsdp:  # on a CPU accelerate takes DDP in its place
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    trainer = RecordingTrainer(args=args, **configuration.build(folder))
    trainer.train()

    checkpoint = folder / "run" / f"checkpoint-{STEPS}"
    return {
        # so that none is taken for another: a draft that was not sharded would train just as well
        "made of": {
            "draft": type(trainer.model).__name__,
            "wrapped": type(trainer.model_wrapped).__name__,
            "target": type(next(trainer.target.model.parameters()).data).__name__,
        },
        **recorded_steps(trainer),
        "tensor": saved_tensors(checkpoint),
        "config": json.loads((checkpoint / "config.json").read_text()),
        "files": sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()),
        "logged": [
            {name: exact(value) for name, value in entry.items() if not name.endswith(CLOCK)}
            for entry in trainer.state.log_history
        ],
    }


def recorded_steps(trainer: RecordingTrainer) -> dict[str, dict]:
    """Losses by rank and gradient norm of every step, and losses of evaluations; all ranks must call."""
    norms = {entry["step"]: entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry}
    training, evaluation = (gather_object([trainer.losses[kind]]) for kind in (True, False))

    if not list(norms) == list(training[0]) == list(range(1, STEPS + 1)):
        raise RuntimeError(f"not every step is recorded: losses of {list(training[0])}, norms of {list(norms)}")
    return {
        "step": {
            step: {"loss of rank": [{"batch": rank[step]} for rank in training], "gradient norm": exact(norm)}
            for step, norm in norms.items()
        },
        "evaluation at step": {
            step: {"loss of rank": [{"batch": rank[step]} for rank in evaluation]} for step in evaluation[0]
        },
    }


def saved_tensors(folder: Path) -> dict[str, dict]:
    """Of every tensor in a folder's files: what it is and a hash of its bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            content = load_file(path)
        elif path.suffix in (".pt", ".pth"):  # not safe from strangers, but these were written a moment ago
            content = torch.load(path, map_location="cpu", weights_only=False)
        else:
            continue

        for place, tensor in leaves(content, str(path.relative_to(folder))):
            if isinstance(tensor, torch.Tensor):
                found[place] = {
                    "dtype": str(tensor.dtype),
                    "shape": str(list(tensor.shape)),
                    # a scalar has no bytes to look at until it has an axis
                    "sha256": sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest(),
                }
    return found


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """What stands in nested dictionaries and lists, with the way there."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    else:
        yield place, value
        return
    for name, part in parts:
        yield from leaves(part, f"{place} {name}".strip())


def launch(name: str, folder: Path) -> dict:
    """Train one configuration on several gloo ranks, each of which runs this file."""
    out = folder / "recording.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(CONFIGURATIONS[name].ranks), __file__, str(out), "--only", name]

    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    return read(out)[name]


def record(names: list[str]) -> dict[str, dict]:
    """Train configurations one after the other, each in a temporary folder."""
    recordings = {}
    for name in names:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            way = train if CONFIGURATIONS[name].ranks == 1 else launch
            recordings[name] = way(name, Path(folder))
        print(f"{name}: recorded in {time.perf_counter() - started:.1f} s", flush=True)
    return recordings


# ---- files and comparison ----


def write(path: Path, recordings: dict[str, dict]) -> None:
    """Say also what it was made with."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    path.write_text(json.dumps({"versions": versions, "configurations": recordings}, indent=1) + "\n")


def read(path: Path) -> dict[str, dict]:
    """The recordings of a file."""
    return json.loads(path.read_text())["configurations"]


def first_difference(before: dict, after: dict) -> str | None:
    """The first place where two recordings of a configuration differ; losses come first."""
    old, new = dict(leaves(before)), dict(leaves(after))
    for place in [*old, *(place for place in new if place not in old)]:
        was, now = old.get(place, "missing"), new.get(place, "missing")
        if was != now:
            return f"{place}: was {was}, is {now}"
    return None


def compare(before: dict[str, dict], after: dict[str, dict]) -> bool:
    """Print a line a configuration; whether all are equal."""
    equal = True
    for name in after:
        difference = first_difference(before[name], after[name]) if name in before else "not recorded before"
        print(f"{name}: {'equal' if difference is None else difference}")
        equal = equal and difference is None
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="The recording to write.")
    parser.add_argument("--against", type=Path, help="An earlier recording to compare with.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    asked = parser.parse_args()
    torch.set_num_threads(1)

    if "RANK" in os.environ:  # one of the ranks that `launch` started
        (name,) = asked.only
        recording = train(name, asked.out.parent)
        if PartialState().is_main_process:
            write(asked.out, {name: recording})
        leave()
        return

    # before minutes of training: a wrong name is said at once, and `out` may be the same file
    before = read(asked.against) if asked.against else None
    recordings = record(asked.only)
    write(asked.out, recordings)
    print(f"wrote {asked.out}")

    if before is not None and not compare(before, json.loads(json.dumps(recordings))):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
