"""Tiny targets that take images and videos, built in code, with a tokenizer, a processor and media for them."""

import json
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_files import save_changed
from tiny_tokenizer import tiny_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
# as Qwen's: contents are texts, or lists of parts
TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}{{- message.content }}{% else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- else %}{{- part.text }}{% endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
PATCH, MERGE, FRAMES = 4, 2, 2
VIDEO = {"temporal_patch_size": FRAMES, "patch_size": PATCH, "merge_size": MERGE}


@lru_cache
def _tokenizer():
    tokenizer = tiny_tokenizer(TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": VISION_TOKENS}, replace_extra_special_tokens=False)
    return tokenizer


def vision_tokenizer():
    """The tiny tokenizer with Qwen's tokens for media; do not change it."""
    return _tokenizer()


def _text(layers: int, **more) -> dict:
    tokenizer = vision_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rms_norm_eps": 1e-6,
        **more,
    }


_QWEN3_ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
_QWEN25_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
_QWEN3_VISION = {
    "depth": 4,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": FRAMES,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
    "initializer_range": 0.3,
}


def vision_ids() -> dict[str, int]:
    """The ids of the tokens for media, as a config names them."""
    tokenizer = vision_tokenizer()
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, tokenizer.convert_tokens_to_ids(VISION_TOKENS), strict=True))


CONFIGS = {
    "qwen3-vl": lambda layers: Qwen3VLConfig(
        text_config=_text(layers, head_dim=16, rope_parameters=dict(_QWEN3_ROPE)),
        vision_config=dict(_QWEN3_VISION),
        **vision_ids(),
    ),
    "qwen3-vl-moe": lambda layers: Qwen3VLMoeConfig(
        text_config=_text(
            layers,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,  # no matrix of an expert is square
            rope_parameters=dict(_QWEN3_ROPE),
        ),
        vision_config=dict(_QWEN3_VISION),
        **vision_ids(),
    ),
    "qwen2.5-vl": lambda layers: Qwen2_5_VLConfig(
        text_config=_text(layers, rope_parameters=dict(_QWEN25_ROPE)),
        vision_config={
            "depth": 2,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "initializer_range": 0.3,
        },
        **vision_ids(),
    ),
}
NAMES = tuple(CONFIGS)


def tiny_vision_model(name: str = "qwen3-vl", layers: int = 10, seed: int = 0, **kwargs):
    """A random model: hidden size 32, images in patches of 4 x 4 pixels, 2 x 2 of which are a token."""
    torch.manual_seed(seed)
    return AutoModelForImageTextToText.from_config(CONFIGS[name](layers), **kwargs).eval()


def save_as_published(model, folder) -> None:
    """As the Hub has it: Qwen3-VL-MoE's experts transposed, which transformers turns round on loading."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {
        name: x.transpose(1, 2).contiguous() if ".experts." in name else x for name, x in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def save_adapter(base, folder, seed: int = 3) -> None:
    """A LoRA adapter on a saved model, which changes what it says; with the tokenizer and the base's processor."""
    from peft import LoraConfig, get_peft_model

    write_processor(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), config)
    save_changed(adapted, folder, seed)


