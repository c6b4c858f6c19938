"""What every draft is built on: frozen embeddings that are never saved, vocabulary buffers, strict loading."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from .eagle3.configuration import EagleConfig
from .row_layout import RowLayout, mark_padding
from .vocabulary import VocabularyMapping, check_mapping, draft_token_ids


@dataclass
class EagleOutput(ModelOutput):
    """What an unroll returns.

    Attributes:
        loss: what to call `backward` on, 0-d.
        loss_sums: summed loss of each TTT step, `(steps,)`; carries no gradient.
        correct: rows of each step whose argmax is the target's, `(steps,)`.
        parts: summed parts of the loss by name, `(steps,)` each, where it has several; they carry no gradient.
        hidden_states: without an objective, the normed hidden states of every step, `(steps, N, hidden)`.
    """

    loss: torch.Tensor | None = None
    loss_sums: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    parts: dict[str, torch.Tensor] | None = None
    hidden_states: torch.Tensor | None = None


# (hidden states of all steps as the head takes them (steps, N, hidden), head) -> everything but `hidden_states`
Objective = Callable[[torch.Tensor, nn.Module], EagleOutput]


class EaglePreTrainedModel(PreTrainedModel):
    """What every draft shares: frozen embeddings that are never saved, the vocabulary buffers, strict loading."""

    config_class = EagleConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    # the target's, shared in memory; both servers take them from the target too
    _keys_to_ignore_on_save = ["embed_tokens.weight"]
    _keys_to_ignore_on_load_missing = [r"^embed_tokens\.weight$"]
    # TTT attention, see `drafts/ttt_attention.py`; `sdpa` is the default
    _supports_sdpa = True
    _supports_flex_attn = True
    supports_gradient_checkpointing = True
    # of `--method`: what a draft of this class is, and how it is trained
    method = "eagle3"
    # steps of the training-time test where none are asked for
    default_ttt_steps = 7

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
        self.embed_tokens.weight = self._lent(weight)

    def attach(self, target) -> None:
        """Use what a [`FrozenTarget`] lends its draft, which is never saved: its embeddings.

        Raises:
            ValueError: if it is another target than the draft was made for.
        """
        self.set_target_embeddings(target.embedding_weight())

    def _lent(self, weight: torch.Tensor) -> nn.Parameter:
        like = self.fc.weight
        return nn.Parameter(weight.detach().to(device=like.device, dtype=like.dtype), requires_grad=False)

    def _freeze(self) -> None:
        """What is not trained; transformers makes everything trainable again when it loads a folder."""
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
        """Of a target's [`TargetFeatures`], those that `combine_features` takes: `(batch, length, ...)`.

        Raises:
            ValueError: if the target was not asked for taps.
        """
        if features.taps is None:
            raise ValueError("Set `tap_ids` of the target before asking it for the features of an EAGLE-3 draft.")
        return features.taps

    def select_positions(self, features, position_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Where the tokens of a batch stand: with m-RoPE where the target has put them, see [`TargetFeatures`]."""
        by_axes = self.config.mrope_section is not None and features.position_ids is not None
        return features.position_ids if by_axes else position_ids

    def select_embeddings(self, features) -> torch.Tensor | None:
        """What stands in the place of embeddings of a batch's tokens: with `image_embeddings` vision what the target's
        first layer gets, `(batch, length, hidden)`; else `None`."""
        return features.embeddings if self.config.image_embeddings == "vision" else None

    def embed(self, tokens: torch.Tensor, embeddings: torch.Tensor | None, places=...) -> torch.Tensor:
        """Embeddings of token ids, or the given ones at `places`, in the draft's dtype."""
        table = self.embed_tokens
        return table(tokens) if embeddings is None else embeddings[places].to(table.weight.dtype)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., hidden)` as `decode` returns it for the head -> `(..., draft_vocab_size)`."""
        return self.lm_head(hidden)

    def cos_sin(self, like: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """RoPE tables `(*shape, rotated width)` in the dtype of `like`; `positions` `(*shape)`, or with m-RoPE `(3,
        *shape)`."""
        axes, shape = ((), positions.shape) if self.config.mrope_section is None else ((3,), positions.shape[1:])
        cos, sin = self.rotary_emb(like, positions.reshape(*axes, 1, -1))
        return cos.view(*shape, -1), sin.view(*shape, -1)

    def on_axes(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Positions `(batch, n)`, or `(3, batch, n)`, as this draft takes them: the latter with m-RoPE only.

        Raises:
            ValueError: for three positions a token that this draft cannot use.
        """
        if position_ids.dim() == 3 and self.config.mrope_section is None:
            raise ValueError(
                "`position_ids` has three positions a token, but this draft has plain RoPE (`draft_rope` 1d): leave "
                "them out, or make the draft with mrope."
            )
        if position_ids.dim() == 2 and self.config.mrope_section is not None:
            return position_ids.expand(3, -1, -1)
        return position_ids

    def forward(
        self,
        input_ids: torch.Tensor,
        features: torch.Tensor,
        rows: torch.Tensor | None = None,
        num_steps: int = 1,
        objective: Objective | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
    ) -> EagleOutput:
        """The unroll of all steps in one forward, so that DDP and FSDP see one forward and one backward.

        Args:
            input_ids: `(batch, length)`.
            features: what `select_features` takes of the target's, `(batch, length, ...)`.
            rows: `(N,)` flat ids `b * length + t` of the rows to unroll, ascending; all rows when `None`.
            num_steps: TTT steps; EAGLE-1 knows one.
            objective: called once with what the head takes at every step, `(num_steps, N, hidden)`, and the head.
            attention_mask: `(batch, length)`, 0 on padding.
            position_ids: `(batch, length)`, or with m-RoPE `(3, batch, length)`; counted along the unpadded tokens when
                `None`. Step s stands s places further on every axis.
            documents: `(batch, length)` ids of packed documents, which do not see each other.
            embeddings: `(batch, length, hidden)` from `select_embeddings`.

        Returns:
            [`EagleOutput`].
        """
        self._check_steps(num_steps)
        if position_ids is None:
            present = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            position_ids = (present.cumsum(-1) - 1).clamp_min(0)
        if rows is None:
            rows = torch.arange(input_ids.numel(), device=input_ids.device)
        if rows.numel():
            layout = RowLayout.of(rows, mark_padding(documents, attention_mask, like=input_ids))
            hidden = self._unroll(
                input_ids.flatten(),
                features.flatten(0, 1),
                self.on_axes(position_ids).flatten(-2),
                layout,
                num_steps,
                None if embeddings is None else embeddings.flatten(0, 1),
            )
        else:
            hidden = self._untrained(num_steps)
        return EagleOutput(hidden_states=hidden) if objective is None else objective(hidden, self.lm_head)

    def _check_steps(self, num_steps: int) -> None:
        """`ValueError` for more steps than this kind of draft is unrolled for."""

    def _unroll(
        self,
        input_ids: torch.Tensor,
        features: torch.Tensor,
        position_ids: torch.Tensor,
        layout: RowLayout,
        num_steps: int,
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the head takes of the rows `layout.rows` at every step, `(num_steps, N, hidden)`.

        Args:
            input_ids: `(batch * length,)`.
            position_ids: `(batch * length,)`, with m-RoPE `(3, batch * length)`.
            features: `(batch * length, ...)`.
            layout: which rows are unrolled, and which keys they need.
            num_steps: TTT steps.
            embeddings: `(batch * length, hidden)`.
        """
        raise NotImplementedError

    def decode(
        self,
        input_ids: torch.Tensor,
        hidden: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Cache,
        attention_mask: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Serving: run rows behind those in the cache, and add their keys to it.

        Args:
            input_ids: `(batch, n)`, for each row the NEXT token.
            hidden: `(batch, n, hidden)` from `combine_features`, or fed back by an earlier call.
            position_ids: `(batch, n)` of the rows, with m-RoPE also `(3, batch, n)`.
            past_key_values: cache of one layer.
            attention_mask: bool `(batch, 1, n, past + n)`; causal when `None`.
            embeddings: `(batch, n, hidden)` in the place of those of `input_ids`, see `select_embeddings`.

        Returns:
            Hidden states for the head and hidden states to feed back, each `(batch, n, hidden)`.
        """
        raise NotImplementedError

    def _untrained(self, num_steps: int) -> torch.Tensor:
        """A batch without a supervised row: nothing to learn, but every parameter is touched, or DDP and FSDP hang."""
        nothing = sum(p.sum() for p in self.parameters() if p.requires_grad) * 0.0
        return self.fc.weight.new_empty(num_steps, 0, self.config.hidden_size) + nothing

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
        draft._freeze()
        return (draft, info) if wants_info else draft

    def _check_loaded(self) -> None:
        """`ValueError` for values that no draft of this kind can have, whatever their names and shapes."""
        if self.d2t is not None:
            check_mapping(self.d2t, self.t2d)
