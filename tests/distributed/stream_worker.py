"""Train a tiny draft on a stream of JSON files; started by tests, as one or several gloo ranks.

    stream_worker.py SPEC.json    {"out": DIR, "files": [PATH, ...], "shuffle": 0, "args": {...}}

Leaves in `out`: `log.json`, and of each rank `seen_RANK.json`: a list for each pass over the data, of the token ids of
the rows with an answer that this rank trained on.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback


torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from datasets import load_dataset  # noqa: E402
from tiny import tiny_pair  # noqa: E402

from hf_eagle import EagleTrainer, EagleTrainingArguments  # noqa: E402
from hf_eagle.training.distributed import leave  # noqa: E402


class Passes(TrainerCallback):
    """What was seen, in a list for each pass."""

    def __init__(self):
        self.seen = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.seen.append([])


class SeeingTrainer(EagleTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["loss_mask"], strict=True)
        self.passes.seen[-1] += [ids[real].tolist() for ids, real, answers in rows if answers.any()]
        return super().compute_loss(model, inputs, *args, **kwargs)


def main():
    spec = json.loads(Path(sys.argv[1]).read_text())
    out = Path(spec["out"])
    target, draft = tiny_pair(40, seed=0)
    stream = load_dataset("json", data_files=spec["files"], split="train", streaming=True)
    if spec["shuffle"]:
        stream = stream.shuffle(seed=0, buffer_size=spec["shuffle"])
    args = EagleTrainingArguments(output_dir=str(out / "run"), report_to="none", disable_tqdm=True, **spec["args"])
    passes = Passes()
    trainer = SeeingTrainer(model=draft, args=args, target=target, train_dataset=stream, callbacks=[passes])
    trainer.passes = passes
    trainer.train()
    (out / f"seen_{args.process_index}.json").write_text(json.dumps(passes.seen))
    if trainer.is_world_process_zero():
        (out / "log.json").write_text(json.dumps(trainer.state.log_history))
    leave()


if __name__ == "__main__":
    main()