def write_processor(folder, longest_edge: int = 1024) -> None:
    """Tokenizer and processor of Qwen3-VL, in the files that the Hub has."""
    vision_tokenizer().save_pretrained(folder)
    sizes = {**VIDEO, "size": {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": longest_edge}}
    sizes |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": "Qwen3VLProcessor"}
    kinds = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor"},
    }
    for name, kind in kinds.items():
        (folder / name).write_text(json.dumps({**kind, **sizes}))


class PlainVideoProcessor:
    """What a video processor returns, made by plain operations: transformers' own needs torchvision.

    Takes videos as arrays `(frames, height, width, 3)` of an even number of frames and sides that need no resizing.
    """

    merge_size, temporal_patch_size, patch_size = MERGE, FRAMES, PATCH
    fps = 2

    def __call__(self, videos, video_metadata=None, **kwargs):
        patches, grids = zip(*map(video_patches, videos), strict=True)
        metadata = video_metadata or [
            SimpleNamespace(fps=2, sampled_fps=2, frames_indices=list(range(len(video)))) for video in videos
        ]
        grids = torch.tensor(grids)
        return {"pixel_values_videos": torch.cat(patches), "video_grid_thw": grids, "video_metadata": metadata}


class SamplingVideoProcessor(PlainVideoProcessor):
    """Takes frames of a film as Qwen3-VL does: `fps` a second, a least and a most, evenly spread."""

    do_sample_frames, min_frames, max_frames, num_frames = True, 2, 8, None

    def sample_frames(self, metadata):
        wanted = int(metadata.total_num_frames / metadata.fps * self.fps)
        wanted = min(max(wanted, self.min_frames), self.max_frames, metadata.total_num_frames)
        return np.linspace(0, metadata.total_num_frames - 1, wanted).round().astype(int)


def video_patches(video: np.ndarray) -> tuple[torch.Tensor, list[int]]:
    """Patches `(t * h * w, 3 * frames * patch * patch)`, those of a token side by side, and the grid `[t, h, w]`."""
    frames, height, width, _ = video.shape
    grid = [frames // FRAMES, height // PATCH, width // PATCH]
    pixels = torch.as_tensor(video).float().div(127.5).sub(1)
    rows = []
    for t in range(grid[0]):
        for h in range(0, grid[1], MERGE):
            for w in range(0, grid[2], MERGE):
                for y in range(h, h + MERGE):
                    for x in range(w, w + MERGE):
                        block = pixels[t * FRAMES : (t + 1) * FRAMES]
                        block = block[:, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
                        rows.append(block.permute(3, 0, 1, 2).flatten())
    return torch.stack(rows), grid


def vision_processor(name: str = "qwen3-vl", videos=None):
    """The processor, for images by PIL and for videos by [`PlainVideoProcessor`], if no other is given."""
    kind = Qwen2_5_VLProcessor if name == "qwen2.5-vl" else Qwen3VLProcessor
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 1024}, **VIDEO)
    processor = kind.__new__(kind)
    # its own __init__ insists on a video processor of transformers, which torchvision is needed for
    processor.check_argument_for_proper_class = lambda *args: None
    processor.__init__(images, vision_tokenizer(), videos or PlainVideoProcessor(), chat_template=TEMPLATE)
    return processor


def picture(seed: int, width: int = 16, height: int = 8) -> Image.Image:
    """Random pixels; 16 x 8 are 2 tokens."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def film(seed: int, frames: int = 4, width: int = 16, height: int = 8) -> np.ndarray:
    """A random video `(frames, height, width, 3)`."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def image(number: int, width: int = 16, height: int = 16) -> dict:
    """A part of a message: a picture, 2 x 2 tokens large by default."""
    return {"type": "image", "image": picture(number, width, height)}


def video(number: int, frames: int = 4, width: int = 16, height: int = 16) -> dict:
    """A part of a message: a video."""
    return {"type": "video", "video": film(number, frames, width, height)}


def text(said: str) -> dict:
    """A part of a message."""
    return {"type": "text", "text": said}


def chat(*turns) -> list[dict]:
    """Messages of a user and an assistant in turns; each is a text or a list of parts."""
    return [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]


CHATS = [
    chat([image(1), text("hello")], "the cat and the other cat", [text("and"), image(2, 24, 8)], "two and two"),
    chat("how are you today?", "the answer is four."),
    chat([text("see "), video(3), text(" this")], "think; the cat", "what?", "four, the other answer"),
    chat([video(4, frames=6), image(5), image(6, 8, 24), text("now")], "the answer is two and two and four"),
]


def processed(processor, conversations: list[list[dict]], side: str = "right", **template) -> dict[str, torch.Tensor]:
    """What the processor makes of conversations, padded by its tokenizer."""
    texts = [processor.apply_chat_template(messages, tokenize=False, **template) for messages in conversations]
    parts = [p for messages in conversations for m in messages if isinstance(m["content"], list) for p in m["content"]]
    images = [part["image"] for part in parts if part["type"] == "image"]
    videos = [part["video"] for part in parts if part["type"] == "video"]
    return dict(
        processor(
            text=texts,
            images=images or None,
            videos=videos or None,
            return_tensors="pt",
            padding=True,
            padding_side=side,
        )
    )


def write_records(folder, chats: list[list[dict]]) -> list[dict]:
    """Conversations as records of a file: media become files that two of the forms name."""
    records, number = [], 0
    for messages in chats:
        turns = []
        for message in messages:
            content = message["content"]
            if isinstance(content, list):
                content = list(content)
                for n, part in enumerate(content):
                    number += 1
                    if part["type"] == "image":
                        part["image"].save(folder / f"{number}.png")
                        name = str(folder / f"{number}.png")
                        content[n] = (
                            {"type": "image", "image": name} if n else {"type": "image_url", "image_url": {"url": name}}
                        )
                    elif part["type"] == "video":
                        np.save(folder / f"{number}.npy", part["video"])
                        content[n] = {"type": "video", "video": str(folder / f"{number}.npy")}
            turns.append({"role": message["role"], "content": content})
        records.append({"messages": turns})
    return records
