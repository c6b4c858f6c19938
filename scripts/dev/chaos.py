"""Inject faults into training runs, resume them, and compare them with undisturbed ones.

    python scripts/dev/chaos.py --minutes 60 --seed 7          trials until the time is over
    python scripts/dev/chaos.py --seed 7 --trial 41            one of them alone; its folder is kept
    python scripts/dev/chaos.py --trials 12                    the first 12, which cover every fault

A trial is a random configuration of scripts/train_eagle.py on tiny models, a fault, and another configuration with
which the run goes on. Afterwards its losses are the undisturbed run's (and its weights, to the last bit, where ranks
and accumulation are the same), every record was seen as often as it should be, no checkpoint is torn, no process is
left, nothing hung, and whoever ended with an error said one sentence. `hf_eagle/docs/chaos.md` tells more.

Prints one line per trial and a summary, writes `report.json` into `--out`, and ends with 1 if one failed. Linux only.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="Start no new trial after so many minutes.")
    parser.add_argument("--trials", type=int, help="Run so many trials, however long they take.")
    parser.add_argument("--seed", type=int, default=0, help="Of the trials.")
    parser.add_argument("--trial", type=int, help="Run only the trial with this number.")
    parser.add_argument("--out", type=Path, help="Folder for the report and for trials that failed; unset: a new one.")
    asked = parser.parse_args()

    folder = asked.out or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # read while libraries are imported: one thread adds in one order, and nothing is shared with this user's own caches
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

    from chaos.plan import trials
    from chaos.processes import warm_up
    from chaos.report import Report, describe
    from chaos.trial import Bench

    warm_up()
    bench, report, begun = Bench(folder), Report(asked.seed), time.monotonic()
    plan = trials(asked.seed)
    if asked.trial is not None:
        plan = islice(plan, asked.trial, asked.trial + 1)
    elif asked.trials is not None:
        plan = islice(plan, asked.trials)
    try:
        for trial in plan:
            if asked.trial is None and asked.trials is None and time.monotonic() - begun > 60 * asked.minutes:
                break
            print(f"trial {trial.number}: {describe(trial)}", flush=True)
            report.add(bench.run(trial), folder)
    except KeyboardInterrupt:
        print("  interrupted; the report is of the trials before", flush=True)

    report.seconds = time.monotonic() - begun
    (folder / "report.json").write_text(json.dumps(report.as_json(), indent=1) + "\n")
    print(report.summary(), f"The report is {folder / 'report.json'}.", sep="\n", flush=True)
    if not report.failed and asked.trial is None:
        for name in ("inputs", "undisturbed", "home"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return int(bool(report.failed))


if __name__ == "__main__":
    sys.exit(main())
