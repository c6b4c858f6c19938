"""The base class of all drafts: frozen embeddings that are never saved, vocabulary buffers, strict loading."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..decoding.checks import DraftShape
from ..decoding.proposal import Proposer
from ..decoding.target_run import TargetRun
from ..targets.features import TargetFeatures
from .configuration_base import DraftConfig
from .kinds import Kind, find_kind
from .probe import Probe
from .vocabulary import VocabularyMapping, check_mapping, draft_token_ids


class EaglePreTrainedModel(PreTrainedModel):
    """What every draft shares: frozen embeddings that are never saved, the vocabulary buffers, strict loading."""

    config_class = DraftConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    # the target's, shared in memory; both servers also take them from the target
    _keys_to_ignore_on_save = ["embed_tokens.weight"]
    _keys_to_ignore_on_load_missing = [r"^embed_tokens\.weight$"]
    # TTT attention, see `drafts/ttt_attention.py`; `sdpa` is the default
    _supports_sdpa = True
    _supports_flex_attn = True
    supports_gradient_checkpointing = True
    # whether its proposer heeds `DraftShape.window`
    takes_window = False

    @property
    def kind(self) -> Kind:
        """The kind of this draft."""
        return find_kind(parent.__name__ for parent in type(self).__mro__)[0]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers searches the source for its attention interface; a draft chooses its attention at every unroll
        return True

    @property
    def lent_tensors(self) -> frozenset[str]:
        """Names of the tensors lent by the target: frozen, and never saved."""
        return frozenset(self._keys_to_ignore_on_save or ())

    @property
    def own_head(self) -> bool:
        """Whether it proposes with its own head rather than the target's."""
        return "lm_head.weight" not in self.lent_tensors

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, embeddings: nn.Embedding):
        self.embed_tokens = embeddings

    def set_target_embeddings(self, weight: torch.Tensor) -> None:
        """Use the target's embedding table; storage is shared if dtype and device are the draft's.

        Args:
            weight: `(vocab_size, hidden)`.

        Raises:
            ValueError: if the table belongs to another model.
        """
        wanted = (self.config.vocab_size, self.config.hidden_size)
        if tuple(weight.shape) != wanted:
            raise ValueError(
                f"The target's embedding table is {tuple(weight.shape)} but this draft was made for {wanted}: it "
                "belongs to another target."
            )
        self.embed_tokens.weight = self._lent(weight)

    def attach(self, target) -> None:
        """Use what a [`FrozenTarget`] lends its draft and is never saved: its embeddings.

        Raises:
            ValueError: if the draft was made for another target.
        """
        self.set_target_embeddings(target.embedding_weight())

    def _lent(self, weight: torch.Tensor) -> nn.Parameter:
        like = self.embed_tokens.weight
        return nn.Parameter(weight.detach().to(device=like.device, dtype=like.dtype), requires_grad=False)

    def freeze(self) -> None:
        """Freeze what no draft trains; transformers makes everything trainable when it loads a folder."""
        self.embed_tokens.requires_grad_(False)

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

    def register_vocabulary(self, config: DraftConfig) -> None:
        """Make the buffers of a draft vocabulary of the configured size, still without a mapping."""
        if config.draft_vocab_size == config.vocab_size:
            self.d2t = self.t2d = None  # vLLM refuses a d2t with a full vocabulary
            return

        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.register_buffer("t2d", torch.arange(config.vocab_size) < config.draft_vocab_size)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self and self.d2t is not None:  # the first tokens, until a mapping is set or loaded
            self.d2t.zero_()
            self.t2d.copy_(torch.arange(self.config.vocab_size) < self.config.draft_vocab_size)

    def select_features(self, features: TargetFeatures) -> torch.Tensor:
        """Those of the target's features that this draft reads, `(batch, length, ...)`."""
        raise NotImplementedError

    def select_embeddings(self, features: TargetFeatures) -> torch.Tensor | None:
        """What replaces the embeddings of a batch's tokens, `(batch, length, hidden)`; `None` for no replacement."""
        return None

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., hidden)` as `decode` returns it for the head -> `(..., draft_vocab_size)`."""
        return self.lm_head(hidden)

    def cos_sin(self, like: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """RoPE tables `(*shape, rotated width)` in the dtype of `like`; `positions` `(*shape)`, or with m-RoPE `(3,
        *shape)`."""
        axes, shape = ((), positions.shape) if self.config.mrope_section is None else ((3,), positions.shape[1:])
        cos, sin = self.rotary_emb(like, positions.reshape(*axes, 1, -1))
        return cos.view(*shape, -1), sin.view(*shape, -1)

    def rotate_by(self, rope: dict) -> None:
        """Use another RoPE from now on, `rope_parameters` as its config has them."""
        self.config.rope_parameters = dict(rope)
        self.rotary_emb = type(self.rotary_emb)(self.config).to(self.device)

    def probes(self, target, bases: Sequence[float] = ()) -> list[Probe]:
        """Changes that would each undo one fault of this draft which its folder does not show.

        Args:
            target ([`FrozenTarget`]): the target that it drafts for.
            bases: further bases of RoPE that it may have been trained with.
        """
        return []

    def take_target_head(self, weight: torch.Tensor) -> None:
        """Initialise a new draft from the target's head `(vocab_size, hidden)`, if the kind can."""

    def proposer(self, shape: DraftShape, prompts: TargetRun) -> Proposer:
        """The draft's side of decoding a batch of prompts: what it proposes in each round.

        Args:
            shape: what is drafted in a round.
            prompts: the batch, before any decoding.

        Raises:
            ValueError: for a shape that this kind of draft does not propose.
        """
        raise NotImplementedError

    def drafted_logits(self, next_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Logits of what decoding drafts for one sequence, `(logits, draft_vocab_size)`, to compare with a server's.

        Args:
            next_ids: `(rows + steps,)`, the token after each row of features, and after each row that is drafted.
            features: `(rows, W)`, as `select_features` returns them.
        """
        raise NotImplementedError

    def head_operands(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of its head's product: `hidden` `(rows, hidden)` and the head's weight `(vocabulary, hidden)`."""
        return hidden, self.lm_head.weight

    def nothing(self) -> torch.Tensor:
        """Zero, but a function of every trained parameter. A batch without a supervised row must touch them all, or DDP
        and FSDP hang."""
        return sum(p.sum() for p in self.parameters() if p.requires_grad) * 0.0

    @property
    def draft_ids(self) -> torch.Tensor | None:
        """Target ids of the draft vocabulary `(draft_vocab_size,)`, `None` for the whole vocabulary."""
        return None if self.d2t is None else draft_token_ids(self.d2t)

    def to_target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Target ids of draft ids, any shape."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[draft_ids]

    def name_in_folder(self, name: str) -> str:
        """What a folder calls one of its tensors."""
        return name

    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs):
        """As in `transformers`; weights get the mode of `config.json`, so that other users' servers can read them."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        kept = {name: tensor for name, tensor in state_dict.items() if name not in self.lent_tensors}
        named = {self.name_in_folder(name): tensor for name, tensor in kept.items()}
        super().save_pretrained(save_directory, *args, state_dict=_apart(named), **kwargs)

        config = Path(save_directory) / "config.json"
        if kwargs.get("is_main_process", True) and config.is_file():
            for weights in Path(save_directory).glob("*.safetensors"):
                shutil.copymode(config, weights)  # safetensors writes through a private temporary file

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in `transformers`, but refuse a folder that is not exactly this draft.

        Raises:
            ValueError: if a tensor is missing, unexpected or of another shape, or if `d2t` and `t2d` do not fit.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # so that one message names all that is wrong
        draft, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)

        wrong = {
            "missing": sorted(set(info["missing_keys"]) - set(cls._keys_to_ignore_on_save)),
            "unexpected": sorted(info["unexpected_keys"]),
            "of another shape": sorted(str(key) for key in info["mismatched_keys"]),
        }

        if any(wrong.values()):
            found = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
            if "lm_head.weight" in wrong["missing"]:
                found += (
                    "; the head was dropped by code that took it for tied to the embeddings, and cannot be restored"
                )
            raise ValueError(
                f"The checkpoint {pretrained_model_name_or_path} does not hold exactly the tensors of a "
                f"{cls.__name__} ({found}): a server would load it silently as garbage."
            )

        draft._check_loaded()
        draft.freeze()
        return (draft, info) if wants_info else draft

    def _check_loaded(self) -> None:
        """`ValueError` for values that no draft of this kind can have, whatever their names and shapes."""
        self.check_vocabulary()

    def check_vocabulary(self) -> None:
        """`ValueError` if the buffers `d2t` and `t2d` do not describe the same vocabulary."""
        if self.d2t is not None:
            check_mapping(self.d2t, self.t2d)


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, each with memory of its own: a file holds whatever several modules share once for each."""
    seen = set()
    return {
        name: x.clone() if (place := x.data_ptr()) in seen else (seen.add(place), x)[1] for name, x in tensors.items()
    }
