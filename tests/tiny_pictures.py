"""Tiny targets that are shown images in other forms than Qwen-VL's, built in code, with tokenizers and processors.

The processors are transformers' own, for images by PIL. What needs torchvision is written here, by plain operations:
videos, Llama 4's tiles, and the processor of Mistral 3.
"""

import numpy as np
import torch
from PIL import Image
from tiny_families import GEMMA, GEMMA3_ROPE
from tiny_new_families import GATED_DELTA, GEMMA4, SHARED_EXPERT
from tiny_tokenizer import tiny_tokenizer
from tiny_vision import (
    _QWEN3_VISION,
    PATCH,
    TEMPLATE,
    _text,
    chat,
    image,
    text,
    tiny_vision_model,
    video,
    vision_ids,
    vision_processor,
)
from tiny_vision import NAMES as VISION
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3Processor,
    Gemma4Config,
    Gemma4Processor,
    InternVLConfig,
    InternVLProcessor,
    Llama4Config,
    Llama4Processor,
    Mistral3Config,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from hf_eagle.data.frames import Film


SIDE, SMALL_PATCH = 8, 2  # of an image, or a tile, where all have one size; in pixels
# by the names that the processors ask for; `image` is what a chat template writes
TOKENS = {
    "gemma3": {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"},
    "gemma4": {
        **{"boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>", "video_token": "<|video|>"},
        **{"boa_token": "<|audio>", "audio_token": "<|audio|>", "eoa_token": "<audio|>"},
    },
    "llama4": {
        **{"start_token": "<|image_start|>", "image_token": "<|image|>", "patch_token": "<|patch|>"},
        **{"x_token": "<|tile_x_separator|>", "y_token": "<|tile_y_separator|>", "end_token": "<|image_end|>"},
    },
    "mistral3": {"image_token": "[IMG]", "break_token": "[IMG_BREAK]", "end_token": "[IMG_END]"},
    "internvl": {
        **{"start_image_token": "<img>", "end_image_token": "</img>"},
        **{"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
    },
}
_PLACES = {"gemma3": "boi_token", "internvl": "context_image_token"}  # else `image_token`
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}
_ROPE |= {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
_TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_TOWER |= {"initializer_range": 0.3}


def pictures_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a family's tokens for media, and a template that writes their places."""
    places = TOKENS[name][_PLACES.get(name, "image_token")]
    template = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", places)
    template = template.replace("<|vision_start|><|video_pad|><|vision_end|>", TOKENS[name].get("video_token", ""))
    plain = tiny_tokenizer(template)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain._tokenizer,
        bos_token=plain.bos_token,
        eos_token=plain.eos_token,
        pad_token=plain.pad_token,
        extra_special_tokens=TOKENS[name],
    )
    tokenizer.chat_template = template
    return tokenizer


def _ids(name: str, **asked: str) -> dict[str, int]:
    """Ids of a family's tokens, by the fields of its config that name them."""
    tokenizer = pictures_tokenizer(name)
    return {field: tokenizer.convert_tokens_to_ids(TOKENS[name][token]) for field, token in asked.items()}


def _sized(name: str, layers: int, **more) -> dict:
    return _text(layers, **{"vocab_size": len(pictures_tokenizer(name)), **more})


def _qwen35(kind: type, layers: int, **more):
    vision = {name: x for name, x in _QWEN3_VISION.items() if name != "deepstack_visual_indexes"}
    text = _text(layers, **GATED_DELTA, rope_parameters=dict(_ROPE), **more)
    return kind(text_config=text, vision_config={**vision, "depth": 2}, **vision_ids())


CONFIGS = {
    "qwen3.5": lambda layers: _qwen35(Qwen3_5Config, layers),
    "qwen3.5-moe": lambda layers: _qwen35(Qwen3_5MoeConfig, layers, **SHARED_EXPERT),
    "gemma3": lambda layers: Gemma3Config(
        text_config=_sized("gemma3", layers, **GEMMA, rope_parameters=GEMMA3_ROPE),
        vision_config={"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": SMALL_PATCH, **_TOWER},
        mm_tokens_per_image=4,
        **_ids("gemma3", boi_token_index="boi_token", image_token_index="image_token", eoi_token_index="eoi_token"),
    ),
    "gemma4": lambda layers: Gemma4Config(
        text_config=_sized(
            "gemma4",
            layers,
            **GEMMA4,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=len(pictures_tokenizer("gemma4")),
            use_bidirectional_attention="vision",
            layer_types=["sliding_attention"] * (layers - 1) + ["full_attention"],
        ),
        vision_config={
            **_TOWER,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "patch_size": PATCH,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        },
        audio_config=None,
        **_ids("gemma4", image_token_id="image_token", video_token_id="video_token", audio_token_id="audio_token"),
    ),
    "llama4": lambda layers: Llama4Config(
        text_config=_sized(
            "llama4", layers, head_dim=8, intermediate_size_mlp=56, num_local_experts=4, attention_chunk_size=6
        ),
        vision_config={
            **_TOWER,
            "intermediate_size": 4 * 24,  # its MLP reads the width that its pixel shuffle makes
            "vision_output_dim": 20,
            "projector_input_dim": 20,
            "projector_output_dim": 20,
            "image_size": SIDE,
            "patch_size": SMALL_PATCH,
        },
        **_ids("llama4", image_token_index="patch_token"),
    ),
    "mistral3": lambda layers: Mistral3Config(
        text_config={"model_type": "mistral", **_sized("mistral3", layers, head_dim=8, sliding_window=None)},
        vision_config={"model_type": "pixtral", "image_size": 64, "patch_size": PATCH, **_TOWER},
        **_ids("mistral3", image_token_index="image_token"),
    ),
    "internvl": lambda layers: InternVLConfig(
        text_config={"model_type": "qwen3", **_sized("internvl", layers, head_dim=16)},
        vision_config={"image_size": SIDE, "patch_size": SMALL_PATCH, **_TOWER},
        image_seq_length=4,
        **_ids("internvl", image_token_id="context_image_token"),
    ),
}
NAMES = tuple(CONFIGS)


def tiny_pictures_model(name: str, layers: int = 8, seed: int = 0, **kwargs):
    """A random model of hidden size 32."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(CONFIGS[name](layers), **kwargs).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("mm_input_projection_weight"):  # of Gemma 3: zeros, which show nothing
            torch.nn.init.normal_(parameter, std=2.0)
    return model


class PlainTiles:
    """Tiles of Llama 4's images, with the whole image behind several: sides of whole tiles are not resized."""

    def fetch_images(self, images):
        return images

    def __call__(self, images, **kwargs):
        tiles, ratios = [], []
        for one in (one for row in images for one in (row if isinstance(row, list) else [row])):
            ratio = (one.height // SIDE, one.width // SIDE)
            for y in range(ratio[0]):
                for x in range(ratio[1]):
                    tiles.append(one.crop((SIDE * x, SIDE * y, SIDE * (x + 1), SIDE * (y + 1))))
            if ratio != (1, 1):
                tiles.append(one.resize((SIDE, SIDE)))
            ratios.append(ratio)
        pixels = np.stack([np.array(tile, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1 for tile in tiles])
        return {"pixel_values": torch.tensor(pixels), "aspect_ratios": ratios}


class PlainPixtralProcessor(ProcessorMixin):
    """As Pixtral's, whose module cannot be imported without torchvision."""

    patch_size, spatial_merge_size = PATCH, 2

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.image_token_id

    @property
    def image_token_ids(self):
        return self.tokenizer.convert_tokens_to_ids(list(TOKENS["mistral3"].values()))

    def _process_images(self, images, **kwargs):
        return super()._process_images(images, **{**kwargs, "patch_size": self.patch_size * self.spatial_merge_size})

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        side = self.patch_size * self.spatial_merge_size
        height, width = (int(x) // side for x in image_inputs["image_sizes"][image_idx])
        row = self.image_token * width
        return (row + "[IMG_BREAK]") * (height - 1) + row + "[IMG_END]"


class PlainFilms:
    """What the video processors of Gemma 4 and InternVL return, made of images: their own need torchvision.

    Args:
        images: the processor of images, which is shown every frame.
    """

    fps = 2

    def __init__(self, images):
        self.images = images

    def __call__(self, videos, video_metadata=None, **kwargs):
        frames = [[Image.fromarray(frame) for frame in film] for film in videos]
        each = [self.images(part, return_tensors="pt") for part in frames]
        pixels, made = [one["pixel_values"] for one in each], {"video_metadata": video_metadata}
        if "image_position_ids" not in each[0]:
            return made | {"pixel_values_videos": torch.stack(pixels)}

        made |= {"pixel_values_videos": torch.cat(pixels), "num_frames_per_video": list(map(len, frames))}
        made["video_position_ids"] = torch.cat([one["image_position_ids"] for one in each])
        return made | {"num_soft_tokens_per_video": [int(one["num_soft_tokens_per_image"][0]) for one in each]}


def _lenient(kind: type, *args, **kwargs):
    """A processor whose parts are not of the classes that transformers insists on."""
    processor = kind.__new__(kind)
    processor.check_argument_for_proper_class = lambda *args: None
    processor.__init__(*args, **kwargs)
    return processor


def pictures_processor(name: str):
    """The processor of a family, for images, and for videos if it takes some."""
    if name.startswith("qwen"):
        return vision_processor("qwen3-vl")

    tokenizer = pictures_tokenizer(name)
    size, normal = {"height": SIDE, "width": SIDE}, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    parts = {"tokenizer": tokenizer, "chat_template": tokenizer.chat_template}
    if name == "gemma3":
        return Gemma3Processor(Gemma3ImageProcessorPil(size=size, **normal), **parts, image_seq_length=4)
    if name == "gemma4":
        images = Gemma4ImageProcessorPil(do_resize=False, patch_size=PATCH, pooling_kernel_size=2, max_soft_tokens=70)
        return _lenient(Gemma4Processor, None, images, video_processor=PlainFilms(images), **parts)
    if name == "llama4":
        return _lenient(Llama4Processor, PlainTiles(), patch_size=SMALL_PATCH, **parts)
    if name == "mistral3":
        return PlainPixtralProcessor(PixtralImageProcessorPil(size={"longest_edge": 64}, **normal), **parts)
    images = GotOcr2ImageProcessorPil(size=size, max_patches=3, **normal)
    return _lenient(InternVLProcessor, images, video_processor=PlainFilms(images), image_seq_length=4, **parts)


FILMS = ("qwen3.5", "gemma4", "internvl")  # families that are shown videos
FILM_CHATS = [
    chat([video(5, 4, 16, 8), image(6, 8, 8), text("see")], "the cat", [image(7, 16, 8)], "two"),
    chat([image(8, 8, 8), video(9, 4, 16, 8), text("now")], "the other cat"),
]
CHATS = [
    chat([image(1, 16, 8), text("hello")], "the cat and the other cat", [text("and"), image(2, 8, 8)], "two and two"),
    chat("how are you today?", "the answer is four."),
    chat([image(3, 24, 16), image(4, 8, 8), text("now")], "the answer is two and two and four"),
]
PROMPTS = [
    chat([image(1, 16, 8), text("hello"), image(2, 8, 8)]),
    chat("how are you?"),
    chat([image(3, 8, 16), text("see")], "the cat", [image(4, 24, 8), text("and")]),
]


def any_model(name: str):
    """The tiny model of a name of this module or of `tiny_vision`."""
    return tiny_vision_model(name) if name in VISION else tiny_pictures_model(name)


def any_processor(name: str):
    """Its processor."""
    return vision_processor(name) if name in VISION else pictures_processor(name)


def pictured(processor, conversations: list[list[dict]], side: str = "right", **template) -> dict[str, torch.Tensor]:
    """What a processor makes of conversations with media, by its own call."""
    texts = [processor.apply_chat_template(messages, tokenize=False, **template) for messages in conversations]
    parts = [[p for m in one if isinstance(m["content"], list) for p in m["content"]] for one in conversations]
    images = [[part["image"] for part in row if "image" in part] for row in parts]
    films = [part["video"] for row in parts for part in row if "video" in part]
    given = {"images": images} if any(images) else {}
    if films:
        given |= {
            "videos": films,
            "video_metadata": [Film(x, list(range(len(x))), len(x), 2.0).metadata() for x in films],
        }
        given["do_sample_frames"] = False
    made = processor(
        text=texts, **given, return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False
    )
    return dict(made)
