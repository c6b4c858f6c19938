"""A target that takes images, spread over ranks of which one has images and another none, beside the whole one.

    torchrun --nproc-per-node 2 vision_worker.py SPEC.json  {"out": DIR, "models": DIR,
                                                             "cases": [[name, files, mode], ...]}

A case's model is in the folder `NAME-FILES`. Leaves `results.json` in `out`: of each case, and of each kind of batches,
the largest deviation over the ranks; and of each way to decode, whether all ranks answered as one process does.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist


torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from checked_collectives import check_collectives  # noqa: E402
from tiny_vision import CHATS, processed, vision_processor, write_records  # noqa: E402

from hf_eagle import EagleTrainer, EagleTrainingArguments, FrozenTarget  # noqa: E402
from hf_eagle.data.collators import EagleDataCollator  # noqa: E402
from hf_eagle.data.vision_dataset import build_vision_dataset  # noqa: E402
from hf_eagle.decoding import speculative_generate  # noqa: E402
from hf_eagle.drafts.build import new_draft  # noqa: E402
from hf_eagle.drafts.eagle3.configuration import EagleConfig  # noqa: E402
from hf_eagle.targets.sharding import local_bytes  # noqa: E402
from hf_eagle.training.distributed import leave  # noqa: E402


# which conversations the ranks look at: images here and text there, a video there, the same kind, and the other way
TURNS = {"images, text": ([0], [1]), "text, video": ([1], [2]), "both": ([0, 1], [3, 2]), "neither": ([1], [1, 1])}


# whose questions are decoded: pictures, text behind padding beside a video
PROMPTS, LONGEST = {"picture": [0], "batch": [0, 1, 2]}, 12
WAYS = {"chain": {}, "tree": {"method": "tree", "depth": 3, "top_k": 2, "total_tokens": 8}}


def draft_for(target):
    torch.manual_seed(1)
    config = EagleConfig.from_target(target.model.config, rope="mrope", initializer_range=0.2)
    return new_draft(config, target.embedding_weight())


def unroll(target, args, batch) -> dict[str, torch.Tensor]:
    """Features, loss and gradients of one batch."""
    draft = draft_for(target)
    trainer = EagleTrainer(model=draft, args=args, target=target)
    draft.train()
    loss = trainer.compute_loss(draft, batch, num_items_in_batch=torch.tensor([50, 40, 30]))
    loss.backward()
    seen, kept = target(**{name: x for name, x in batch.items() if name != "loss_mask"}), batch["attention_mask"].bool()
    gradient = torch.cat([p.grad.flatten() for p in draft.parameters() if p.requires_grad])
    return {"loss": loss.detach(), "taps": seen.taps[kept], "gradient": gradient}


def decode(target, processor, rows: list[int], way: dict) -> list:
    """The answers to what these conversations ask first, which all ranks decode together, and what was accepted."""
    draft = draft_for(target).eval()
    target.tap_ids = draft.config.tap_ids
    inputs = processed(processor, [CHATS[row][:1] for row in rows], "left", add_generation_prompt=True)
    output = speculative_generate(target, draft, **inputs, max_new_tokens=LONGEST, **way)
    return [output.answers, output.accepted_per_position]


def main():
    check_collectives()
    spec = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    rank, ranks, results = dist.get_rank(), [None] * dist.get_world_size(), {}
    args = EagleTrainingArguments(output_dir=spec["out"], report_to="none", use_cpu=True, ttt_steps=3)
    media = Path(spec["out"]) / f"media-{rank}"
    media.mkdir()
    records = write_records(media, CHATS)
    for name, files, sharding in spec["cases"]:
        processor = vision_processor(name)
        data = build_vision_dataset(records, processor)
        whole = FrozenTarget.from_pretrained(f"{spec['models']}/{name}-{files}")
        target = FrozenTarget.from_pretrained(f"{spec['models']}/{name}-{files}", sharding=sharding)
        off = {"held": local_bytes(target.model) / local_bytes(whole.model)}
        for turn, rows in TURNS.items():
            batch = EagleDataCollator.of(processor)([data[row] for row in rows[rank]])
            wanted, found = (unroll(t, args, batch) for t in (whole, target))
            for key, x in wanted.items():
                assert x.abs().max() > 0
                off[f"{turn}: {key}"] = float((found[key] - x).abs().max() / x.abs().max())
        # how files lay makes no other model: it is decoded with as it was published
        for prompts, rows in PROMPTS.items() if files == "published" else ():
            for way, arguments in WAYS.items():
                wanted, found = (decode(t, processor, rows, arguments) for t in (whole, target))
                off[f"{prompts}: {way}"] = float(wanted != found)
        dist.all_gather_object(ranks, off)
        results[f"{name} {files} {sharding}"] = {key: max(one[key] for one in ranks) for key in off}
    if rank == 0:
        (Path(spec["out"]) / "results.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
