"""Load spread targets, broken ones too, and write what each rank says of them; started by `test_weights.py`.

torchrun --nproc-per-node 2 loading_worker.py SPEC.json   {"out": DIR, "cases": [[sharding, folder], ...]}
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist


torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from hf_eagle import FrozenTarget  # noqa: E402
from hf_eagle.training.distributed import leave  # noqa: E402


def told(sharding: str, folder: str) -> str | None:
    try:
        FrozenTarget.from_pretrained(folder, sharding=sharding)
    except ValueError as problem:
        return str(problem)
    return None


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    found = [told(*case) for case in spec["cases"]]
    (Path(spec["out"]) / f"told-{dist.get_rank()}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
