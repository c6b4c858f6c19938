"""What every draft is built on: frozen embeddings that are never saved, vocabulary buffers, strict loading."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_eagle import EagleConfig
from .vocabulary import VocabularyMapping, check_mapping, draft_token_ids


# (normed hidden states of all steps (steps, N, hidden), head) -> final loss, summed loss and correct rows of each step
Objective = Callable[[torch.Tensor, nn.Module], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass
class EagleOutput(ModelOutput):
    """What an unroll returns.

    Attributes:
        loss: what to call `backward` on, 0-d.
        loss_sums: summed loss of each TTT step, `(steps,)`; carries no gradient.
        correct: rows of each step whose argmax is the target's, `(steps,)`.
        hidden_states: without an objective, the normed hidden states of every step, `(steps, N, hidden)`.
    """

    loss: torch.Tensor | None = None
    loss_sums: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None


class EaglePreTrainedModel(PreTrainedModel):
    """What every draft shares: frozen embeddings that are never saved, the vocabulary buffers, strict loading."""

    config_class = EagleConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    # the target's, shared in memory; both servers take them from the target too
    _keys_to_ignore_on_save = ["embed_tokens.weight"]
    _keys_to_ignore_on_load_missing = [r"^embed_tokens\.weight$"]
    # TTT attention, see `ttt_attention.py`; `sdpa` is the default
    _supports_sdpa = True
    _supports_flex_attn = True
    supports_gradient_checkpointing = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for its attention interface in the source; a draft's attention is chosen at every unroll
        return True

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, embeddings: nn.Embedding):
        self.embed_tokens = embeddings

    def set_target_embeddings(self, weight: torch.Tensor) -> None:
        """Use the target's embedding table; storage is shared when dtype and device are the draft's.

        Args:
            weight: `(vocab_size, hidden)`.

        Raises:
            ValueError: if the table is another model's.
        """
        wanted = (self.config.vocab_size, self.config.hidden_size)
        if tuple(weight.shape) != wanted:
            raise ValueError(
                f"The target's embedding table is {tuple(weight.shape)} but this draft was made for {wanted}: it "
                "belongs to another target."
            )
        like = self.lm_head.weight
        weight = weight.detach().to(device=like.device, dtype=like.dtype)
        self.embed_tokens.weight = nn.Parameter(weight, requires_grad=False)

    def set_vocabulary(self, mapping: VocabularyMapping) -> None:
        """Put a mapping of the configured size into the buffers.

        Raises:
            ValueError: if its sizes are not the config's or its two halves disagree.
        """
        seen = (mapping.t2d.numel(), mapping.d2t.numel())
        wanted = (self.config.vocab_size, self.config.draft_vocab_size)
        if seen != wanted:
            raise ValueError(
                f"The vocabulary mapping is for {seen[0]} target and {seen[1]} draft tokens, the draft's config says "
                f"{wanted[0]} and {wanted[1]}: use the mapping that was made for this draft."
            )
        if self.d2t is None:
            return
        check_mapping(mapping.d2t, mapping.t2d)
        self.d2t.copy_(mapping.d2t)
        self.t2d.copy_(mapping.t2d)

    def _register_vocabulary(self, config: EagleConfig) -> None:
        if config.draft_vocab_size == config.vocab_size:
            self.d2t = self.t2d = None  # vLLM refuses a d2t beside a full vocabulary
            return
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.register_buffer("t2d", torch.arange(config.vocab_size) < config.draft_vocab_size)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self and self.d2t is not None:  # the first tokens, until a mapping is set or loaded
            self.d2t.zero_()
            self.t2d.copy_(torch.arange(self.config.vocab_size) < self.config.draft_vocab_size)

    def select_features(self, features) -> torch.Tensor:
        """Of a target's [`TargetFeatures`], those that `combine_features` takes: `(batch, length, ...)`."""
        return features.taps

    @property
    def draft_ids(self) -> torch.Tensor | None:
        """Target ids of the draft vocabulary `(draft_vocab_size,)`, `None` when it is the whole vocabulary."""
        return None if self.d2t is None else draft_token_ids(self.d2t)

    def to_target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Target ids of draft ids, any shape."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[draft_ids]

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in `transformers`; the weights get the mode of `config.json`, for servers of another user."""
        super().save_pretrained(save_directory, *args, **kwargs)
        config = Path(save_directory) / "config.json"
        if kwargs.get("is_main_process", True) and config.is_file():
            for weights in Path(save_directory).glob("*.safetensors"):
                shutil.copymode(config, weights)  # safetensors writes through a private temporary file

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in `transformers`, but a folder that is not exactly this draft is refused.

        Raises:
            ValueError: if a tensor is missing, unexpected or of another shape, or if `d2t` and `t2d` do not fit.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # so that all that is wrong is named in one message
        draft, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        wrong = {
            "missing": sorted(set(info["missing_keys"]) - {"embed_tokens.weight"}),
            "unexpected": sorted(info["unexpected_keys"]),
            "of another shape": sorted(str(key) for key in info["mismatched_keys"]),
        }
        if any(wrong.values()):
            found = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
            raise ValueError(
                f"The checkpoint {pretrained_model_name_or_path} does not hold exactly the tensors of a "
                f"{cls.__name__} ({found}): a server would load it silently as garbage."
            )
        if draft.d2t is not None:
            check_mapping(draft.d2t, draft.t2d)
        draft.embed_tokens.requires_grad_(False)
        return (draft, info) if wants_info else draft
