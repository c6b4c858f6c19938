"""The kinds of draft: one row each. Importing this loads no torch, so that arguments can read it.

A kind is a package with these modules, which training, decoding and cards use:

| module | what it has |
|---|---|
| `configuration` | `config_for(target_config, options, **fields)`, and `title_of(config)` of a `config.json` |
| `modeling` | the classes, each an [`EaglePreTrainedModel`] |
| `proposal` | what the draft proposes in decoding: a [`Proposer`], which its class returns |
| `training` | `training_for(args, config)`: a [`DraftTraining`], the rows of a batch and what they are compared with |
| `costs` | `costs_of(config)`: a [`DraftCosts`], the memory and the operations of a step |

Register a kind of another package before parsing arguments, see [`register_kind`]. What servers make
of a kind is another table, in `serving/`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..door.json_files import read_json
from ..targets.latent import LATENT_SIZES


@dataclass(frozen=True)
class Kind:
    """One kind of draft.

    Attributes:
        name: its name in code.
        title: its name for people, in sentences.
        package: the package with its modules.
        architectures: names in `architectures` of a config.json, which are its class names, and the module of
            each inside the package.
        methods: values of the argument `method` that train it, and how its drafts are decoded during training.
        meaningless: arguments that have no effect on it, and are therefore refused.
        anyhow: values of such arguments that ask for what it does anyhow, and are therefore accepted.
        own: arguments that are refused for every kind that does not list them here.
        losses: values of the argument `loss` that it can be trained with.
        metrics: what an evaluation measures only for this kind, in addition to what it measures for all.
    """

    name: str
    title: str
    package: str
    architectures: Mapping[str, str]
    methods: Mapping[str, str]
    meaningless: tuple[str, ...] = ()
    anyhow: Mapping[str, Any] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    losses: tuple[str, ...] = ("ce", "lk_alpha", "lk_lambda")
    metrics: tuple[str, ...] = ()

    def part(self, name: str) -> ModuleType:
        """One of its modules."""
        return import_module(f"{self.package}.{name}")

    def draft_class(self, architecture: str) -> type:
        """The class that `architectures` of a config.json names."""
        return getattr(self.part(self.architectures[architecture]), architecture)

    @property
    def refused(self) -> frozenset[str]:
        """Arguments that are refused for it: those without a meaning, and those that belong to other kinds."""
        others = {name for kind in KINDS.values() for name in kind.own}
        return frozenset(self.meaningless) | (others - set(self.own))

    @property
    def titled(self) -> str:
        """With its article: `an EAGLE-3`."""
        return f"{'an' if self.title[0] in 'AEIOU' else 'a'} {self.title}"


# EAGLE-1 does not use these: it has no taps, and no vocabulary, head or steps of its own
_ONLY_EAGLE3 = (
    *("draft_rope", "image_embeddings", "tap_ids", "tap_method"),
    *("draft_vocab_size", "fill_vocabulary", "fc_norm", "norm_output", "draft_init", "draft_attention"),
    *("draft_sliding_window", *LATENT_SIZES),
    *("ttt_steps", "step_weight", "loss", "loss_window", "oov_rows", "lk_scale", "lk_decay"),
)
_ONLY_EAGLE1 = ("regression_weight", "ce_weight", "feature_noise")
# DFlash uses neither these nor those of EAGLE-1: it has no unroll, and the target's vocabulary and head
_NOT_DFLASH = (
    *("draft_rope", "image_embeddings", "draft_vocab_size", "fill_vocabulary", "fc_norm", "norm_output", "draft_init"),
    *("draft_attention", "draft_sliding_window", *LATENT_SIZES),
    *("ttt_steps", "step_weight", "supervision", "loss_window", "oov_rows", "lk_scale", "lk_decay"),
)

KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="eagle1",
            title="EAGLE-1/2",
            package=f"{__package__}.eagle1",
            architectures={"LlamaForCausalLMEagle": "modeling"},
            # EAGLE-2 is the same draft, decoded with a dynamic draft tree
            methods={"eagle1": "chain", "eagle2": "tree"},
            meaningless=_ONLY_EAGLE3,
            anyhow={"ttt_steps": 1},
            metrics=("regression_loss", "ce_loss"),
        ),
        Kind(
            name="eagle3",
            title="EAGLE-3",
            package=f"{__package__}.eagle3",
            architectures={
                "LlamaForCausalLMEagle3": "modeling",
                "Eagle3DeepseekV2ForCausalLM": "modeling_latent",
            },
            methods={"eagle3": "chain"},
            meaningless=_ONLY_EAGLE1,
        ),
        Kind(
            name="dflash",
            title="DFlash",
            package=f"{__package__}.dflash",
            architectures={"DFlashDraftModel": "modeling"},
            methods={"dflash": "chain"},
            meaningless=_NOT_DFLASH + _ONLY_EAGLE1,
            own=(
                *("draft_num_layers", "block_size", "mask_token_id", "share_k_norm", "served_form"),
                *("num_anchors", "slot_decay", "dpace_alpha"),
            ),
            losses=("ce", "label", "dpace"),
        ),
    )
}


def register_kind(kind: Kind) -> None:
    """Make a kind of draft known, for instance one of your own package.

    Raises:
        ValueError: if another kind has its name, one of its methods, or one of its architectures.

    Example:
        >>> register_kind(Kind("block", "Block", "my_package.block", {"BlockDraft": "modeling"}, {"block": "chain"}))
    """
    for other in KINDS.values():
        taken = {other.name, *other.methods, *other.architectures} & {kind.name, *kind.methods, *kind.architectures}
        if taken and other != kind:
            raise ValueError(
                f"`kind` {kind.name} cannot be registered: {', '.join(sorted(taken))} belongs to {other.titled} draft "
                "already; choose other names."
            )

    KINDS[kind.name] = kind


def method_names() -> list[str]:
    """Values that the argument `method` takes."""
    return [method for kind in KINDS.values() for method in kind.methods]


def kind_of_method(method: str) -> Kind:
    """The kind of draft that a value of `method` trains.

    Raises:
        ValueError: for a method that no kind has.
    """
    found = next((kind for kind in KINDS.values() if method in kind.methods), None)

    if found is None:
        raise ValueError(f"`method` must be one of {', '.join(method_names())}, got {method!r}.")
    return found


def find_kind(architectures: Iterable[str]) -> tuple[Kind, str] | None:
    """The kind that the first known name in `architectures` belongs to, and that name; `None` if none is known."""
    return next(((kind, name) for name in architectures for kind in KINDS.values() if name in kind.architectures), None)


def class_of(architectures: Iterable[str]) -> type | None:
    """The class of drafts that `architectures` of a config names first; `None` if they are of no known kind."""
    found = find_kind(architectures)
    return None if found is None else found[0].draft_class(found[1])


def kind_of_folder(folder: str | Path) -> Kind | None:
    """The kind of draft that the config.json of a folder names; `None` if it names no known one."""
    found = find_kind(architectures_of(folder))
    return None if found is None else found[0]


def architectures_of(folder: str | Path) -> list[str]:
    """`architectures` in the config.json of a folder; `[]` if none can be read."""
    try:
        return read_json(Path(folder) / "config.json", {"architectures?": list[str] | None}).get("architectures") or []
    except ValueError:
        return []  # loading the folder reports what is wrong with it


def architecture_names() -> list[str]:
    """Every name in `architectures` of a config.json that a kind knows."""
    return sorted(name for kind in KINDS.values() for name in kind.architectures)
