"""Train a tiny draft as told by a JSON file; started by tests, alone or under torchrun.

    train_worker.py SPEC.json      {"out": DIR, "records": 8, "tied": false, "kill_at": "...", "method": "eagle1",
                            "peft": {"r": 4, ...}, "args": {...}, "acceptance": {"prompts": 5, "every_steps": 2, ...}}

Leaves in `out`: `gradients.pt` of the first optimiser step, `log.json`, and the trainer's own `output_dir`.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, TrainerCallback


torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from checked_collectives import check_collectives  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from tiny import VOCAB, random_chats, tiny_eagle1_pair, tiny_pair  # noqa: E402
from tiny_tokenizer import word_tokenizer  # noqa: E402

from hf_eagle import EagleTrainer, EagleTrainingArguments  # noqa: E402
from hf_eagle.evaluation.prompts import Prompt  # noqa: E402
from hf_eagle.training.acceptance import AcceptanceLengthCallback  # noqa: E402
from hf_eagle.training.distributed import leave  # noqa: E402


class KeepGradients(TrainerCallback):
    def __init__(self, path):
        self.path = path

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0 and args.process_index == 0:
            named = model.module.named_parameters() if hasattr(model, "module") else model.named_parameters()
            torch.save({name: p.grad.clone() for name, p in named if p.grad is not None}, self.path)


class KillAt(TrainerCallback):
    """SIGKILL after a step, outside of any saving."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing(checkpoint: str, file: str):
    """SIGKILL in the middle of a checkpoint: half of `file` is written."""
    save = torch.save

    def torn(obj, path, *args, **kwargs):
        save(obj, path, *args, **kwargs)
        if checkpoint in str(path) and str(path).endswith(file):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = torn


def add_acceptance(trainer, prompts: int, patience: int | None = None, **arguments):
    """The callback, on so many prompts; early stopping, where asked for, is there first."""
    texts = [f"w{10 + i} w{20 + i} w{30 + 2 * i}" for i in range(prompts)]
    prompts = [Prompt([{"role": "user", "content": text}], None, i) for i, text in enumerate(texts)]
    if patience is not None:
        trainer.add_callback(EarlyStoppingCallback(patience))
    trainer.add_callback(AcceptanceLengthCallback(trainer, word_tokenizer(VOCAB, 2), prompts, **arguments))


def main():
    check_collectives()
    spec = json.loads(Path(sys.argv[1]).read_text())
    out = Path(spec["out"])
    if spec.get("method") == "eagle1":
        target, draft = tiny_eagle1_pair()
    else:
        target, draft = tiny_pair(40, tied=spec.get("tied", False), seed=0)
    args = EagleTrainingArguments(output_dir=str(out / "run"), report_to="none", disable_tqdm=True, **spec["args"])
    callbacks = [KeepGradients(out / "gradients.pt")]
    if "kill_before_step" in spec:
        callbacks.append(KillAt(spec["kill_before_step"]))
    if "kill_while_writing" in spec:
        kill_while_writing(*spec["kill_while_writing"])
    records = random_chats(spec["records"], seed=spec.get("data_seed", 0))
    for i in spec.get("unsupervised", []):
        records[i]["loss_mask"] = [0] * len(records[i]["loss_mask"])
    trainer = EagleTrainer(
        model=draft,
        args=args,
        target=target,
        train_dataset=Dataset.from_list(records),
        eval_dataset=Dataset.from_list(random_chats(4, seed=9)) if args.eval_strategy != "no" else None,
        peft_config=LoraConfig(**spec["peft"]) if "peft" in spec else None,
        callbacks=callbacks,
    )
    if "acceptance" in spec:
        add_acceptance(trainer, **spec["acceptance"])
    trainer.train(resume_from_checkpoint=spec.get("resume"))
    if trainer.is_world_process_zero():
        (out / "log.json").write_text(json.dumps(trainer.state.log_history))
        (out / "best.json").write_text(json.dumps([trainer.state.best_metric, trainer.state.best_global_step]))
    if "acceptance" in spec:
        rank = trainer.args.process_index
        latest = next(c for c in trainer.callback_handler.callbacks if isinstance(c, AcceptanceLengthCallback))
        (out / f"acceptance_{rank}.json").write_text(json.dumps(latest.measure()))
    leave()


if __name__ == "__main__":
    main()
