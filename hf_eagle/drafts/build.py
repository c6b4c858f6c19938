"""A draft to start from: new, or read from a folder by the `architectures` in its config."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from ..targets.latent import has_latent_attention
from ..targets.media import has_mrope
from .eagle1.modeling import LlamaForCausalLMEagle
from .eagle3.configuration import EagleConfig
from .eagle3.configuration_latent import EagleMLAConfig
from .eagle3.modeling import LlamaForCausalLMEagle3
from .eagle3.modeling_latent import Eagle3DeepseekV2ForCausalLM
from .modeling_base import EaglePreTrainedModel
from .vocabulary import VocabularyMapping


logger = logging.getLogger(__name__)

DRAFT_CLASSES = {
    "LlamaForCausalLMEagle3": LlamaForCausalLMEagle3,
    "Eagle3DeepseekV2ForCausalLM": Eagle3DeepseekV2ForCausalLM,
    "LlamaForCausalLMEagle": LlamaForCausalLMEagle,
}


def draft_config(
    target_config: PreTrainedConfig,
    attention: str = "auto",
    latent_sizes: dict | None = None,
    rope: str = "1d",
    image_embeddings: str = "token",
    **fields: Any,
) -> EagleConfig:
    """The config of a new draft for a target.

    Args:
        target_config: the target's (text) config.
        attention: `"llama"` or `"mla"`; `"auto"` is the target's own kind.
        latent_sizes: of `"mla"`, those that are not the target's.
        rope: of `"llama"`, `"1d"` or `"mrope"`, see `draft_rope`.
        image_embeddings: of `"llama"`, `"token"` or `"vision"`, see [`EagleConfig`].
        fields: as for [`EagleConfig.from_target`].

    Raises:
        ValueError: for an unknown kind, latent sizes of another, or what does not fit the target.
    """
    if attention not in ("auto", "llama", "mla"):
        raise ValueError(f"`draft_attention` must be one of auto, llama, mla, got {attention!r}.")
    by_token = image_embeddings == "token"
    if not by_token and not has_mrope(target_config):
        raise ValueError(f"`image_embeddings` is {image_embeddings}, but the target takes no images: leave it out.")
    if attention == "mla" or (attention == "auto" and has_latent_attention(target_config.get_text_config())):
        if rope != "1d":
            raise ValueError(
                f"`draft_rope` is {rope}, but the draft has latent attention, which is rotated in 1d only."
            )
        if not by_token:
            raise ValueError(
                f"`image_embeddings` is {image_embeddings}, but a draft with latent attention embeds tokens "
                "only: leave it out, or set `draft_attention` to llama."
            )
        config = EagleMLAConfig.from_target(target_config, **(latent_sizes or {}), **fields)
        if config.q_lora_rank is None:
            logger.warning("`q_lora_rank` is none: neither vLLM 0.32 nor SGLang 0.5.23 loads such a draft.")
        return config
    if latent_sizes:
        name, size = next(iter(latent_sizes.items()))
        raise ValueError(
            f"`{name}` is {size}, but the draft's attention is Llama's, which has none: leave it out, or set "
            "`draft_attention` to mla."
        )
    if not by_token:
        logger.warning("`image_embeddings` is vision, as SGLang serves: vLLM 0.32 gives a draft the image's token.")
    return EagleConfig.from_target(target_config, rope=rope, image_embeddings=image_embeddings, **fields)


def new_draft(
    config: EagleConfig,
    embedding_weight: torch.Tensor,
    mapping: VocabularyMapping | None = None,
    head_weight: torch.Tensor | None = None,
    attn_implementation: str = "sdpa",
) -> EaglePreTrainedModel:
    """A fresh draft for a target, in float32.

    Args:
        config: its configuration.
        embedding_weight: `(vocab_size, hidden)`, the target's input embedding.
        mapping: the draft vocabulary; needed when it is smaller than the target's.
        head_weight: `(vocab_size, hidden)`, the target's head. EAGLE-1 shares it; EAGLE-3 starts its own from its rows
            and lets `fc` pass the last tap through, or starts at random if `None`.
        attn_implementation: of the training-time test, see `drafts/ttt_attention.py`.

    Raises:
        ValueError: if the mapping is missing or does not fit the config.
    """
    draft = DRAFT_CLASSES[config.architectures[0]](config)
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
        draft.start_from_target(head_weight)
    return draft


def load_draft(path: str | Path, target=None, dtype: torch.dtype | None = None) -> EaglePreTrainedModel:
    """Read a draft folder or Hub id, whatever its kind.

    Args:
        path: folder or Hub id.
        target ([`FrozenTarget`], *optional*): what it lends is attached; without one, call `attach` before using the
            draft.
        dtype: of the weights, the checkpoint's when `None`.

    Raises:
        ValueError: if the folder is no draft, or not exactly one of a known kind.
    """
    draft = draft_class_of(path).from_pretrained(path, dtype="auto" if dtype is None else dtype)
    if target is not None:
        draft.to(target.device)
        draft.attach(target)
    return draft.eval()


def draft_class_of(path: str | Path) -> type[EaglePreTrainedModel]:
    """The class of a draft folder or Hub id; `ValueError` if it is no draft of a known kind."""
    config_file = cached_file(str(path), "config.json")
    names = json.loads(Path(config_file).read_text()).get("architectures") or []
    draft_class = next((DRAFT_CLASSES[name] for name in names if name in DRAFT_CLASSES), None)
    if draft_class is None:
        raise ValueError(
            f"{path} is not a draft: `architectures` in its config.json is {names}, known are {sorted(DRAFT_CLASSES)}."
        )
    return draft_class
