"""Plant causes of low acceptance in a sound EAGLE-3 draft, and see whether `hf-eagle diagnose` names each first.

    python scripts/dev/plant_causes.py --draft outputs/my-draft --target assets/smollm2-135m-instruct \
        --prompts assets/prompts/mt_bench.jsonl --data answers.jsonl --out outputs/planted

Most causes are planted by editing the draft in memory, so that the target answers once for all of them. `--drafts CAUSE
FOLDER` adds a draft that was trained badly: `--drafts ttt_steps outputs/one-step`. `--answers FILE` are chats whose
answers are not the target's: `answers` must be named of them. The draft itself, and those of `--sound`, are examined
too: nothing may be found in them.

Writes `table.md` and `planted.json` after each case: what was named, what the repair was foretold to give, and what the
sound draft accepts, which is what it gives. Ends with 1 if more than two causes were missed, or if something was found
in a sound draft.
"""

import argparse
import json
import sys
import time
from functools import cache
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("draft", "target", "prompts"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--data", help="The chats that the draft was trained on.")
    parser.add_argument("--answers", help="Chats whose answers are not the target's.")
    parser.add_argument("--sound", nargs="*", default=[], help="More sound drafts.")
    parser.add_argument("--drafts", nargs=2, action="append", default=[], metavar=("CAUSE", "FOLDER"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num_prompts", type=int, default=40)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=512)
    asked = parser.parse_args()

    from planting.faults import FAULTS

    sound, rows = Sound(asked), []
    cases = [("nothing", None, lambda case: None)]
    cases += [(f"nothing ({folder})", None, sound.draft_of(folder)) for folder in asked.sound]
    known = [fault for fault in FAULTS if not fault.needs or getattr(sound, fault.needs) is not None]
    cases += [(fault.name, fault.cause, fault.plant) for fault in known]
    cases += [(f"{cause} ({folder})", cause, sound.draft_of(folder)) for cause, folder in asked.drafts]
    if asked.answers is not None:
        cases.append(("answers of others", "answers", sound.data_of(asked.answers)))

    asked.out.mkdir(parents=True, exist_ok=True)
    for name, cause, plant in cases:
        rows.append(sound.examine(name, cause, plant))
        (asked.out / "planted.json").write_text(json.dumps(rows, indent=1) + "\n")
        (asked.out / "table.md").write_text(table(rows))
    print(table(rows))
    missed = sum(row["cause"] is not None and row["named"] != row["cause"] for row in rows)
    return int(missed > 2 or any(row["cause"] is None and row["named"] for row in rows))


class Sound:
    """A sound draft with its target, prompts and data, of which every case is a changed copy."""

    def __init__(self, asked):
        import torch

        from hf_eagle import FrozenTarget, load_draft
        from hf_eagle.diagnosis.sample import Sample
        from hf_eagle.evaluation.measurement import DecodingSettings
        from hf_eagle.evaluation.prompts import load_prompts
        from hf_eagle.targets.loading import load_tokenizer

        self.asked, self.draft = asked, load_draft(asked.draft, dtype=torch.float32)
        self.target = FrozenTarget.from_pretrained(asked.target, tap_ids=self.draft.config.tap_ids, dtype=torch.float32)
        self.draft.attach(self.target)
        self.tokenizer = load_tokenizer(asked.target)
        self.data = None if asked.data is None else self._read(asked.data)
        settings = DecodingSettings(max_new_tokens=asked.max_new_tokens, batch_size=16).for_draft(self.draft)
        self.sample = Sample(self.target, self.tokenizer, load_prompts(asked.prompts, asked.num_prompts), settings)
        self.length = self.sample.replayed([self.draft])[0].acceptance_length()

    def _read(self, path: str):
        from hf_eagle.data.records import load_records
        from hf_eagle.diagnosis.training_data import TrainingData

        data = TrainingData(load_records(path), self.tokenizer, self.asked.max_length)
        data.share_of_own_answers = cache(data.share_of_own_answers)  # the same in each case
        return data

    def draft_of(self, folder: str):
        """Examine another draft in its place."""

        def plant(case) -> None:
            import torch

            from hf_eagle import load_draft

            case.draft = load_draft(folder, dtype=torch.float32)
            case.draft.attach(self.target)
            self.target.tap_ids = case.draft.config.tap_ids

        return plant

    def data_of(self, path: str):
        """Say that it was trained on other data."""

        def plant(case) -> None:
            case.data, case.only = self._read(path), frozenset({"answers"})

        return plant

    def examine(self, name: str, cause: str | None, plant) -> dict:
        """Plant a fault and look for it; return a row of the table."""
        from hf_eagle.diagnosis.case import Case
        from hf_eagle.diagnosis.diagnose import diagnose
        from hf_eagle.drafts.probe import Probe

        begun, taps = time.perf_counter(), list(self.target.tap_ids)
        case = Case(Probe("", "", lambda draft: None).changed(self.draft), self.sample, data=self.data)
        plant(case)
        found = diagnose(case, confirm=False)
        self.target.tap_ids = taps

        first = found.causes[0] if found.causes else None
        row = {"planted": name, "cause": cause, "named": first and first.cause}
        row |= {"acceptance_length": found.summary["acceptance_length"], "seconds": time.perf_counter() - begun}
        row |= {"foretold": first and first.acceptance_length, "bound": bool(first and first.bound)}
        row |= {"sound": self.length, "causes": [one.as_json() for one in found.causes]}
        print(f"{name}: {row['named']} ({row['seconds']:.0f} s)", flush=True)
        return row


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = ["| planted | named first | acceptance length with it | foretold without it | of the sound draft |"]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        right = row["named"] == row["cause"]
        named = row["named"] or "nothing found"
        foretold = "" if row["foretold"] is None else f"{'at most ' * row['bound']}{row['foretold']:.3f}"
        cells = [row["planted"], named if right else f"**{named}**, not {row['cause'] or 'nothing'}"]
        cells += [f"{row['acceptance_length']:.3f}", foretold, f"{row['sound']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
