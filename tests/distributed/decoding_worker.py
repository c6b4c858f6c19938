"""Decode with a target that is spread over ranks whose last bits differ; started by `test_sharded_decoding.py`.

    torchrun --nproc-per-node 2 decoding_worker.py SPEC.json    {"out": DIR, "model": DIR, "modes": ["fsdp2", ...]}

Leaves `results.json` in `out`: of each mode and each way to decode, the answers of one process, of every rank, and of
every rank when the second one's target rounds in another way; and of each mode how drawing without a generator ended.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist


torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from checked_collectives import check_collectives  # noqa: E402
from tiny import tiny_mapping  # noqa: E402

from hf_eagle import FrozenTarget  # noqa: E402
from hf_eagle.decoding import speculative_generate, target_generate  # noqa: E402
from hf_eagle.drafts.build import new_draft  # noqa: E402
from hf_eagle.drafts.eagle3.configuration import EagleConfig  # noqa: E402
from hf_eagle.training.distributed import leave  # noqa: E402


PROMPTS = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]])
DRAWN = {"temperature": 0.8, "top_p": 0.9}
WAYS = {
    "alone": lambda target, draft, **how: target_generate(target, PROMPTS, **how),
    "chain": lambda target, draft, **how: speculative_generate(target, draft, PROMPTS, **how).answers,
    "tree": lambda target, draft, **how: (
        speculative_generate(target, draft, PROMPTS, method="tree", depth=3, top_k=2, total_tokens=8, **how).answers
    ),
}


def draft_for(target):
    torch.manual_seed(1)
    config = EagleConfig.from_target(target.config, 40, initializer_range=0.2)
    target.tap_ids = config.tap_ids
    return new_draft(config, target.embedding_weight(), tiny_mapping(40)).eval()


def decode(target, draft) -> dict:
    """The answers in every way, greedy and drawn."""
    answers = {}
    for way, generate in WAYS.items():
        answers[way] = generate(target, draft, max_new_tokens=10)
        drawn = DRAWN | {"generator": torch.Generator().manual_seed(5)}
        answers[f"{way}, drawn"] = generate(target, draft, max_new_tokens=10, **drawn)
    return answers


def refused(target, draft) -> list[str]:
    """What is said where no generator was given."""
    said = []
    for way, generate in WAYS.items():
        try:
            generate(target, draft, max_new_tokens=10, **DRAWN)
        except ValueError as problem:
            said.append(f"{way}: {problem}")
    return said


def say_something_else(target) -> None:
    """Far more than a rounding, so that no luck is needed."""
    forward, features = target.model.forward, target.features

    def other_logits(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.roll(1, dims=-1)
        return output

    def other_features(**inputs):
        seen = features(**inputs)
        seen.last_hidden, seen.taps = -seen.last_hidden, -seen.taps
        return seen

    target.model.forward, target.features = other_logits, other_features


def main():
    check_collectives()
    spec = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    results, ranks = {}, [None] * dist.get_world_size()
    whole = FrozenTarget.from_pretrained(spec["model"])
    wanted = decode(whole, draft_for(whole))
    for mode in spec["modes"]:
        target = FrozenTarget.from_pretrained(spec["model"], sharding=mode)
        draft = draft_for(target)
        found = {"as loaded": decode(target, draft)}
        torch.manual_seed(dist.get_rank())
        found["refused"] = refused(target, draft)

        if dist.get_rank() == 1:
            say_something_else(target)
        found["rounded in two ways"] = decode(target, draft)
        dist.all_gather_object(ranks, found)
        results[mode] = list(ranks)
    if dist.get_rank() == 0:
        (Path(spec["out"]) / "results.json").write_text(json.dumps({"alone": wanted, "ranks": results}))
    leave()


if __name__ == "__main__":
    main()
