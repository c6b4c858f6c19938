"""Two gloo ranks that meet; for tests.

    meeting_worker.py SPEC.json    {"out": DIR}

Rank 1 is late: it has connected, and has not said so. Each rank writes whether the other was there when it was through.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch.distributed import distributed_c10d


torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from hf_eagle import EagleTrainingArguments  # noqa: E402


def main():
    out, rank = Path(json.loads(Path(sys.argv[1]).read_text())["out"]), int(os.environ["RANK"])
    connect = distributed_c10d._new_process_group_helper

    def connect_and_stay(*args, **kwargs):
        made = connect(*args, **kwargs)
        if rank == 1:
            time.sleep(1.5)
        (out / f"connected_{rank}").touch()
        return made

    distributed_c10d._new_process_group_helper = connect_and_stay
    EagleTrainingArguments(output_dir=str(out), report_to="none")
    (out / f"through_{rank}").write_text(str((out / f"connected_{1 - rank}").exists()))
    if rank == 0:  # whose store the other one may still ask
        while not (out / "through_1").exists():
            time.sleep(0.05)
        os._exit(0)


if __name__ == "__main__":
    main()
