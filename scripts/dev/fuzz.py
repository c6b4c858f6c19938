"""Give every verb bad arguments, files, servers, outputs and disks, and check how it ends.

    python scripts/dev/fuzz.py --minutes 60 --seed 7
    python scripts/dev/fuzz.py --seed 7 --trial 123                    one trial again, and keep its folder

The rule: a verb ends with 0 and has done what it says, or with one sentence that names an argument or a file, within
its time; and every file that was there before holds what it held. A trial is drawn from the seed and its number alone.
Prints every trial that breaks the rule, and a table of verbs and faults at the end; `--output_json` keeps it. The exit
status is 1 if a trial broke the rule.
"""

import argparse
import collections
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts" / "dev")]

from fuzzing.faults import FAULTS, Trial  # noqa: E402
from fuzzing.rule import broken_rule, snapshot  # noqa: E402
from fuzzing.server import chat_server  # noqa: E402
from fuzzing.world import VERBS, make_world  # noqa: E402
from warm_python import WarmPython  # noqa: E402


LIMITED = ROOT / "scripts" / "dev" / "fuzzing" / "limited.py"
# nothing is fetched: what would be asked for answers at once that it is not there
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
}
ENVIRONMENT |= {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
ENVIRONMENT |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT)}
SLOW_TURNS = 4  # in one of so many turns a slow verb is run


def drawn(seed: int, number: int, world: Path) -> tuple[Trial, list[str]]:
    """A trial and what is wrong in it; the verbs and the faults take turns, so that each is met early."""
    draw = random.Random(f"{seed} {number}")
    turn, place = divmod(number, len(VERBS))
    verb = VERBS[place]
    if verb.slow and turn % SLOW_TURNS:
        verb = draw.choice([known for known in VERBS if not known.slow])
    trial = Trial(verb, world, list(verb.command), draw)
    first = FAULTS[(turn + number + seed) % len(FAULTS)]
    faults = [first] + ([draw.choice(FAULTS)] if draw.random() < 0.15 else [])
    return trial, [fault(trial) for fault in faults]


def run(trial: Trial, python: WarmPython, seconds: int):
    """The verb's end: its status and what it printed."""
    with chat_server(trial.server, trial.random.randrange(2**32)) as url:
        command = [word.replace("{url}", url) for word in trial.command]
        limits = [
            str(seconds * (3 if trial.verb.slow else 1)),
            str(-1 if trial.size_limit is None else trial.size_limit),
        ]
        # NUL and half characters are no words of a command line
        command = [word.encode("utf-8", "ignore").decode().replace("\0", "") for word in command]
        return python.run(LIMITED, *limits, ROOT / "scripts" / trial.verb.script, *command, cwd=trial.world)


def attempt(seed: int, number: int, sound: Path, folder: Path, python: WarmPython, seconds: int) -> dict:
    """One trial in a copy of the sound world; what was wrong in it, and how it ended."""
    shutil.rmtree(folder, ignore_errors=True)
    world = folder / "world"
    shutil.copytree(sound, world)
    trial, faults = drawn(seed, number, world)
    before = snapshot(world)
    ended = run(trial, python, seconds)
    broken = broken_rule(trial, ended.returncode, ended.stdout, ended.stderr, before)
    words = {"command": f"{trial.verb.script} {' '.join(trial.command)[:600]}", "status": ended.returncode}
    last = [line for line in ended.stderr.strip().splitlines() if line.strip()][-1:]
    return {"trial": number, "verb": trial.verb.name, "faults": faults, "broken": broken, **words, "said": last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="start no new trial after so many minutes")
    parser.add_argument("--seed", type=int, default=0, help="draws everything")
    parser.add_argument("--trial", type=int, default=None, help="run only this trial, and keep its folder")
    parser.add_argument("--trials", type=int, default=None, help="so many at most")
    parser.add_argument("--start", type=int, default=0, help="number of the first trial")
    parser.add_argument("--seconds", type=int, default=60, help="that a verb may take")
    parser.add_argument("--output_json", default=None, help="file for all trials")
    args = parser.parse_args()
    os.environ |= ENVIRONMENT

    with tempfile.TemporaryDirectory(prefix="hf_eagle-fuzz-") as temporary:
        folder = Path(temporary) if args.trial is None else Path(tempfile.mkdtemp(prefix="hf_eagle-fuzz-"))
        python = WarmPython(**ENVIRONMENT, HF_HOME=str(folder / "home"))  # its caches are nobody else's
        make_world(folder / "sound", python)
        done, ends = [], time.monotonic() + 60 * args.minutes
        number = args.start if args.trial is None else args.trial
        while not done or (
            args.trial is None and time.monotonic() < ends and (args.trials is None or len(done) < args.trials)
        ):
            done.append(attempt(args.seed, number, folder / "sound", folder / "trial", python, args.seconds))
            tell(done[-1], args.seed, always=args.trial is not None)
            number += 1
    if args.trial is not None:
        print(f"its world is in {folder / 'trial' / 'world'}")
    summarize(done, args)


def tell(found: dict, seed: int, always: bool = False) -> None:
    """A line for a trial that broke the rule, with the command that runs it again."""
    if found["broken"] or always:
        print(f"trial {found['trial']}: {found['verb']}; {'; '.join(found['faults'])}", flush=True)
        print(f"    {found['broken'] or 'as it should'} (exit {found['status']}): {' '.join(found['said'])[:400]}")
        print(f"    {found['command']}\n    again: python scripts/dev/fuzz.py --seed {seed} --trial {found['trial']}")


def summarize(done: list[dict], args) -> None:
    """Counts by verb; exit status 1 if a trial broke the rule."""
    met = collections.Counter(found["verb"] for found in done)
    broken = collections.Counter(found["verb"] for found in done if found["broken"])
    for verb in sorted(met):
        print(f"{verb:<20}{met[verb]:>6} trials{broken[verb]:>6} broke the rule")
    statuses = collections.Counter(str(found["status"]) for found in done)
    print(f"{len(done)} trials with seed {args.seed}: exit statuses {dict(sorted(statuses.items()))}")
    print(f"{broken.total()} broke the rule")
    if args.output_json:
        Path(args.output_json).write_text(json.dumps(done, indent=2) + "\n")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
