"""Trainings that end in all ways, one after the other in one launch; started by tests, alone or on several gloo ranks.

    ends_worker.py SPEC.json    {"draft": "ddp" or "fsdp2", "runs": [{"out": DIR, "records": 8, "args": {...},
                                 "resume": "last", "bare": true, "break": {"what": "gradient", "step": 2, "rank": 1}}]}

Leaves in each run's `out`: `outcome_RANK.json`, and the trainer's own `output_dir`.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback


torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from checked_collectives import check_collectives  # noqa: E402
from datasets import Dataset  # noqa: E402
from tiny import random_chats, tiny_pair  # noqa: E402

from hf_eagle import EagleTrainer, EagleTrainingArguments  # noqa: E402
from hf_eagle.training.distributed import leave  # noqa: E402


class BrokenGradient(torch.autograd.Function):
    """A number, whose gradient is none."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


class BreakingTrainer(EagleTrainer):
    """Breaks one step of one rank."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        loss = loss * float("nan") if self.breaks("loss", self.state.global_step) else loss
        return BrokenGradient.apply(loss) if self.breaks("gradient", self.state.global_step) else loss

    def look_at(self, loss, *args):
        broken = any(self.breaks(what, self.state.global_step) for what in ("loss", "loss alone"))
        super().look_at(loss * float("nan") if broken and self.model.training else loss, *args)

    def breaks(self, what: str, step: int) -> bool:
        told = self.broken
        here = told.get("rank", self.args.process_index) == self.args.process_index
        return told.get("what") == what and here and told["step"] == step


class BreakWeights(TrainerCallback):
    """What an optimizer step may do, though the gradient was fine."""

    def __init__(self, trainer: BreakingTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.breaks("weights", state.global_step):
            draft = self.trainer.accelerator.unwrap_model(self.trainer.model)
            weight = draft.fc.weight.detach()
            (weight.to_local() if hasattr(weight, "to_local") else weight)[-1, -1] = float("inf")


def breaking_trainer(spec: dict, kind: str = "ddp") -> BreakingTrainer:
    """The trainer of one run."""
    out = Path(spec["out"])
    fsdp = {"fsdp": True, "fsdp_config": {}} if kind == "fsdp2" else {}
    fields = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "ttt_steps": 2}
    args = EagleTrainingArguments(**{"output_dir": str(out / "run"), **fields, **fsdp, **spec["args"]})
    args.device  # noqa: B018  the processes meet
    if kind == "fsdp2":  # on a CPU accelerate takes DDP in its place
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    target, draft = tiny_pair(40)
    records = random_chats(spec.get("records", 8), seed=1)
    for record in records if spec.get("bare") else []:
        record["loss_mask"] = [0] * len(record["loss_mask"])
    data = Dataset.from_list(records)
    held_out = None if args.eval_strategy == "no" else data
    trainer = BreakingTrainer(model=draft, args=args, target=target, train_dataset=data, eval_dataset=held_out)
    trainer.broken = spec.get("break", {})
    if spec.get("scaled"):  # as `fp16` on a GPU, whose gradients that are none are overflows
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.add_callback(BreakWeights(trainer))
    return trainer


def run(spec: dict, kind: str) -> None:
    trainer, problem = breaking_trainer(spec, kind), None
    try:
        trainer.train(resume_from_checkpoint=spec.get("resume"))
        trainer.save_model()
    except (ArithmeticError, OSError, ValueError) as error:
        problem = [type(error).__name__, str(error)]
    outcome = {"problem": problem, "step": trainer.state.global_step, "nothing_to_do": trainer.nothing_to_do}
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    path = Path(spec["out"]) / f"outcome_{trainer.args.process_index}.json"
    path.write_text(json.dumps({**outcome, "learning_rates": rates}))
    trainer.accelerator.wait_for_everyone()


def main():
    check_collectives()
    spec = json.loads(Path(sys.argv[1]).read_text())
    for told in spec["runs"]:
        Path(told["out"]).mkdir(parents=True, exist_ok=True)
        run(told, spec["draft"])
    leave()


if __name__ == "__main__":
    main()
