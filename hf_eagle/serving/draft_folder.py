"""A draft folder as a server finds it on disk, the target beside it, and the form of what is wrong with the two."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from ..door.json_files import read_json
from ..door.reading import reading


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Finding:
    """One thing that keeps a folder from being served as it was trained.

    Attributes:
        reader: who trips over it, such as `vLLM`.
        text: what is seen and what the reader makes of it, a whole sentence.
        fix: what to do, an imperative.
        level: `fault`; `limit` for a draft that is what it was meant to be, but of a kind that the reader does not
            serve; `note` for what is worth knowing and serves all the same.
    """

    reader: str
    text: str
    fix: str
    level: Literal["fault", "limit", "note"] = "fault"

    def __str__(self) -> str:
        return f"{self.reader}: {'' if self.level == 'fault' else f'({self.level}) '}{self.text} Fix: {self.fix}."


@dataclass
class DraftFolder:
    """`config.json` and the headers of the safetensors files; values are read when asked for.

    Attributes:
        path: the folder.
        config: `config.json` as it stands, with no reader's defaults.
        shapes, dtypes: of each tensor; dtypes are spelt as safetensors does (`F32`, `BF16`, `I64`, `BOOL`).
        files: where each tensor is.
    """

    path: Path
    config: dict[str, Any]
    shapes: dict[str, Shape] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> "DraftFolder":
        """Reads no more than headers.

        Raises:
            ValueError: if there is no draft to look at.
        """
        path = Path(path)
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is no draft folder, it holds no config.json: name the folder of a draft.")
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
        """The values of one tensor, on the CPU."""
        with safe_open(self.files[name], "pt") as tensors:
            return tensors.get_tensor(name)

    @cached_property
    def prefixed(self) -> bool:
        """Whether every tensor but the head and the vocabulary is named `model.*`, as in a whole language model."""
        others = [name for name in self.shapes if not name.endswith(("lm_head.weight", "d2t", "t2d"))]
        return bool(others) and all(name.startswith("model.") for name in others)

    def spelt(self, name: str) -> str:
        """A name of layer 0 as this folder spells it: `layers.0.` or `midlayer.`, which servers take alike."""
        midlayer = any("midlayer." in known for known in self.shapes)
        return name.replace("layers.0.", "midlayer.") if midlayer else name

    @cached_property
    def num_layers(self) -> int:
        """Layers that there are tensors of; `midlayer` is layer 0."""
        parts = [name.removeprefix("model.").split(".") for name in self.shapes]
        return 1 + max((int(p[1]) for p in parts if p[0] == "layers" and p[1].isdecimal()), default=0)


@dataclass(frozen=True)
class TargetFacts:
    """What a server knows of the target that a draft is started beside."""

    model_type: str
    latent: bool
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    rope: dict[str, Any]

    @classmethod
    def of(cls, config: Any) -> "TargetFacts":
        """From a transformers config; the text part's of a multimodal one."""
        text = config.get_text_config()
        rope = getattr(text, "rope_parameters", None) or {}
        return cls(
            model_type=text.model_type,
            latent=getattr(text, "kv_lora_rank", None) is not None,
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            max_positions=getattr(text, "max_position_embeddings", None) or 0,
            rope=dict(rope),
        )


def named(names: Iterable[str], shown: int = 4) -> str:
    """`a`, `b` and 3 more."""
    names = sorted(names)
    listed = ", ".join(f"`{name}`" for name in names[:shown])
    return listed + (f" and {len(names) - shown} more" if len(names) > shown else "")


def shape_findings(
    reader: str, folder: DraftFolder, wanted: Mapping[str, Shape], given: Mapping[str, Shape]
) -> Iterator[Finding]:
    """Tensors that are there in another shape than the reader's parameter of that name."""
    for name in sorted(wanted.keys() & given.keys()):
        if wanted[name] != given[name]:
            yield Finding(
                reader,
                f"`{folder.spelt(name)}` is {list(given[name])} where the config asks for {list(wanted[name])}, and "
                "loading fails.",
                "restore the tensor, or the sizes in config.json that it was trained with",
            )
