"""Targets on a pretended device, whole and sharded, beside the same on the CPU; for `test_pretended_device.py`.

    torchrun --nproc-per-node 2 pretended_device_worker.py SPEC.json   {"out": DIR, "models": DIR,
                                                                        "cases": [[family, sharding], ...]}

Each rank leaves `results-RANK.json` in `out`: of each case where the target and its weights lie and how far it is
from the other, and which operations the device did.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from pretended_device import NAME, MixedDevices, PretendedTensor, pretend  # noqa: E402
from tiny import pad_batch, random_chats, tiny_mapping  # noqa: E402
from tiny_vision import CHATS, processed, vision_processor  # noqa: E402

from hf_eagle import FrozenTarget  # noqa: E402
from hf_eagle.drafts.vocabulary import draft_token_ids  # noqa: E402
from hf_eagle.training.distributed import leave  # noqa: E402


TAPS = [1, 3, 5]
VISION = ("qwen3-vl", "qwen3-vl-moe")


def batches(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """One with padding, one of packed documents."""
    padded = {name: x for name, x in pad_batch(random_chats(3, seed=seed)).items() if name != "loss_mask"}
    places = torch.arange(padded["input_ids"].shape[1]).expand_as(padded["input_ids"])
    return {"padded": padded, "packed": padded | {"documents": places // 5, "position_ids": places % 5}}


def batches_of(family: str, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """For a target that takes pictures one with pictures, films and padding, instead of packed documents."""
    if family not in VISION:
        return batches(seed)
    chats = [CHATS[(seed + i) % len(CHATS)] for i in range(2)]  # the ranks see different media
    return {"padded": batches(seed)["padded"], "media": processed(vision_processor(family), chats)}


def moved(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.to(NAME) for name, x in inputs.items()}


def deviation(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert isinstance(found, PretendedTensor), f"a result lies on {found.device}"
    found, wanted = found.held.float(), wanted.float()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def features(target: FrozenTarget, whole: FrozenTarget, family: str, seed: int) -> dict[str, float]:
    found = {}
    for name, batch in batches_of(family, seed).items():
        seen, wanted, kept = target(**moved(batch)), whole(**batch), batch["attention_mask"].bool()
        for part in ("taps", "last_hidden"):
            found[f"{name} {part}"] = deviation(getattr(seen, part)[kept.to(NAME)], getattr(wanted, part)[kept])
    return found


def words(target: FrozenTarget, whole: FrozenTarget, seed: int) -> dict[str, float]:
    """What the head makes of the same hidden states: by all of its rows, and by those of a draft's vocabulary."""
    hidden = torch.randn(9, whole.hidden_size, generator=torch.Generator().manual_seed(seed))
    rows = {"hidden": hidden, "draft_ids": draft_token_ids(tiny_mapping(40).d2t)}
    head_summary, known = target.head_summary(hidden.to(NAME), chunk=4), whole.head_summary(hidden)
    found = {
        "top": deviation(head_summary.top, known.top),
        "logits": deviation(target.logits(hidden.to(NAME)), whole.logits(hidden)),
    }
    for name, of_target, of_whole in (("all rows", None, None), ("a draft's rows", head_summary, known)):
        seen = target.distribution(**moved(rows), with_mass=True, chunk=4, head_summary=of_target)
        wanted = whole.distribution(**rows, with_mass=True, head_summary=of_whole)
        for part in ("probs", "argmax", "in_draft", "mass"):
            found[f"{part} by {name}"] = deviation(getattr(seen, part), getattr(wanted, part))
    return found


def done(operation: Callable[[], torch.Tensor]) -> bool:
    """Whether the device does it, `False` where it finds two devices."""
    try:
        operation()
    except MixedDevices:
        return False
    return True


def mixtures() -> dict[str, bool]:
    here, places = torch.arange(4.0), torch.tensor([1, 2])
    there, places_there = here.to(NAME), places.to(NAME)
    operations = {
        "a sum": lambda: there + here,
        "a product": lambda: torch.nn.functional.linear(there, here[None]),
        "places to take": lambda: there.take(places),
        "places in a CPU's tensor": lambda: here[places_there],
        "values put at places": lambda: there.clone().index_put_((places_there,), here[:2]),
        "places": lambda: there[places],
        "a number": lambda: there + here.sum(),
        "a copy": lambda: there.clone().copy_(here),
    }
    return {name: done(operation) for name, operation in operations.items()}


def main():
    spec = json.loads(Path(sys.argv[1]).read_text())
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = "0"  # each rank has one device, as if on a machine of its own
    pretend()
    dist.init_process_group("gloo")

    cases = {}
    for family, sharding in spec["cases"]:
        folder, device = f"{spec['models']}/{family}", NAME if sharding == "none" else None
        whole = FrozenTarget.from_pretrained(folder, TAPS)
        how = {"sharding": "fsdp2", "cpu_offload": True} if sharding == "offloaded" else {"sharding": sharding}
        target = FrozenTarget.from_pretrained(folder, TAPS, device=device, **how)
        places = sorted({weight.device.type for weight in target.model.parameters()})
        mode = "none" if target.sharding is None else target.sharding.mode
        deviations = features(target, whole, family, rank) | words(target, whole, rank)
        found = {"device": str(target.device), "places": places, "mode": mode, "deviations": deviations}
        cases[f"{family} {sharding}"] = found
    found = json.dumps({"cases": cases, "mixtures": mixtures()})
    (Path(spec["out"]) / f"results-{rank}.json").write_text(found)
    leave()


if __name__ == "__main__":
    main()
