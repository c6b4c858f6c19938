"""Compare sharded targets with whole ones, all families and modes in one launch; started by `test_sharding.py`.

    torchrun --nproc-per-node 2 sharding_worker.py SPEC.json   {"out": DIR, "models": DIR, "large": DIR or null,
                                                         "cases": [[family, sharding, shard_size], ...]}

Leaves `results.json` in `out`: of each case the largest deviation over the ranks, and what a rank held.
"""

import ctypes
import gc
import json
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist


torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from checked_collectives import check_collectives  # noqa: E402
from tiny import VOCAB, pad_batch, random_chats, tiny_mapping  # noqa: E402

from hf_eagle import EagleTrainer, EagleTrainingArguments, FrozenTarget  # noqa: E402
from hf_eagle.drafts.build import new_draft  # noqa: E402
from hf_eagle.drafts.eagle3.configuration import EagleConfig  # noqa: E402
from hf_eagle.targets.sharding import local_bytes  # noqa: E402
from hf_eagle.training.distributed import leave  # noqa: E402


TAPS = [1, 3, 5]


def draft_of(target: FrozenTarget):
    fields = {"initializer_range": 0.2, "hidden_act": "silu"}
    config = EagleConfig.from_target(target.config, 40, TAPS, **fields)
    torch.manual_seed(1)
    return new_draft(config, target.embedding_weight(), tiny_mapping(40))


def batches(rank: int) -> list[dict[str, torch.Tensor]]:
    """Of another length on each rank; padded on some of them only; without an answer on the first rank."""
    whole = [chat for chat in random_chats(40, seed=10 + rank) if len(chat["input_ids"]) == 12 + rank]
    padded = random_chats(3 + rank % 2, seed=20 + rank)
    if rank == 0:
        for chat in padded:
            chat["loss_mask"] = [0] * len(chat["loss_mask"])
    packed = pad_batch(random_chats(1, seed=30 + rank))
    places = torch.arange(packed["input_ids"].shape[1])[None]
    packed |= {"documents": places // 5, "position_ids": places % 5}
    return [pad_batch(whole[:1] or random_chats(1, seed=rank)), pad_batch(padded), packed]


def deviation(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)) if wanted.numel() else 0.0


def unroll(target: FrozenTarget, draft, args, batch) -> dict[str, torch.Tensor]:
    """Features, loss and gradients of one batch, as the trainer gets them."""
    trainer = EagleTrainer(model=draft, args=args, target=target)
    draft.train().zero_grad()
    loss = trainer.compute_loss(draft, batch, num_items_in_batch=torch.tensor([50, 40, 30]))
    loss.backward()
    seen = target(**{name: x for name, x in batch.items() if name != "loss_mask"})
    kept = batch["attention_mask"].bool()
    gradient = torch.cat([p.grad.flatten() for p in draft.parameters() if p.requires_grad])
    return {
        "loss": loss.detach(),
        "taps": seen.taps[kept],
        "last_hidden": seen.last_hidden[kept],
        "gradient": gradient,
    }


def compare(folder: str, sharding: str, size: int | None, args) -> dict:
    whole = FrozenTarget.from_pretrained(folder)
    target = FrozenTarget.from_pretrained(folder, sharding=sharding, shard_size=size)
    off = {"embeddings": deviation(target.embedding_weight(), whole.embedding_weight())}
    for batch in batches(dist.get_rank()):
        wanted, found = (unroll(t, draft_of(t), args, batch) for t in (whole, target))
        assert wanted.keys() == found.keys()
        for name, x in wanted.items():
            off[name] = max(off.get(name, 0.0), deviation(found[name], x))
    by_output = FrozenTarget(target.model, TAPS, tap_method="output_hidden_states")
    ids = batches(dist.get_rank())[0]["input_ids"]
    off["hooks"] = deviation(by_output(ids).taps, target(ids).taps)
    return {**off, "held": local_bytes(target.model), "whole": local_bytes(whole.model)}


class PeakMemory(threading.Thread):
    """The most memory of this process while it runs, above that at the start, without pages of files that are read."""

    def __enter__(self):
        self.start_bytes, self.peak, self.going = self._now(), 0, True
        self.start()
        return self

    def run(self):
        while self.going:
            self.peak = max(self.peak, self._now() - self.start_bytes)
            threading.Event().wait(0.002)

    def __exit__(self, *problem):
        self.going = False
        self.join()

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])


def load_large(folder: str) -> dict:
    """What loading and a forward take, sharded and whole; in another dtype, or the file itself would be mapped."""
    # M_MMAP_THRESHOLD: glibc would keep what is freed, and nothing could be weighed
    assert ctypes.CDLL(None).mallopt(-3, 65536)
    result = {}
    for sharding in ("fsdp2", "none"):
        with PeakMemory() as memory:
            target = FrozenTarget.from_pretrained(folder, dtype=torch.float32, sharding=sharding)
            target(torch.ones(1, 4, dtype=torch.long))
        result[sharding] = {"peak": memory.peak, "held": local_bytes(target.model)}
        del target
        gc.collect()  # what is left of it would be taken off the next one's
    return result


def main():
    check_collectives()
    spec = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    ranks = [None] * dist.get_world_size()
    args = EagleTrainingArguments(output_dir=spec["out"], report_to="none", use_cpu=True, ttt_steps=3)
    assert all(int(b["input_ids"].max()) < VOCAB for b in batches(dist.get_rank()))
    results = {}
    for family, sharding, size in spec["cases"]:
        dist.all_gather_object(ranks, compare(f"{spec['models']}/{family}", sharding, size, args))
        name = f"{family} {sharding} {size or dist.get_world_size()}"
        results[name] = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
    # last, when every library is there
    dist.all_gather_object(ranks, load_large(spec["large"]) if spec.get("large") else None)
    if dist.get_rank() == 0:
        (Path(spec["out"]) / "results.json").write_text(json.dumps({"cases": results, "large": ranks}))
    leave()


if __name__ == "__main__":
    main()
