"""Ask a spread target whose forward changes its logits, then a sound one; started by `test_teacher.py`.

    torchrun --nproc-per-node 2 teacher_worker.py SPEC.json   {"out": DIR, "model": DIR, "sharding": "fsdp2"}

Each rank leaves `rankN.txt` in `out`: what it was told.
"""

import json
import sys
from functools import wraps
from pathlib import Path

import torch
import torch.distributed as dist


torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from hf_eagle import FrozenTarget  # noqa: E402
from hf_eagle.targets.loading import load_causal_lm  # noqa: E402
from hf_eagle.targets.shard_layout import loading_arguments  # noqa: E402
from hf_eagle.training.distributed import leave  # noqa: E402


def change_on_one_rank(model):
    """Something that the last rank alone would see."""
    forward = model.forward

    @wraps(forward)
    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        if dist.get_rank() == 1:
            output.logits = 2 * output.logits
        return output

    model.forward = changed


def main():
    spec = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    told = []
    for name in ("changed", "sound"):
        model = load_causal_lm(spec["model"], **loading_arguments(spec["model"], spec["sharding"]))
        if name == "changed":
            change_on_one_rank(model)
        try:
            FrozenTarget(model)(torch.randint(3, 96, (2, 9)))
            told.append(f"{name}: taken")
        except ValueError as problem:
            told.append(f"{name}: {problem}")
    (Path(spec["out"]) / f"rank{dist.get_rank()}.txt").write_text("\n".join(told) + "\n")
    leave()


if __name__ == "__main__":
    main()
