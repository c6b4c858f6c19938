"""Train tiny drafts one after the other, and evaluate them on data of all sizes; alone or on several gloo ranks.

    order_worker.py SPEC.json    {"out": DIR, "runs": [{"name": NAME, "records": 13, "args": {...}, ...}, ...],
                                  "sizes": [1, 2, ...], "eval_batch": 2, "fsdp2": false, "broken": [1, ...]}

A run may also have `method` (`"eagle1"`, `"dflash"`), `packed`, `stream` (`"rows"`, or `"chats"` that are tokenised on
the way, of which some have no answer), `empty` (places of rows without a token), `resume` (a run's name and a step) and
`stop_at`.
Leaves in `out`:

* of each run the trainer's `NAME/run`, `NAME/log.json` and, of each rank, `NAME/seen_RANK.json`: of each batch, the
  optimizer step and the token ids of the rows that counted;
* `evaluations.json`: of each kind of draft and each size, the sums over all ranks;
* `broken_RANK.json`: of each rank in `broken`, what this rank says when that one's features break in an evaluation, and
  the loss of the next evaluation.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback


torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from checked_collectives import check_collectives  # noqa: E402
from datasets import Dataset  # noqa: E402
from tiny import random_chats, tiny_eagle1_pair, tiny_llama, tiny_pair  # noqa: E402
from tiny_blocks import tiny_block_pair  # noqa: E402
from tiny_tokenizer import CHATML, assistant, tiny_tokenizer, user  # noqa: E402

from hf_eagle import EagleConfig, EagleTrainer, EagleTrainingArguments, pack_dataset  # noqa: E402
from hf_eagle.arguments.groups import DataArguments  # noqa: E402
from hf_eagle.drafts.build import new_draft  # noqa: E402
from hf_eagle.targets.target import FrozenTarget  # noqa: E402
from hf_eagle.training.distributed import leave  # noqa: E402
from hf_eagle.training.parts import conversations  # noqa: E402


PAIRS = {"eagle3": lambda: tiny_pair(40), "eagle1": tiny_eagle1_pair, "dflash": tiny_block_pair}


class StopAt(TrainerCallback):
    """As a job whose time is over: the schedule stays that of the whole run."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


class SeeingTrainer(EagleTrainer):
    """Notes which rows counted."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["loss_mask"], strict=True)
            ids = [ids[real].tolist() for ids, real, answers in rows if answers.any()]
            self.seen.append([self.state.global_step, ids])
        return super().compute_loss(model, inputs, *args, **kwargs)


def arguments(folder: Path, fsdp2: bool, **fields) -> EagleTrainingArguments:
    fields |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    fields |= {"fsdp": True, "fsdp_config": {}} if fsdp2 else {}
    args = EagleTrainingArguments(str(folder), **fields)
    args.device  # noqa: B018  the processes meet
    if fsdp2:  # on a CPU accelerate takes DDP in its place
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def pair_of(spec: dict):
    """Target and draft of a run."""
    if spec.get("stream") != "chats":
        return PAIRS[spec.get("method", "eagle3")]()
    target = FrozenTarget(tiny_llama(vocab_size=len(tiny_tokenizer(CHATML))))
    config = EagleConfig.from_target(target.config, None, initializer_range=0.2)
    target.tap_ids = config.tap_ids
    torch.manual_seed(1)
    return target, new_draft(config, target.embedding_weight(), None)


def data_of(spec: dict, args: EagleTrainingArguments, folder: Path):
    """What a run is trained on; all runs of a kind on the same."""
    if spec.get("stream") == "chats":
        path = folder / "chats.jsonl"
        with args.main_process_first():
            if args.process_index == 0:
                chats = ([user(f"Say {n}"), assistant(f"It is {n}.")] for n in range(spec["records"]))
                # the fourth and the ninth have no answer
                lines = (json.dumps({"messages": chat[: 1 if n in (3, 8) else 2]}) for n, chat in enumerate(chats))
                path.write_text("\n".join(lines) + "\n")
        told = DataArguments(train_data=[str(path)], streaming=True, max_length=64)
        return conversations(tiny_tokenizer(CHATML), told, args)[0]

    chats = random_chats(spec["records"], seed=4)
    for place in spec.get("empty", ()):
        chats[place] = {"input_ids": [], "loss_mask": []}
    data = Dataset.from_list(chats)
    data = pack_dataset(data, 48) if spec.get("packed") else data
    return data.to_iterable_dataset(3).shuffle(seed=2, buffer_size=5) if spec.get("stream") else data


def train(spec: dict, out: Path, fsdp2: bool) -> None:
    folder = out / spec["name"]
    args = arguments(folder / "run", fsdp2, logging_steps=1, **spec["args"])

    target, draft = pair_of(spec)
    data = data_of(spec, args, folder)
    resume = None
    if "resume" in spec:
        name, step = spec["resume"]
        resume = folder / "run" / f"checkpoint-{step}"
        with args.main_process_first():
            if args.process_index == 0:
                shutil.copytree(out / name / "run" / resume.name, resume)

    trainer = SeeingTrainer(model=draft, args=args, target=target, train_dataset=data)
    if "stop_at" in spec:
        trainer.add_callback(StopAt(spec["stop_at"]))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    (folder / f"seen_{args.process_index}.json").write_text(json.dumps(trainer.seen))
    if trainer.is_world_process_zero():
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


def evaluations(method: str, sizes: list[int], batch: int, out: Path, fsdp2: bool) -> dict:
    """Of each number of held-out rows: the sums over all ranks, and what is reported."""
    args = arguments(out / "evaluations", fsdp2, per_device_eval_batch_size=batch)
    target, draft = PAIRS[method]()
    data = Dataset.from_list(random_chats(max(sizes), seed=9))
    trainer = EagleTrainer(model=draft, args=args, target=target, train_dataset=data)

    found = {}
    for size in sizes:
        metrics = trainer.evaluate(data.select(range(size)))
        sums = trainer._eval_totals.sums
        sums = {name: trainer.accelerator.reduce(x.clone(), reduction="sum").tolist() for name, x in sums.items()}
        found[size] = {**sums, "reported": metrics["eval_loss"]}
    return found


def broken_evaluations(ranks: list[int], out: Path, fsdp2: bool) -> list:
    args = arguments(out / "broken", fsdp2, per_device_eval_batch_size=1)
    target, draft = PAIRS["eagle3"]()
    data = Dataset.from_list(random_chats(5, seed=9))
    trainer = EagleTrainer(model=draft, args=args, target=target, train_dataset=data, eval_dataset=data)
    found, look = [], trainer.step.target_features

    def look_and_break(batch, plan):
        seen = look(batch, plan)
        seen.taps.fill_(float("nan"))
        return seen

    for rank in ranks:
        trainer.step.target_features = look_and_break if args.process_index == rank else look
        try:
            trainer.evaluate()
            said = None
        except FloatingPointError as problem:
            said = str(problem)
        trainer.step.target_features = look
        found.append([said, trainer.evaluate()["eval_loss"]])
    return found


def main():
    check_collectives()
    spec = json.loads(Path(sys.argv[1]).read_text())
    out, fsdp2 = Path(spec["out"]), spec.get("fsdp2", False)
    for run in spec.get("runs", []):
        train(run, out, fsdp2)
    if "sizes" in spec:
        found = {method: evaluations(method, spec["sizes"], spec["eval_batch"], out, fsdp2) for method in PAIRS}
        (out / "evaluations.json").write_text(json.dumps(found))
    if "broken" in spec:
        found = broken_evaluations(spec["broken"], out, fsdp2)
        (out / f"broken_{PartialState().process_index}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
