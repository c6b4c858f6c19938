"""Make a new draft, or read one from a folder by the `architectures` in its config."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers.utils import cached_file

from ..door.config_numbers import check_config_numbers
from ..door.reading import locating, read_part, reading
from ..targets.weights import check_sizes, check_stored_dtypes, check_tensors, report_if_sound, stored_shapes
from .configuration_base import DraftConfig
from .kinds import architecture_names, class_of
from .modeling_base import EaglePreTrainedModel
from .vocabulary import VocabularyMapping


def new_draft(
    config: DraftConfig,
    embedding_weight: torch.Tensor,
    mapping: VocabularyMapping | None = None,
    head_weight: torch.Tensor | None = None,
    attn_implementation: str = "sdpa",
) -> EaglePreTrainedModel:
    """A fresh draft for a target, in float32.

    Args:
        config: its configuration.
        embedding_weight: `(vocab_size, hidden)`, the target's input embedding.
        mapping: the draft vocabulary; needed if it is smaller than the target's.
        head_weight: `(vocab_size, hidden)`, the target's head. EAGLE-1 shares it; EAGLE-3 starts its own from its rows
            and lets `fc` pass the last tap through, or starts at random if `None`.
        attn_implementation: of the training-time test, see `drafts/ttt_attention.py`.

    Raises:
        ValueError: if the mapping is missing or does not fit the config.

    Example:
        >>> config = EagleConfig.from_target(target.config)
        >>> draft = new_draft(config, target.embedding_weight(), head_weight=target.head_weight())
    """
    draft = class_of(config.architectures)(config)
    draft.set_attn_implementation(attn_implementation)
    draft.set_target_embeddings(embedding_weight)

    if draft.d2t is not None:
        if mapping is None:
            raise ValueError(
                f"`draft_vocab_size` is {config.draft_vocab_size} of {config.vocab_size} tokens: pass the `mapping` "
                "that says which."
            )
        draft.set_vocabulary(mapping)

    if head_weight is not None:
        draft.take_target_head(head_weight)
    return draft


def load_draft(
    path: str | Path, target=None, dtype: torch.dtype | None = None, argument: str = "draft"
) -> EaglePreTrainedModel:
    """Read a draft folder or Hub id, whatever its kind.

    Args:
        path: folder or Hub id.
        target ([`FrozenTarget`], *optional*): lends its tensors to the draft; without one, call `attach` before using
            the draft.
        dtype: of the weights; the checkpoint's when `None`.
        argument: that named the draft.

    Raises:
        ValueError: if the folder is not exactly a draft of a known kind, cannot be read, or holds weights or numbers
            that no draft can compute with.
        OSError: if there is no such folder or Hub id.
    """
    config = _config_of(path, argument)
    draft_class = _known_class(path, config, argument)

    check_config_numbers(argument, path, config)

    with reading(argument, path), report_if_sound():
        check_sizes(argument, path, SimpleNamespace(**config), stored_shapes(argument, path))
        check_stored_dtypes(argument, path)
        with reading(argument, path, "config.json"), locating(argument, path, "config.json"):
            config = draft_class.config_class.from_pretrained(path)
        with locating(argument, path, "its weights"):
            draft = draft_class.from_pretrained(path, config=config, dtype="auto" if dtype is None else dtype)
        check_tensors(argument, path, dict(draft.named_parameters()))

    if target is not None:
        draft.to(target.device)
        draft.attach(target)
    return draft.eval()


def draft_class_of(path: str | Path, argument: str = "draft") -> type[EaglePreTrainedModel]:
    """The class of a draft folder or Hub id; `ValueError` if it is no draft of a known kind."""
    return _known_class(path, _config_of(path, argument), argument)


def _config_of(path: str | Path, argument: str) -> dict[str, Any]:
    with reading(argument, path):
        file = cached_file(str(path), "config.json")
        if file is None:
            raise ValueError(f"`{argument}` {path} is no draft, it holds no config.json: name the folder of a draft.")
    return read_part(argument, path, file, {"architectures?": list[str] | None})


def _known_class(path: str | Path, config: dict[str, Any], argument: str) -> type[EaglePreTrainedModel]:
    names = config.get("architectures") or []
    draft_class = class_of(names)
    if draft_class is None:
        raise ValueError(
            f"`{argument}` {path} is not a draft: `architectures` in its config.json is {names}, known are "
            f"{architecture_names()}."
        )
    return draft_class
