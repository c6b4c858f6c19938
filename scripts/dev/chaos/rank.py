"""Inside a rank: the verb as it is, with a journal of what it trains on, and a fault that strikes at a place in it.

The journal is a pipe, which a full disk does not fill and a killed rank does not take away. Its lines are objects:
`{"step", "loss", "records"}` of each batch, and `{"struck"}` where the fault strikes.
"""

import json
import os
import re
import resource
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

from .plan import SIGNALS, Blow


_NUMBER = re.compile(r"n(\d+)\.")
_WRITES = os.O_WRONLY | os.O_RDWR


class Saboteur:
    """Counts the places of a moment, and strikes at one of them.

    Args:
        blow: what strikes; `None` for nothing.
        rank: this rank.
        folder: of the trial: what is written into it is a place.
        pids: the file with the process of each rank, which appears when all have been started.
        journal: a file descriptor.
    """

    def __init__(self, blow: Blow | None, rank: int, folder: Path, pids: Path, journal: int):
        self.blow, self.rank, self.folder, self.pids, self.journal = blow, rank, str(folder), pids, journal
        self.moment: str | None = None
        self.place = 0
        self.struck = False

    def tell(self, **line) -> None:
        """Write a line into the journal."""
        os.write(self.journal, (json.dumps(line) + "\n").encode())

    def enter(self, moment: str, step: int) -> None:
        """A moment begins, whose places come next; `leave` ends it."""
        blow = self.blow
        if blow is None or self.struck or blow.moment != moment or blow.step != step:
            return
        # of what happens inside a rank every rank takes its own part; signals are sent by one
        if self.rank == blow.rank or (blow.everywhere and blow.fault not in SIGNALS):
            self.moment, self.place = moment, 0
            if blow.fault == "full disk" or (blow.fault == "rank raises" and blow.nth % 2 == 0):
                self._strike(None)

    def leave(self) -> None:
        """The moment is over: strike where it had fewer places."""
        if self.moment is not None:
            self._strike(None)

    def reach(self, path: str | None = None) -> None:
        """A place: a file is about to be written, or, where it is named, was written just now."""
        if self.moment is None or threading.current_thread() is not threading.main_thread():
            return
        if self.blow.fault == "rank raises":
            return  # not from inside of a library
        if self.place == self.blow.nth:
            self._strike(path)
        self.place += 1

    def _strike(self, path: str | None) -> None:
        blow, self.struck, self.moment = self.blow, True, None
        if path is not None and blow.cut and blow.fault == "SIGKILL":
            os.truncate(path, os.path.getsize(path) // 2)
        self.tell(struck=blow.fault, written=path)

        if blow.fault == "full disk":
            limit = int(10_000 * blow.share)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        elif blow.fault == "rank raises":
            raise (ValueError if blow.cut else OSError)(f"`chaos` rank {self.rank} was told to raise: start it again.")
        else:
            # files are damaged after a run was killed
            number = getattr(signal, blow.fault if blow.fault in SIGNALS else "SIGKILL")
            self._send(number)

    def _send(self, number: int) -> None:
        while not self.pids.exists():
            time.sleep(0.001)
        pids = json.loads(self.pids.read_text())
        for pid in pids if self.blow.everywhere else ():
            if pid != os.getpid():
                os.kill(pid, number)
        os.kill(os.getpid(), number)


def run_verb(script: Path, arguments: list[str], saboteur: Saboteur, cache: Path | None = None) -> None:
    """Run a verb in this process, as `python SCRIPT ARGUMENTS` would.

    Args:
        script: the verb.
        arguments: words of its command line.
        saboteur: strikes in it.
        cache: where prepared data are kept, in place of the cache of all.
    """
    if cache is not None:
        from datasets import config

        config.HF_DATASETS_CACHE = cache  # what the environment says was read at the import
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started this may ignore it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _shard_on_a_cpu()
    _watch_training(saboteur)
    _watch_files(saboteur)
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def _shard_on_a_cpu() -> None:
    """FSDP2 where accelerate would take DDP in its place."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    from hf_eagle.training.run_arguments import RunArguments

    parse = RunArguments.parse

    def parse_and_meet(*args, **kwargs):
        run = parse(*args, **kwargs)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            run.training.device  # noqa: B018  the processes meet
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return run

    RunArguments.parse = parse_and_meet


def _watch_training(saboteur: Saboteur) -> None:
    """Write down every batch, and reach the places of a step and of a checkpoint."""
    from hf_eagle.training import distributed, parts
    from hf_eagle.training.trainer import EagleTrainer

    conversations = parts.conversations
    compute_loss, save_checkpoint = EagleTrainer.compute_loss, EagleTrainer._save_checkpoint
    save_model, leave = EagleTrainer.save_model, distributed.leave

    def watched_conversations(*args, **kwargs):
        saboteur.enter("data", 0)
        found = conversations(*args, **kwargs)
        saboteur.leave()
        return found

    def watched_loss(self, model, inputs, *args, **kwargs):
        if not self.model.training:
            return compute_loss(self, model, inputs, *args, **kwargs)
        step = self.state.global_step
        saboteur.enter("begin", step)
        saboteur.leave()
        saboteur.enter("loss", step)  # features may be stored in it
        found = compute_loss(self, model, inputs, *args, **kwargs)
        loss = float((found[0] if isinstance(found, tuple) else found).detach())
        saboteur.tell(step=step + 1, loss=loss, records=records_of(inputs, self.tokenizer_of_records))
        saboteur.leave()
        return found

    def watched_checkpoint(self, *args, **kwargs):
        saboteur.enter("checkpoint", self.state.global_step)
        save_checkpoint(self, *args, **kwargs)
        saboteur.leave()

    def watched_model(self, output_dir=None, _internal_call=False):
        if not _internal_call:
            saboteur.enter("results", self.state.global_step)
        return save_model(self, output_dir, _internal_call)

    def watched_leave(*args):
        saboteur.leave()
        leave(*args)

    parts.conversations = watched_conversations
    EagleTrainer.compute_loss, EagleTrainer._save_checkpoint = watched_loss, watched_checkpoint
    EagleTrainer.save_model, distributed.leave = watched_model, watched_leave


def _watch_files(saboteur: Saboteur) -> None:
    """Reach a place before a file is opened for writing, renamed or removed, and behind those of torch."""
    import safetensors.torch
    import torch
    import transformers.modeling_utils

    def audited(event: str, args: tuple) -> None:
        if saboteur.moment is None:
            return
        if event in (
            "os.remove",
            "os.rename",
        ):  # older checkpoints go, and what is written on the side comes to its place
            saboteur.reach()
        elif event == "open":
            path, _, flags = args
            if isinstance(path, str) and path.startswith(saboteur.folder) and flags & _WRITES:
                saboteur.reach()

    def told(write):
        def write_and_tell(content, path, *args, **kwargs):
            written = write(content, path, *args, **kwargs)
            saboteur.reach(path if isinstance(path, str) else None)
            return written

        return write_and_tell

    sys.addaudithook(audited)
    torch.save = told(torch.save)
    safetensors.torch.save_file = told(safetensors.torch.save_file)
    if hasattr(transformers.modeling_utils, "safe_save_file"):
        transformers.modeling_utils.safe_save_file = safetensors.torch.save_file


def records_of(batch, tokenizer) -> list[int]:
    """Numbers of the records of a batch that count, each as often as it does."""
    found = []
    seen = batch["attention_mask"].bool()
    documents = batch.get("documents", (~seen).long().neg())
    for ids, mask, places in zip(batch["input_ids"], batch["loss_mask"], documents, strict=True):
        for document in places[places >= 0].unique().tolist():
            if mask[places == document].gt(0).any():
                text = tokenizer.decode(ids[places == document])
                found.append(int(_NUMBER.search(text).group(1)))
    return found
