"""Acceptance on held-out questions: of a draft trained on pictures, and of the same one trained with black ones.

    python tests/measure_easy_vqa.py OUT [--steps 150] [--questions 200] [--ropes 1d mrope]

OUT is what teach_easy_vqa.py left. All drafts learn from the target's own answers to real pictures, and are measured
behind real pictures: two for each way to count positions (`draft_rope`), with the same steps, data and seed. The drafts
are left in OUT, and are not trained again; acceptance lengths, and whether the output is the target's, in
OUT/acceptance.json. It is an error if black pictures are as good.
"""

import argparse
import json
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_eagle import EagleConfig, EagleTrainer, EagleTrainingArguments, FrozenTarget  # noqa: E402
from hf_eagle.data.collators import EagleDataCollator  # noqa: E402
from hf_eagle.data.media import from_text  # noqa: E402
from hf_eagle.data.vision_dataset import build_vision_dataset  # noqa: E402
from hf_eagle.decoding import speculative_generate  # noqa: E402
from hf_eagle.decoding.generate import target_generate  # noqa: E402
from hf_eagle.drafts.build import load_draft, new_draft  # noqa: E402
from hf_eagle.targets.loading import load_processor  # noqa: E402


ENDS = {"max_new_tokens": 30}
ROPES = ("1d", "mrope")


class BlackPictures(EagleDataCollator):
    """The same batches, with every pixel zeroed."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        return batch | {"pixel_values": torch.zeros_like(batch["pixel_values"])}


def questions(path: Path, number: int) -> list[dict]:
    """Of pictures that differ, spread over the file."""
    lines = path.read_text().splitlines()
    return [json.loads(line)["messages"] for line in lines[:: len(lines) // number][:number]]


def prompts(processor, chats: list[list[dict]]) -> dict[str, torch.Tensor]:
    """Left-padded prompts with their pixels."""
    shown = [from_text(json.dumps([m["content"][0]]))["image"][0] for m, *_ in chats]
    texts = [processor.apply_chat_template(m[:1], tokenize=False, add_generation_prompt=True) for m in chats]
    return dict(processor(text=texts, images=shown, return_tensors="pt", padding=True, padding_side="left"))


def load(out: Path):
    """The target and its processor."""
    return FrozenTarget.from_pretrained(str(out / "target")), load_processor(str(out / "target"))


def ends_of(processor) -> dict:
    """Where an answer ends."""
    return {**ENDS, "eos_token_ids": [processor.tokenizer.eos_token_id]}


def answer(target, processor, chats: list[list[dict]]) -> list[list[dict]]:
    """The chats with the target's own answers."""
    answered, ends = [], ends_of(processor)
    for n in range(0, len(chats), 25):
        part = chats[n : n + 25]
        for messages, ids in zip(part, target_generate(target, **prompts(processor, part), **ends), strict=True):
            said = processor.tokenizer.decode(ids, skip_special_tokens=True)
            answered.append([messages[0], {"role": "assistant", "content": said}])
    return answered


def train(target, processor, data, collator, rope: str, out: Path, steps: int):
    torch.manual_seed(0)
    config = EagleConfig.from_target(target.model.config, rope=rope)
    draft = new_draft(config, target.embedding_weight(), head_weight=target.head_weight())
    args = EagleTrainingArguments(
        output_dir=str(out), ttt_steps=3, max_steps=steps, per_device_train_batch_size=16, learning_rate=2e-3,
        logging_steps=50, save_strategy="no", report_to="none", use_cpu=True, overwrite=True, seed=0,
    )  # fmt: skip
    trainer = EagleTrainer(draft, args, target, processor.tokenizer, collator.of(processor), train_dataset=data)
    trainer.train()
    trainer.save_model()
    return draft.eval()


def measure(target, draft, processor, chats: list[list[dict]]) -> dict:
    """1 + accepted tokens a draft, and whether every answer is what the target says alone."""
    drafts, accepted, same, ends = 0, 0, True, ends_of(processor)
    target.tap_ids = draft.config.tap_ids
    for n in range(0, len(chats), 25):
        inputs = prompts(processor, chats[n : n + 25])
        out = speculative_generate(target, draft, **inputs, num_speculative_tokens=3, **ends)
        drafts += sum(out.drafts)
        accepted += sum(map(sum, out.accepted_per_position))
        same &= out.answers == target_generate(target, **inputs, **ends)
    return {"acceptance_length": 1 + accepted / drafts, "identical_to_target": same}


def drafts_of(ropes) -> dict[str, tuple[type, str]]:
    """The collator and the kind of positions that each draft is trained with, by its name."""
    kinds = {"pictures": EagleDataCollator, "black": BlackPictures}
    return {kind + ("" if rope == "1d" else f"-{rope}"): (kinds[kind], rope) for rope in ropes for kind in kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--ropes", nargs="+", choices=ROPES, default=ROPES)
    args = parser.parse_args()
    target, processor = load(args.out)
    drafts = drafts_of(args.ropes)
    missing = [name for name in drafts if not (args.out / f"draft-{name}" / "model.safetensors").exists()]
    if missing:
        taught = answer(target, processor, questions(args.out / "train.jsonl", 600))
        data = build_vision_dataset([{"messages": messages} for messages in taught], processor)
    for name in missing:
        train(target, processor, data, *drafts[name], args.out / f"draft-{name}", args.steps)
    held_out, found = questions(args.out / "test.jsonl", args.questions), {}
    for name in drafts:
        found[name] = measure(target, load_draft(args.out / f"draft-{name}", target), processor, held_out)
    wanted = [m[1]["content"][0]["text"].split() for m in held_out]
    said = [m[1]["content"].split() for m in answer(target, processor, held_out)]
    found["target_says_what_is_there"] = sum(a[:6] == b[:6] for a, b in zip(wanted, said, strict=True)) / len(said)
    (args.out / "acceptance.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    for name in (name for name in drafts if name.startswith("pictures")):
        if found[name]["acceptance_length"] <= found[name.replace("pictures", "black")]["acceptance_length"]:
            raise SystemExit("error: a draft that was trained on black pictures is as good as one that saw them.")


if __name__ == "__main__":
    main()
