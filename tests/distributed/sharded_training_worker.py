"""Trainings one after the other, in one launch; started by `test_sharded_training.py`, alone or under torchrun.

    sharded_training_worker.py SPEC.json    {"draft": "ddp" or "fsdp2", "runs": [{"out": DIR, "target": FOLDER,
                                             "sharding": "none", "records": 20, "args": {...}, ...}, ...]}

Leaves in each run's `out`: `log.json`, `acceptance.json` where asked for, and the trainer's own `output_dir`.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback


torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from checked_collectives import check_collectives  # noqa: E402
from datasets import Dataset  # noqa: E402
from tiny import VOCAB, random_chats, tiny_mapping  # noqa: E402
from tiny_blocks import tiny_block_pair  # noqa: E402
from tiny_tokenizer import word_tokenizer  # noqa: E402

from hf_eagle import EagleTrainer, EagleTrainingArguments, FrozenTarget  # noqa: E402
from hf_eagle.drafts.build import new_draft  # noqa: E402
from hf_eagle.drafts.eagle1.configuration import Eagle1Config  # noqa: E402
from hf_eagle.drafts.eagle3.configuration import EagleConfig  # noqa: E402
from hf_eagle.drafts.vocabulary import VocabularyMapping  # noqa: E402
from hf_eagle.evaluation.prompts import Prompt  # noqa: E402
from hf_eagle.training.acceptance import AcceptanceLengthCallback  # noqa: E402
from hf_eagle.training.distributed import leave  # noqa: E402


ARGS = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}


class StopAt(TrainerCallback):
    """As a job whose time is over: the schedule stays that of the whole run."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def tiny_run(spec):
    """A random draft for a tiny target, and random chats."""
    target = FrozenTarget.from_pretrained(
        spec["target"], sharding=spec.get("sharding", "none"), shard_size=spec.get("shard_size")
    )
    torch.manual_seed(1)
    if spec.get("method") == "dflash":
        target, draft = tiny_block_pair(target, **spec["options"])
    elif spec.get("method") == "eagle1":
        config = Eagle1Config.from_target(target.config, initializer_range=0.2)
        draft = new_draft(config, target.embedding_weight(), head_weight=target.head_weight())
    else:
        config = EagleConfig.from_target(target.config, spec.get("draft_vocab_size", 40), initializer_range=0.02)
        draft = new_draft(config, target.embedding_weight(), tiny_mapping(40), target.head_weight())
    records = random_chats(spec["records"], seed=0)
    for record in records[: spec.get("unsupervised", 0)]:
        record["loss_mask"] = [0] * len(record["loss_mask"])
    return target, draft, records


def smollm2_run(spec):
    """A draft for SmolLM2 and real text, short."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec["smollm2"])
    chats = []
    for line in Path(spec["text"]).read_text().splitlines()[: spec["records"]]:
        ids = tokenizer(json.loads(line)["messages"][0]["content"])["input_ids"][:40]
        chats.append({"input_ids": ids, "loss_mask": [0] * 4 + [1] * (len(ids) - 4)})
    target = FrozenTarget.from_pretrained(spec["smollm2"], dtype=torch.float32, sharding=spec.get("sharding", "none"))
    config = EagleConfig.from_target(target.config, 512)
    torch.manual_seed(1)
    mapping = VocabularyMapping.from_token_ids(torch.arange(0, 512 * 90, 90), config.vocab_size)
    return target, new_draft(config, target.embedding_weight(), mapping), chats


def train(spec: dict, kind: str) -> None:
    out = Path(spec["out"])
    fsdp = {"fsdp": True, "fsdp_config": spec.get("fsdp_config", {})} if kind == "fsdp2" else {}
    args = EagleTrainingArguments(output_dir=str(out / "run"), **{**ARGS, **fsdp, **spec["args"]})
    args.device  # noqa: B018  the processes meet
    if kind == "fsdp2":  # on a CPU accelerate takes DDP in its place
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    target, draft, records = (smollm2_run if "smollm2" in spec else tiny_run)(spec)
    held_out = Dataset.from_list(random_chats(5, seed=9)) if spec.get("evaluate") else None
    trainer = EagleTrainer(
        model=draft, args=args, target=target, train_dataset=Dataset.from_list(records), eval_dataset=held_out
    )
    if "stop_at" in spec:
        trainer.add_callback(StopAt(spec["stop_at"]))
    result = {}
    if "prompts" in spec:
        prompts = [f"w{10 + i} w{20 + i} w{30 + 2 * i}" for i in range(spec["prompts"])]
        prompts = [Prompt([{"role": "user", "content": text}], None, i) for i, text in enumerate(prompts)]
        sizes = {"max_new_tokens": spec.get("max_new_tokens", 12), "batch_size": 2}
        acceptance = AcceptanceLengthCallback(trainer, word_tokenizer(VOCAB, 2), prompts, every_steps=3, **sizes)
        trainer.add_callback(acceptance)
    if held_out is not None:
        result["before"] = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=spec.get("resume"))
    if spec.get("save"):
        trainer.save_model()
    if dist.is_initialized() and kind == "ddp":
        bits = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in draft.parameters())).hexdigest()
        everybody = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, bits)
        assert len(set(everybody)) == 1, "the replicas have drifted apart"
    if trainer.is_world_process_zero():
        (out / "log.json").write_text(json.dumps(trainer.state.log_history))
        (out / "result.json").write_text(json.dumps(result))


def main():
    check_collectives()
    spec = json.loads(Path(sys.argv[1]).read_text())
    for run in spec["runs"]:
        if os.environ.get("RANK", "0") == "0":
            Path(run["out"]).mkdir(parents=True, exist_ok=True)
        train(run, spec["draft"])
    leave()


if __name__ == "__main__":
    main()
