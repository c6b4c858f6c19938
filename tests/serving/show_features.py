"""Compare what a server gives of some documents with the target in this process, and print how far they are apart.

python tests/serving/show_features.py --target T --url URL --folder DIR --tap_ids 2 15 27 --documents ids.json
"""

import argparse
import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from hf_eagle import FrozenTarget  # noqa: E402
from hf_eagle.targets.served import ServedTarget  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--tap_ids", type=int, nargs="+", required=True)
    parser.add_argument("--documents", type=Path, required=True, help="JSON list of lists of token ids")
    parser.add_argument("--times", type=int, default=1, help="how often the server is asked, for its cache of prefixes")
    args = parser.parse_args()

    documents = json.loads(args.documents.read_text())
    here = FrozenTarget.from_pretrained(args.target, args.tap_ids, dtype="float32")
    there = ServedTarget.from_server(args.target, [args.url], args.folder, args.tap_ids, dtype="float32")
    wanted = [here(torch.tensor([ids])) for ids in documents]

    for _ in range(args.times):
        length = max(map(len, documents))
        batch = torch.zeros(len(documents), length, dtype=torch.long)
        mask = torch.zeros_like(batch)
        for row, ids in enumerate(documents):
            batch[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
        seen = there(batch, attention_mask=mask)

        packed = torch.tensor([sum(documents, [])])
        lengths = torch.tensor([len(ids) for ids in documents])
        of_tokens = torch.arange(len(documents)).repeat_interleave(lengths)[None]
        in_row = there(packed, documents=of_tokens)

    found = {"taps": 0.0, "last_hidden": 0.0, "packed": 0.0, "logits": 0.0, "tokens": 0, "same_argmax": 0}
    for row, (ids, alone) in enumerate(zip(documents, wanted, strict=True)):
        size, start = len(ids), int(lengths[:row].sum())
        for name in ("taps", "last_hidden"):
            own, got = getattr(alone, name)[0], getattr(seen, name)[row, :size]
            found[name] = max(found[name], apart(got, own))
            found["packed"] = max(found["packed"], apart(getattr(in_row, name)[0, start : start + size], own))
        own, got = here.logits(alone.last_hidden[0]), there.logits(seen.last_hidden[row, :size])
        found["logits"] = max(found["logits"], apart(got, own))
        found["tokens"] += size
        found["same_argmax"] += int((own.argmax(-1) == got.argmax(-1)).sum())

    there.client.close()
    print(json.dumps(found | {"left": len(os.listdir(args.folder))}))


def apart(seen: torch.Tensor, wanted: torch.Tensor) -> float:
    """The distance of the worst token, relative to its length."""
    return float(((seen - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


if __name__ == "__main__":
    main()
