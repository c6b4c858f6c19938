"""Train the draft of `tests/outside_kind` as told by a JSON file; started by tests, alone or on several gloo ranks.

    outside_kind_worker.py SPEC.json      {"out": DIR, "args": {...}}

Leaves in `out` what each rank has drawn, and the weights that it ends with.
"""

import json
import sys
from pathlib import Path

import torch


torch.set_num_threads(1)
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "drafts"), str(TESTS / "decoding"), str(TESTS.parent)]

from outside_kind import KIND  # noqa: E402
from test_outside_kind import TAPS, make_records, make_target, make_trainer, weights  # noqa: E402

from hf_eagle.drafts.kinds import register_kind  # noqa: E402
from hf_eagle.training.distributed import leave  # noqa: E402


def main():
    spec = json.loads(Path(sys.argv[1]).read_text())
    out = Path(spec["out"])
    register_kind(KIND)
    target = make_target(tap_ids=TAPS)
    trainer = make_trainer(out / "run", target, make_records(target), **spec["args"])
    trainer.train()
    torch.save((trainer.drawn, weights(trainer)), out / f"rank_{trainer.args.process_index}.pt")
    leave()


if __name__ == "__main__":
    main()
