"""Films and pictures shown by transformers' own processors, which need torchvision: ours and theirs as JSON.

    python tests/serving/show_films.py FOLDER

For each tiny target: what `build_vision_dataset` and the collator make of a film's file, with the processor's own
limits and with others, and what the processor makes of all frames of that film when it samples them itself.
"""

import json
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from tiny_films import FRAMES, write_film  # noqa: E402
from tiny_vision import NAMES, TEMPLATE, chat, image, text, tiny_vision_model, vision_tokenizer  # noqa: E402
from transformers import (  # noqa: E402
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.video_utils import VideoMetadata  # noqa: E402

from hf_eagle.data.collators import EagleDataCollator  # noqa: E402
from hf_eagle.data.media import limit_media  # noqa: E402
from hf_eagle.data.vision_dataset import build_vision_dataset  # noqa: E402
from hf_eagle.targets.loading import load_processor  # noqa: E402


SIZES = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 4096},
}
LIMITS = {"own": {}, "given": {"fps": 3.0, "max_frames": 5, "max_pixels": 128}}
FPS = 12  # of the film, whose 24 frames are two seconds


def saved(name: str, folder: Path) -> Path:
    """A target's folder, as the Hub has it."""
    old = name == "qwen2.5-vl"
    kind, videos = (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor) if old else (Qwen3VLProcessor, Qwen3VLVideoProcessor)
    model = tiny_vision_model(name, layers=4)
    model.save_pretrained(folder / name)
    images = Qwen2VLImageProcessor(**SIZES)
    kind(images, vision_tokenizer(), videos(**SIZES), chat_template=TEMPLATE).save_pretrained(folder / name)
    return folder / name


def theirs(processor, messages) -> dict:
    """By one call of the processor, with every frame of the film."""
    shown = messages[0]["content"]
    metadata = VideoMetadata(len(FRAMES), FPS, FRAMES.shape[2], FRAMES.shape[1], 2.0, frames_indices=list(range(24)))
    return dict(
        processor(
            text=[processor.apply_chat_template(messages, tokenize=False)],
            images=[shown[0]["image"]],
            videos=[FRAMES],
            video_metadata=[metadata],
            return_tensors="pt",
        )
    )


def main(folder: Path) -> None:
    path, found = write_film(folder / "film.mkv", fps=FPS), {}
    for name in NAMES:
        target = saved(name, folder)
        model = tiny_vision_model(name, layers=4)
        for limits, given in LIMITS.items():
            processor = load_processor(str(target))
            limit_media(processor, **given)
            messages = chat([image(1, 16, 8), {"type": "video", "video": path}, text("hello")], "the cat")
            data = build_vision_dataset([{"messages": messages}], processor)
            batch = EagleDataCollator.of(processor)(list(data))
            batch.pop("loss_mask")
            wanted = {key: torch.as_tensor(x) for key, x in theirs(processor, messages).items()}
            equal = {key: bool(torch.equal(batch[key], x)) for key, x in wanted.items()}
            with torch.no_grad():
                logits = [model(**given_).logits for given_ in (batch, wanted)]
            found[f"{name}, {limits}"] = {
                "video processor": type(processor.video_processor).__name__,
                "equal": equal,
                "logits": bool(torch.equal(*logits)),
                "grid": batch["video_grid_thw"].tolist(),
                "image grid": batch["image_grid_thw"].tolist(),
            }
    (folder / "shown.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
