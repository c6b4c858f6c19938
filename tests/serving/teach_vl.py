"""Writes a tiny Qwen3-VL target, a draft that learned its answers to pictures, and what decoding them gives.

    python tests/serving/teach_vl.py --folder F [--rope mrope]

The head is as wide as vLLM's CPU kernel wants it, and no picture needs resizing: by torchvision, which vLLM resizes
with, another pixel would come out than by PIL.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration


sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]

from tiny import unrolled  # noqa: E402
from tiny_vision import MERGE, VIDEO, picture, vision_ids, vision_tokenizer, write_processor  # noqa: E402

from hf_eagle import EagleConfig, FrozenTarget, speculative_generate  # noqa: E402
from hf_eagle.decoding.generate import target_generate  # noqa: E402
from hf_eagle.drafts.build import new_draft  # noqa: E402
from hf_eagle.targets.loading import load_processor  # noqa: E402


TAPS, LONGEST, SECTION = [4, 5, 7], 24, [6, 5, 5]
SIDE = VIDEO["patch_size"] * MERGE
SIZES = ([], [(4, 2)], [(2, 3), (3, 3)], [(5, 4)], [], [(3, 2)])  # of a prompt's pictures, in tokens
WORDS = "hello the cat and two four answer other".split()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rope", default="1d")
    args = parser.parse_args()
    write_target(args.folder / "target")
    target = FrozenTarget.from_pretrained(str(args.folder / "target"), tap_ids=TAPS, dtype=torch.float32)
    processor = load_processor(str(args.folder / "target"))
    prompts = [written(args.folder, number, sizes) for number, sizes in enumerate(SIZES)]
    inputs = [dict(processor(text=[p["text"]], images=shown or None, return_tensors="pt")) for p, shown in prompts]
    draft = teach(target, inputs, args.rope)
    draft.save_pretrained(args.folder / "draft")
    ids = [processor.tokenizer(p["text"])["input_ids"] for p, _ in prompts]
    result = {"prompts": [{**p, "prompt_token_ids": i} for (p, _), i in zip(prompts, ids, strict=True)]}
    text = [one for one in inputs if "pixel_values" not in one]
    for kind, shown in (("all", inputs), ("text", text)):
        result[kind] = {count: measured(target, draft, shown, count) for count in (1, 3)}
    (args.folder / "measured.json").write_text(json.dumps(result))
    records = [chat_of(number, p["images"]) for number, (p, _) in enumerate(prompts)]
    (args.folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_target(folder: Path) -> None:
    """Model and processor, in the files that the Hub has of Qwen3-VL."""
    tokenizer = vision_tokenizer()
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": SECTION, "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 10,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "initializer_range": 0.15,
            "rope_parameters": rope,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": VIDEO["patch_size"],
            "spatial_merge_size": MERGE,
            "temporal_patch_size": VIDEO["temporal_patch_size"],
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
            "initializer_range": 0.2,
        },
        tie_word_embeddings=False,
        **vision_ids(),
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    write_processor(folder, 32 * SIDE**2)


def written(folder: Path, number: int, sizes: list[tuple[int, int]]) -> tuple[dict, list]:
    """A prompt as run_vllm.py takes it, but for its tokens, and its pictures, which become files."""
    shown = [picture(10 * number + n, w * SIDE, h * SIDE) for n, (w, h) in enumerate(sizes)]
    paths = [folder / f"{number}-{n}.png" for n in range(len(shown))]
    for path, one in zip(paths, shown, strict=True):
        one.save(path)
    marks = "<|vision_start|><|image_pad|><|vision_end|>" * len(shown)
    before, behind = said(number)
    text = f"<|im_start|>user\n{before}{marks}{behind}<|im_end|>\n<|im_start|>assistant\n"
    return {"text": text, "images": list(map(str, paths))}, shown


def said(number: int) -> tuple[str, str]:
    """The texts of a prompt, before and behind its pictures."""
    return " ".join(WORDS[(number + n) % len(WORDS)] for n in range(3 + number)), f" {WORDS[number]}"


def chat_of(number: int, images: list[str]) -> dict:
    """The same prompt as a record of a file, with a category."""
    before, behind = ({"type": "text", "text": text} for text in said(number))
    content = [before, *({"type": "image", "image": Path(path).name} for path in images), behind]
    return {"messages": [{"role": "user", "content": content}], "category": f"{len(images)} pictures"}


def teach(target: FrozenTarget, inputs: list[dict], rope: str):
    """A draft that learned a little of the target's answers to the prompts, so that it is right now and then."""
    torch.manual_seed(1)
    config = EagleConfig.from_target(target.model.config, rope=rope, tap_ids=TAPS)
    draft = new_draft(config, target.embedding_weight(), head_weight=target.head_weight())
    optimizer = torch.optim.Adam([p for p in draft.parameters() if p.requires_grad], lr=2e-3)
    answered = [with_answer(target, one) for one in inputs]
    for _ in range(12):
        for one, length in answered:
            seen, ids = target(**one), one["input_ids"]
            rows = torch.arange(length - 1, ids.shape[1] - 3)
            hidden = unrolled(
                draft, ids, seen.taps, rows, 2, position_ids=draft.select_positions(seen, None)
            ).hidden_states
            labels = [ids[0, rows + 2 + step] for step in range(2)]
            losses = [
                torch.nn.functional.cross_entropy(draft.lm_head(h), x) for h, x in zip(hidden, labels, strict=True)
            ]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
    return draft.eval()


def with_answer(target: FrozenTarget, one: dict) -> tuple[dict, int]:
    """A prompt with the target's answer behind it, and the prompt's length."""
    (answer,) = target_generate(target, **one, max_new_tokens=LONGEST)
    more = {"input_ids": answer, "attention_mask": [1] * len(answer), "mm_token_type_ids": [0] * len(answer)}
    longer = {k: torch.cat([x, torch.tensor([more[k]], dtype=x.dtype)], 1) if k in more else x for k, x in one.items()}
    return longer, one["input_ids"].shape[1]


def measured(target: FrozenTarget, draft, inputs: list[dict], count: int) -> dict:
    """Answers and counts, as `evaluate_draft.py` names them."""
    found = {"token_ids": [], "drafts": 0, "accepted_per_position": [0] * count}
    found |= {"num_speculative_tokens": count, "max_new_tokens": LONGEST}
    for one in inputs:
        out = speculative_generate(target, draft, **one, max_new_tokens=LONGEST, num_speculative_tokens=count)
        found["token_ids"] += out.answers
        found["drafts"] += out.drafts[0]
        sums = zip(found["accepted_per_position"], out.accepted_per_position[0], strict=True)
        found["accepted_per_position"] = [a + b for a, b in sums]
    return found | {"accepted_tokens": sum(found["accepted_per_position"])}


if __name__ == "__main__":
    main()
