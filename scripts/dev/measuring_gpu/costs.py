"""Time and memory: of the draft alone, of the whole step, and of what a dry run predicts."""

from collections.abc import Iterator

import torch

from hf_eagle.benchmark import measures
from hf_eagle.benchmark.dry_run import GIB, dry_run
from hf_eagle.benchmark.run import timed_step
from hf_eagle.benchmark.shapes import Shapes, turns_of
from hf_eagle.benchmark.workload import Step, build_draft, chat_batch, random_target
from hf_eagle.drafts.costs_base import RunShapes

from .sizes import Sizes


SHARE = 0.4  # of each turn that is an answer


def batch_of(shapes: Shapes, rows: int, length: int, device: torch.device) -> dict:
    return chat_batch(shapes, rows, length, SHARE, turns_of(None, length), device)


def optimizer_of(draft) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in draft.parameters() if p.requires_grad], lr=1e-5, fused=True)


def draft_alone(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """Forward and backward of drafts on random features."""
    limit = measures.matmul_limit(torch.bfloat16, device)
    yield {"what": "largest matrix product", "tflops": limit / 1e12}

    for name, shapes in sizes.drafts.items():
        draft = build_draft(shapes, device)
        costs = draft.kind.part("costs").costs_of(draft.config)
        for rows, length in sizes.batches:
            step = Step(draft, None, sizes.steps, torch.bfloat16)
            batch = step.planned(batch_of(shapes, rows, length, device))
            step.run_target(batch)

            def forward_and_backward(step=step, batch=batch):
                step.forward(batch).backward()

            def timed(call=forward_and_backward, draft=draft):
                seconds = measures.seconds(call, device)
                draft.zero_grad(set_to_none=True)
                return {"seconds": seconds}

            seconds = measures.alternating_medians({"draft": timed}, sizes.repeats)["draft"]["seconds"]
            added = measures.peak_memory(forward_and_backward, device)
            needed = sum(costs.needed_flops(step.plan).values())
            found = {"draft_ms": 1000 * seconds, "limit_share": needed / seconds / limit, "rows": int(step.counts[0])}
            yield {"what": f"{name} {rows} x {length}", **found, "added_gib": None if added is None else added / GIB}
            draft.zero_grad(set_to_none=True)
        del draft, step


def whole_step(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """A step with a random target. All that it says is in the draft's vocabulary, so no row is left out of the loss."""
    shapes = sizes.target
    draft = build_draft(shapes, device)
    target = random_target(shapes, torch.bfloat16, device, draft.config.tap_ids, says=draft.draft_ids)
    step, optimizer = Step(draft, target, sizes.steps, torch.bfloat16), optimizer_of(draft)

    for rows, length in sizes.target_batches:
        batch = batch_of(shapes, rows, length, device)
        planned = step.planned(batch)
        ways = {
            "step": lambda planned=planned: timed_step(step, planned, optimizer, device),
            "bare": lambda ids=batch["input_ids"]: {"seconds": measures.seconds(lambda: bare(target, ids), device)},
        }
        medians = measures.alternating_medians(ways, sizes.repeats)
        found = {name.replace("_seconds", "_ms"): 1000 * x for name, x in medians["step"].items()}
        over = sum(found.values()) - 1000 * medians["bare"]["seconds"]
        yield {
            "what": f"{rows} x {length}",
            **found,
            "bare_target_ms": 1000 * medians["bare"]["seconds"],
            "over_bare_target_ms": over,
            "in_vocabulary_share": said_share(step, draft, planned),
        }


@torch.no_grad()
def bare(target, input_ids: torch.Tensor) -> None:
    """The target's forward as transformers runs it, without its head."""
    target.model.model(input_ids, use_cache=False)


def said_share(step: Step, draft, batch: dict) -> float:
    """Share of the positions whose most probable token is in the draft's vocabulary."""
    plan = step.training_step.plan(batch)
    seen = step.training_step.target_features(batch, plan)
    hidden = seen.last_hidden.flatten(0, 1)[plan.supervised.positions]
    return step.target.distribution(hidden, draft.draft_ids, torch.bfloat16).in_draft.float().mean().item()


def memory(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """What a dry run predicts, and what the allocator says: held all the time, and added by a step at most."""
    shapes = sizes.target
    draft = build_draft(shapes, device)
    target = random_target(shapes, torch.bfloat16, device, draft.config.tap_ids)
    step, optimizer = Step(draft, target, sizes.steps, torch.bfloat16), optimizer_of(draft)
    memory = {} if device.type == "cpu" else {"memory": measures.room_of(device)}

    for rows, length in sizes.target_batches:
        batch = step.planned(batch_of(shapes, rows, length, device))

        def run(batch=batch):
            step.run_target(batch)
            step.forward(batch).backward()
            optimizer.step()

        run()  # from here on gradients and moments are held
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        added = measures.peak_memory(run, device)

        asked = RunShapes(
            rows=rows,
            length=length,
            ttt_steps=sizes.steps,
            supervised_share=SHARE,
            accelerator=device.type != "cpu",
            **memory,
        )
        predicted = dry_run(target.config, draft.config, asked)
        kept = sum(x.bytes for x in predicted.kept)
        found = {"kept_predicted": kept, "kept": held, "added_predicted": predicted.peak - kept, "added": added}
        yield {"what": f"{rows} x {length}"} | {
            f"{name}_gib": None if x is None else x / GIB for name, x in found.items()
        }
