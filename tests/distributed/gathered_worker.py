"""What a rank holds in a step of a draft under FSDP2, beside what the dry run says; started by a test, on gloo ranks.

    gathered_worker.py SPEC.json    {"out": DIR, "lengths": [16, 768]}

Leaves `found.json` in `out`: for each length what was said and seen, in bytes, in the forward and in the backward pass.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist


torch.set_num_threads(1)
sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "benchmark")]

from test_activation_memory import LLAMA, LiveBytes, costs_of, shapes_of_step  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

from hf_eagle.benchmark.dry_run import gathered_by_step, shared_by_step  # noqa: E402
from hf_eagle.benchmark.workload import Step, build_draft, chat_batch  # noqa: E402
from hf_eagle.training.distributed import leave  # noqa: E402


def measured(length: int) -> list[dict]:
    torch.manual_seed(0)
    device = torch.device("cpu")
    draft = build_draft(LLAMA, device)
    whole = sum(p.numel() for p in draft.parameters())
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    head = draft.lm_head.weight.numel()

    step = Step(draft, None, 4, None)
    batch = chat_batch(LLAMA, 1, length, 1.0, 1, device)
    step.run_target(batch)
    features, teacher = step.target.features, step.target.teacher
    fully_shard(draft, mesh=dist.init_device_mesh("cpu", (2,)))

    own = [p.to_local() for p in draft.parameters()]
    with LiveBytes([*own, *draft.buffers(), features.taps, teacher.probs, teacher.argmax]) as seen:
        loss = step.forward(batch)
        forward, seen.peak = seen.peak, seen.live
        loss.backward()

    shapes, costs = replace(shapes_of_step(4, 1.0, None, False), length=length), costs_of(draft)
    unroll = costs.kept_by_unroll(shapes) + costs.beside_unroll(shapes) + sum(h.bytes for h in gathered_by_step(whole))
    # a rank's own gradient is kept, and so no part of a step
    sharing = sum(h.bytes for h in shared_by_step(whole, trained, head)) + 4 * trained // 2
    said, found = max(unroll, sharing), max(forward, seen.peak)
    parts = {"unroll": [unroll, forward], "sharing": [sharing, seen.peak]}
    return {"length": length, "said": said, "seen": found, **parts}


def main():
    spec = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    found = [measured(length) for length in spec["lengths"]]
    if dist.get_rank() == 0:
        (Path(spec["out"]) / "found.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
