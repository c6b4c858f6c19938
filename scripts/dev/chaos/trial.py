"""One trial: an undisturbed run, a run that is struck, and the run that goes on from what it left."""

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hf_eagle.training.checkpoints import MANIFEST

from . import checks
from .inputs import MAX_LENGTH, RECORDS, cut_data, data_file, write_inputs
from .plan import DAMAGE, STEPS, Blow, Configuration, Trial, kind_of
from .processes import Ended, Ranks
from .rank import Saboteur, run_verb


ROOT = Path(__file__).resolve().parents[3]
TRAIN = ROOT / "scripts" / "train_eagle.py"
CACHE = ROOT / "scripts" / "cache_features.py"
ACCEPTANCE_STEPS = 3
SECONDS = 150.0  # that ranks may take until they count as hanging; two of these runs take a tenth on one core
COLLECTIVE_SECONDS = 60  # that they wait for each other
_KEPT = 16  # undisturbed runs, for trials of the same configuration
# what a draft needs besides its method
_MORE = {
    "Eagle3DeepseekV2ForCausalLM": {
        "draft_attention": "mla",
        **{"q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12},
    },
}
# as `accelerate launch` sets them
_FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@dataclass
class Outcome:
    """What came of a trial.

    Attributes:
        trial: which.
        wrong: what is not as it should be.
        met: faults that struck.
        runs: started runs.
        seconds: that it took.
    """

    trial: Trial
    wrong: list[str] = field(default_factory=list)
    met: list[str] = field(default_factory=list)
    runs: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict:
        return asdict(self)


class Bench:
    """A folder with inputs, in which trials are made; undisturbed runs are shared between them."""

    def __init__(self, folder: Path):
        self.folder, self.inputs = folder, folder / "inputs"
        if not self.inputs.exists():
            folder.mkdir(parents=True, exist_ok=True)
            ended = Ranks(lambda rank, journal: write_inputs(self.inputs), 1, folder, {}).wait(SECONDS)
            if any(ended.codes):
                raise ChildProcessError(f"The inputs could not be written.\n{ended.printed[0]}")
        self._wanted: dict[Configuration, tuple[Path, checks.Steps, list[str]]] = {}
        self._made = 0  # undisturbed runs

    def run(self, trial: Trial) -> Outcome:
        """Make a trial."""
        begun = time.monotonic()
        work = _TrialAtWork(self, trial)
        outcome = work.outcome
        try:
            work.make()
        except ChildProcessError as problem:  # no trial could be made, which is no reason to make no other
            outcome.wrong.append(str(problem))
        outcome.seconds = time.monotonic() - begun
        if not outcome.wrong:
            shutil.rmtree(work.folder)
        self._forget(trial.first.trains_alike, failed=bool(outcome.wrong))
        return outcome

    def _forget(self, newest: Configuration, failed: bool) -> None:
        """Delete the oldest undisturbed runs: in an hour there are hundreds. Those of trials that failed stay."""
        if failed:
            self._wanted.pop(newest, None)  # made anew, should another trial ask for it
        while len(self._wanted) > _KEPT:
            oldest = next(iter(self._wanted))
            shutil.rmtree(self._wanted.pop(oldest)[0])

    def undisturbed(self, configuration: Configuration) -> tuple[Path, checks.Steps, list[str], int]:
        """The folder of an undisturbed run, its steps, what is wrong with it, and how many runs that took."""
        alike = configuration.trains_alike
        if alike in self._wanted:
            return *self._wanted[alike], 0
        self._made += 1
        folder = self.folder / "undisturbed" / str(self._made)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        ended = self.start(alike, folder, more={"save_total_limit": STEPS})
        steps = checks.Steps()
        steps.add(ended)
        _keep(folder, "undisturbed", ended)
        wrong = checks.wrong_end(ended, None) + checks.wrong_counts(steps, RECORDS[alike.packing])
        self._wanted[alike] = folder, steps, wrong
        return folder, steps, wrong, 1

    def start(
        self,
        told: Configuration,
        folder: Path,
        blow: Blow | None = None,
        more: dict[str, object] | None = None,
        launcher: bool = False,
        data: Path | None = None,
    ) -> Ended:
        """Run the verb in a folder, and wait for its end.

        Args:
            told: what it is told.
            folder: of the trial; the run's is `out` in it.
            blow: what strikes.
            more: further arguments.
            launcher: as for `Ranks.wait`.
            data: in place of the inputs' chats.
        """
        arguments = self._arguments(told, folder, data or data_file(self.inputs, told.packing)) | (more or {})
        words = [word for name, value in arguments.items() for word in _words(name, value)]

        def work(rank: int, journal: int) -> None:
            saboteur = Saboteur(blow, rank, folder, folder / "pids.json", journal)
            # data are prepared anew in a trial, whose cache may be struck too
            run_verb(TRAIN, words, saboteur, folder / "cache")

        environment = _FSDP if told.wrapped == "fsdp2" else {}
        pause = 0.2 + blow.share if blow else 0.5
        return Ranks(work, told.ranks, folder, environment).wait(SECONDS, launcher, pause)

    def _arguments(self, told: Configuration, folder: Path, data: Path) -> dict[str, object]:
        kind = kind_of(told.draft)
        arguments = {
            "target": self.inputs / "target",
            "train_data": data,
            "output_dir": folder / "out",
            "method": next(iter(kind.methods)),
            **_MORE.get(told.draft, {}),
            **({} if "feature_noise" in kind.meaningless else {"feature_noise": "uniform" if told.noise else "none"}),
            **{"max_length": MAX_LENGTH[told.packing], "max_steps": STEPS, "learning_rate": 1e-3, "logging_steps": 1},
            "train_sampling_strategy": told.sampler,
            "per_device_train_batch_size": told.batch,
            "gradient_accumulation_steps": told.accumulation,
            "target_sharding": told.target,
            "dataloader_num_workers": told.workers,
            **{"save_steps": told.save_steps, "save_total_limit": 2},
            "ddp_timeout": COLLECTIVE_SECONDS,
            **{"report_to": "none", "disable_tqdm": True},
        }

        # what is off has no argument
        arguments |= {"packing": True} if told.packing else {}
        arguments |= {"streaming": True} if told.streaming else {}
        if told.acceptance:
            arguments |= {"acceptance_prompts": self.inputs / "prompts.txt"}
            arguments |= {"acceptance_steps": ACCEPTANCE_STEPS}
            arguments |= {"acceptance_num_prompts": 2}

        # in float32 a store changes no loss, so runs with and without one are comparable
        if told.store == "first_epoch":
            arguments |= {"feature_store": folder / "store", "cache_mode": "first_epoch", "store_dtype": "float32"}
        if told.store == "read":
            arguments |= {"feature_store": self._store(told, arguments), "store_dtype": "float32"}
        return arguments

    def _store(self, told: Configuration, arguments: dict[str, object]) -> Path:
        """The features that all runs of a draft read, made when they are first asked for."""
        folder = self.inputs / f"store-{told.draft}-{'packed' if told.packing else 'padded'}"
        if folder.exists():
            return folder
        names = ("target", "train_data", "method", "max_length", *_MORE.get(told.draft, {}))
        own = {name: arguments[name] for name in names}
        own |= {"feature_store": folder, "store_dtype": "float32", "output_dir": self.folder / "none"}
        own |= {"packing": True} if told.packing else {}
        words = [word for name, value in own.items() for word in _words(name, value)]

        def work(rank: int, journal: int) -> None:
            run_verb(CACHE, words, Saboteur(None, rank, folder, folder / "pids.json", journal))

        ended = Ranks(work, 1, self.folder, {}).wait(SECONDS)
        if any(ended.codes):
            shutil.rmtree(folder, ignore_errors=True)
            raise ChildProcessError(f"The features could not be stored.\n{ended.printed[0]}")
        return folder

    def loading_problem(self, output_dir: Path, folder: Path) -> list[str]:
        """What cannot be loaded of the checkpoints of a run."""

        def work(rank: int, journal: int) -> None:
            try:
                checks.load_checkpoints(output_dir, self.inputs / "target")
            except ValueError as problem:
                raise SystemExit(f"error: {problem}") from None

        ended = Ranks(work, 1, folder, {}).wait(SECONDS)
        return ended.printed[0].splitlines()[-1:] if any(ended.codes) else []


class _TrialAtWork:
    def __init__(self, bench: Bench, trial: Trial):
        self.bench, self.trial, self.outcome = bench, trial, Outcome(trial)
        self.folder = bench.folder / f"trial-{trial.number}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.out, self.steps = self.folder / "out", checks.Steps()
        # whether all steps so far were taken as in the undisturbed run, to the last bit
        self.exact = True
        self.damaged: Path | None = None  # the checkpoint of which a file was cut or removed

    def make(self) -> None:
        """Strike the run, let it go on, and judge it."""
        trial = self.trial
        self.wanted, self.wanted_steps, wrong, runs = self.bench.undisturbed(trial.first)
        told = asdict(trial) | {"undisturbed": str(self.wanted)}
        (self.folder / "trial.json").write_text(json.dumps(told, indent=1))
        self.outcome.runs += runs
        self.outcome.wrong += [f"undisturbed: {sentence}" for sentence in wrong]
        self.weights = checks.weights_by_step(self.wanted / "out")

        ended = self._attempt("struck", trial.first, trial.blow)
        if trial.blow.fault in DAMAGE and checks.struck(ended):
            self._damage(trial.blow)
        if trial.blow.fault != "SIGSTOP" or any(ended.codes):
            if trial.again is not None:
                ended = self._attempt("struck again", trial.second, trial.again)
                if trial.again.fault in DAMAGE and checks.struck(ended):
                    self._damage(trial.again)
            if trial.again is None or any(ended.codes):
                self._attempt("resumed", trial.second, None)
        self._judge_the_whole()

    def _attempt(self, name: str, told: Configuration, blow: Blow | None, **how) -> Ended:
        """Start or go on with the run, and judge how that ended."""
        begin = checks.newest_whole(self.out)
        more = {} if name == "struck" else {"resume_from_checkpoint": "last"}
        if self._is_refused(name):
            self._start(f"{name}, refused", told, None, more, refused=True)
            more = {"overwrite": True}
        ended = self._start(name, told, blow, more)

        # how far it has come, and from where
        first, wanted = checks.first_step(ended), (0 if begin is None else _step(begin)) + 1
        if first is not None and first != wanted:
            self.outcome.wrong.append(f"{name}: it went on at step {first} instead of {wanted}")
        self.exact = self.exact and told.layout == self.trial.first.layout and told.adds_in_one_order
        self.steps.add(ended)

        judged = self._judge_checkpoints()
        judged += self.bench.loading_problem(self.out, self.folder)
        saves = blow is not None and blow.fault in ("SIGTERM", "SIGINT") and blow.moment != "data"
        if saves and checks.struck(ended):
            newest = checks.newest_whole(self.out)
            if newest is None or _step(newest) < blow.step + (blow.moment != "checkpoint"):
                judged.append(f"{blow.fault} in step {blow.step + 1} left {newest and newest.name} as the newest")
        self.outcome.wrong += [f"{name}: {sentence}" for sentence in judged]
        return ended

    def _start(self, name: str, told: Configuration, blow, more, refused=False, data=None) -> Ended:
        ended = self.bench.start(told, self.folder, blow, more, self.trial.launcher, data)
        self.outcome.runs += 1
        _keep(self.folder, name, ended)
        wrong = checks.wrong_end(ended, blow, refused, self.trial.launcher)
        self.outcome.wrong += [f"{name}: {sentence}" for sentence in wrong]
        if blow is not None and checks.struck(ended):
            self.outcome.met.append(blow.fault)
        elif blow is not None and name == "struck":
            self.outcome.wrong.append(f"{name}: {blow.fault} found no place to strike at")
        return ended

    def _is_refused(self, name: str) -> bool:
        """Return whether going on has to be refused: a checkpoint was finished, and none is whole any more."""
        finished = any((path / MANIFEST).is_file() for path in self.out.glob("checkpoint-*"))
        return name != "struck" and finished and checks.newest_whole(self.out) is None

    def _damage(self, blow: Blow) -> None:
        """Cut or remove a file, and see what that is taken for."""
        if blow.fault == "data cut":
            data = shutil.copy(data_file(self.bench.inputs, self.trial.first.packing), self.folder / "cut.jsonl")
            cut_data(Path(data), blow.share)
            more = {"resume_from_checkpoint": "last"}
            self._start("on cut data", self.trial.second, None, more, refused=True, data=Path(data))
            return
        newest = checks.newest_whole(self.out)
        if newest is None:  # it was struck again before there was one
            return
        files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
        path = files[int(blow.share * len(files))]
        with (self.folder / "damaged.txt").open("a") as told:
            told.write(f"{blow.fault}: {path}\n")
        if blow.fault == "checkpoint cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            path.unlink()
        self.damaged = newest
        self.outcome.wrong += [f"{blow.fault}: {sentence}" for sentence in self._judge_checkpoints()]

    def _judge_checkpoints(self) -> list[str]:
        there = checks.checkpoints(self.out)
        damaged = bool(there) and there[-1] == self.damaged
        return checks.wrong_checkpoints(self.out, self.weights if self.exact else None, damaged)

    def _judge_the_whole(self) -> None:
        self.outcome.wrong += checks.wrong_steps(self.steps, self.wanted_steps, self.exact)
        self.outcome.wrong += checks.wrong_counts(self.steps, RECORDS[self.trial.first.packing])
        self.outcome.wrong += checks.wrong_results(self.out, self.wanted / "out", self.exact)
        if self.trial.first.acceptance:
            measured = list(range(ACCEPTANCE_STEPS, STEPS + 1, ACCEPTANCE_STEPS))
            self.outcome.wrong += checks.wrong_acceptance(self.out, measured)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _words(name: str, value: object) -> list[str]:
    return [f"--{name}", str(value)]


def _keep(folder: Path, name: str, ended: Ended) -> None:
    """What ranks printed and trained on, for people who look into it."""
    told = [f"ended with {ended.codes} after {ended.seconds:.1f} s"]
    told += [f"--- rank {rank}\n{text}" for rank, text in enumerate(ended.printed)]
    (folder / f"{name}.log").write_text("\n".join(told))
    (folder / f"{name}.journal.json").write_text(json.dumps(ended.journals))
