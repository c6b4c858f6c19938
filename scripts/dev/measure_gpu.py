"""Measure what training and decoding cost on one GPU, in under five minutes, without a network.

    python scripts/dev/measure_gpu.py --out outputs/gpu          everything
    python scripts/dev/measure_gpu.py --part draft --part waits  only these parts
    python scripts/dev/measure_gpu.py --tiny                     tiny shapes, which a CPU can take too

Weights are random, shapes are real. The parts:

    kernels   time of what the draft's layer is made of, and its distance from the eager reference in float32
    draft     forward and backward of the draft alone: time, memory, share of what a matrix product reaches
    step      the whole step, with a target whose every word is in the draft's vocabulary
    memory    what a dry run predicts, and what the allocator says
    waits     where a training step waits for the device
    host      time of the host, of the device, and both together
    profile   the ten operations of a step that take most of the device's time
    training  the losses of a short run on the device, and of the same run on the CPU
    decoding  time of a round, and how much of it is neither the draft nor the target
    tests     the tests that run on the device

Each part runs in a process of its own, prints as it goes, and is stopped after its share of the five minutes; one that
fails does not stop the others. Writes `table.md`, `measured.json`, `measured.png` and what each part printed into
`--out`, and ends with 1 if a part failed.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# seconds after which a part is stopped, about twice what it needs; together with starting less than five minutes
PARTS = {"kernels": 25, "draft": 65, "step": 25, "memory": 20, "waits": 20, "host": 15, "profile": 10}
PARTS |= {"training": 20, "decoding": 25, "tests": 60}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="Run only this part; may be given again.")
    parser.add_argument("--out", type=Path, help="Folder for table, JSON and PNG; unset: a new one.")
    parser.add_argument("--tiny", action="store_true", help="Tiny shapes, on the CPU where there is no GPU.")
    asked = parser.parse_args()

    folder = asked.out or Path(tempfile.mkdtemp(prefix="gpu-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    from measuring_gpu import report
    from measuring_gpu.parts import run_part

    machine = run_part("machine", asked.tiny, 60, folder / "machine.log").rows
    if not machine:
        parser.error("PyTorch finds no GPU here: run this where it finds one, or give --tiny.")
    print(report.line(machine[0]), flush=True)

    found = {}
    for name in [name for name in PARTS if asked.part is None or name in asked.part]:
        print(f"\n{name}", flush=True)
        log = folder / f"{name}.log"
        found[name] = run_part(name, asked.tiny, PARTS[name], log, lambda row: print(" ", report.line(row), flush=True))
        print(f"  {found[name].error or 'done'} ({found[name].seconds:.0f} s)", flush=True)

    table = report.table(machine[0], found)
    (folder / "table.md").write_text(table)
    (folder / "measured.json").write_text(json.dumps(report.as_json(machine[0], found), indent=1) + "\n")
    report.draw(machine[0], found, folder / "measured.png")
    print(f"\n{table}\nTable, JSON and PNG are in {folder}.")
    return int(any(part.error for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
