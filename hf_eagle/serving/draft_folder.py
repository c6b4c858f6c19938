"""A draft folder as a server finds it on disk, its target, and the form of a finding about the two."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from ..door.config_readings import scales_embeddings
from ..door.json_files import read_json
from ..door.reading import reading


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Finding:
    """One thing that keeps a folder from being served as it was trained.

    Attributes:
        reader: who has the problem, such as `vLLM`.
        text: what was seen and its effect on the reader, a whole sentence.
        fix: what to do, an imperative.
        level: `fault`; `limit` for a draft that is as intended, but of a kind that the reader does not serve; `note`
            for what is worth knowing but does not stop serving.
    """

    reader: str
    text: str
    fix: str
    level: Literal["fault", "limit", "note"] = "fault"

    def __str__(self) -> str:
        return f"{self.reader}: {'' if self.level == 'fault' else f'({self.level}) '}{self.text} Fix: {self.fix}."


@dataclass
class DraftFolder:
    """`config.json` and the headers of the safetensors files; values are read on demand.

    Attributes:
        path: the folder.
        config: `config.json` as written, without any reader's defaults.
        shapes, dtypes: of each tensor; dtypes are spelt as in safetensors (`F32`, `BF16`, `I64`, `BOOL`).
        files: the file of each tensor.
    """

    path: Path
    config: dict[str, Any]
    shapes: dict[str, Shape] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> "DraftFolder":
        """Read a folder's config and headers, but no values.

        Raises:
            ValueError: if there is no draft in the folder.
        """
        path = Path(path)
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} holds no config.json, so it is not a draft: name the folder of a draft.")

        folder = cls(path, read_json(path / "config.json", {}))
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{path} holds no *.safetensors file: save the draft with `save_pretrained`.")

        for file in files:
            with reading("draft", path), safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    header = tensors.get_slice(name)
                    folder.shapes[name] = tuple(header.get_shape())
                    folder.dtypes[name] = header.get_dtype()
                    folder.files[name] = file
        return folder

    def tensor(self, name: str) -> torch.Tensor:
        """Read the values of one tensor, onto the CPU."""
        with safe_open(self.files[name], "pt") as tensors:
            return tensors.get_tensor(name)

    @cached_property
    def prefixed(self) -> bool:
        """Return whether all tensors except head and vocabulary are named `model.*`, as in a whole language model."""
        others = [name for name in self.shapes if not name.endswith(("lm_head.weight", "d2t", "t2d"))]
        return bool(others) and all(name.startswith("model.") for name in others)

    def spelt(self, name: str) -> str:
        """Return a name of layer 0 in this folder's spelling, `layers.0.` or `midlayer.`; servers accept both."""
        midlayer = any("midlayer." in known for known in self.shapes)
        return name.replace("layers.0.", "midlayer.") if midlayer else name

    @cached_property
    def num_layers(self) -> int:
        """Number of layers that have tensors; `midlayer` is layer 0."""
        parts = [name.removeprefix("model.").split(".") for name in self.shapes]
        return 1 + max((int(p[1]) for p in parts if p[0] == "layers" and p[1].isdecimal()), default=0)


@dataclass(frozen=True)
class TargetFacts:
    """The properties of a target that a server uses when it runs a draft.

    Attributes:
        window: that of its attention, if all of its layers slide and it is shorter than the context; else `None`.
        scales_embeddings: whether it multiplies the rows of its embedding table.
    """

    model_type: str
    latent: bool
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    rope: dict[str, Any]
    window: int | None = None
    scales_embeddings: bool = False

    @classmethod
    def of(cls, config: Any) -> "TargetFacts":
        """From a transformers config; of a multimodal one, from its text part."""
        text = config.get_text_config()
        rope = getattr(text, "rope_parameters", None) or {}
        positions = getattr(text, "max_position_embeddings", None) or 0
        # as vLLM's `engine/arg_utils.py` decides whether a window is that of all layers
        types, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
        slides = types is None or all(one == "sliding_attention" for one in types)
        return cls(
            model_type=text.model_type,
            latent=getattr(text, "kv_lora_rank", None) is not None,
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            max_positions=positions,
            rope=dict(rope),
            window=window if slides and isinstance(window, int) and 0 < window < positions else None,
            scales_embeddings=scales_embeddings(config),
        )


def named(names: Iterable[str], shown: int = 4) -> str:
    """`a`, `b` and 3 more."""
    names = sorted(names)
    listed = ", ".join(f"`{name}`" for name in names[:shown])
    return listed + (f" and {len(names) - shown} more" if len(names) > shown else "")


def shape_findings(
    reader: str, folder: DraftFolder, wanted: Mapping[str, Shape], given: Mapping[str, Shape]
) -> Iterator[Finding]:
    """Find tensors whose shape differs from that of the reader's parameter of the same name."""
    for name in sorted(wanted.keys() & given.keys()):
        if wanted[name] != given[name]:
            yield Finding(
                reader,
                f"`{folder.spelt(name)}` is {list(given[name])} where the config asks for {list(wanted[name])}, and "
                "loading fails.",
                "restore the tensor, or the sizes in config.json that it was trained with",
            )
