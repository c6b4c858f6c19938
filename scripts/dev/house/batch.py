"""The way of one batch: the files of hf_eagle that are called between the collator and the loss of one training step.

Which code runs is decided while it runs, so this is measured: `sys.setprofile` sees every Python function that the real
trainer calls with a tiny target and a tiny draft. All of them count, a property of a config like the draft's forward.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

from house.tree import PACKAGE


# what a batch becomes on its way, as a whole: its plan, its features, what the target says of it, what is learned of it
CARRIERS = {"UnrollPlan", "SupervisionPlan", "TargetFeatures", "TargetDistribution", "Lesson", "EagleOutput"}


class Recorder:
    """Called for every call and return; keeps what changes the file, from one function's call to another's return.

    Attributes:
        files: of the package, in the order in which a batch comes to them.
        hops: calling file, called file and function, each once: a layer that is run twice is read once.
        holders: files that are given the batch, or make or are given what it becomes as a whole: who follows a batch
            opens these. A layer or a kernel, which sees numbers alone, is none.
    """

    def __init__(self, root: Path, first: CodeType, last: CodeType, name_of: Callable[[FrameType], str]):
        self.folder, self.name_of = f"{root / PACKAGE}{os.sep}", name_of
        self.first, self.last = first, last
        self.files: dict[str, None] = {}
        self.hops: dict[tuple[str, str, str], None] = {}
        self.holders: dict[str, None] = {}
        self.recording = self.done = False

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if self.done or event not in ("call", "return"):
            return
        code = frame.f_code
        self.recording |= code is self.first
        self.done = self.recording and event == "return" and code is self.last

        file = self._file(frame)
        if self.recording and file:
            given = frame.f_locals.values() if event == "call" else [argument]
            if any(map(_is_batch, given)):
                self.holders.setdefault(file)
        if self.recording and event == "call" and file:
            caller = self._caller(frame)
            self.files.setdefault(file)
            if caller != file:
                self.hops.setdefault((caller, file, self.name_of(frame)))

    def _file(self, frame: FrameType) -> str:
        """A path in the package; empty for a frame of torch or transformers."""
        name = frame.f_code.co_filename
        return name.removeprefix(self.folder) if name.startswith(self.folder) else ""

    def _caller(self, frame: FrameType) -> str:
        """The nearest file of the package that a call comes from, maybe by way of torch. `Trainer` where the batch has
        not been yet: what started the run is not on its way."""
        outer = frame.f_back
        while outer is not None and not self._file(outer):
            outer = outer.f_back
        file = "" if outer is None else self._file(outer)
        return file if file in self.files else "Trainer"


def _is_batch(value: object) -> bool:
    """Return whether a value is a batch, or what it has become as a whole."""
    if isinstance(value, dict):
        return "input_ids" in value
    return type(value).__name__ in CARRIERS


def way_of_a_batch(root: Path) -> Recorder:
    """Run one step of training on the CPU and follow its batch.

    Raises:
        RuntimeError: if the trainer came to its loss by another way than by the collator and `compute_loss`.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path[:0] = [str(root), str(root / "tests")]
    from datasets import Dataset
    from tiny import random_chats, tiny_pair

    from hf_eagle import EagleTrainer, EagleTrainingArguments
    from hf_eagle.training.stalls import name_of

    target, draft = tiny_pair()
    with tempfile.TemporaryDirectory() as folder:
        # neither a second batch nor anything that is written may fall between collator and loss
        args = EagleTrainingArguments(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=2,
            ttt_steps=2,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        data = Dataset.from_list(random_chats(2))
        trainer = EagleTrainer(model=draft, args=args, target=target, train_dataset=data)

        collate, loss = type(trainer.data_collator).__call__, EagleTrainer.compute_loss
        recorder = Recorder(root, collate.__code__, loss.__code__, name_of)
        sys.setprofile(recorder)
        try:
            trainer.train()
        finally:
            sys.setprofile(None)

    if not recorder.done:
        raise RuntimeError("No loss was seen behind a collator: `Trainer` calls others now, see `house/batch.py`.")
    return recorder
