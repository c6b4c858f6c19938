"""The EAGLE-1/2 draft, as vLLM and SGLang run it (arXiv 2401.15077, 2406.16858; contract section 3)."""

from functools import partial

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ...targets.architectures import logit_transform
from ...targets.few_rows import few_rows_linear
from ..attention import EagleAttention
from ..cast_weights import CastWeights
from ..layers import DraftLayer
from ..modeling_unrolled import UnrolledDraft
from ..ttt_attention import ttt_attention
from ..unroll_plan import RowLayout
from .configuration import Eagle1Config
from .proposal import Eagle1Proposer


class LentHead(nn.Linear):
    """The target's head without its bias, if any, since the servers run drafts without one.

    Attributes:
        transform: what follows the projection (scale, soft cap), `None` for nothing.
    """

    def __init__(self, config: Eagle1Config):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        plain = config.logit_scale is None and config.final_logit_softcapping is None
        self.transform = None if plain else logit_transform(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = few_rows_linear(hidden, self.weight)  # only decoding comes here, without gradients
        return logits if self.transform is None else self.transform(logits)


class LlamaForCausalLMEagle(UnrolledDraft):
    """EAGLE-1/2 draft: `fc(cat(embedding, feature))` -> one layer -> the next feature -> the target's own head.

    Row `i` holds the target's last hidden state `f_i`, after its final norm, and the embedding of token `i + 1`. It
    predicts `f_{i+1}`, from which the target's head makes token `i + 2`. Embeddings and head are the target's and are
    never saved. EAGLE-2 is the same draft, decoded with a dynamic draft tree.
    """

    config_class = Eagle1Config
    _keys_to_ignore_on_save = ["embed_tokens.weight", "lm_head.weight"]
    _keys_to_ignore_on_load_missing = [r"^embed_tokens\.weight$", r"^lm_head\.weight$"]

    def __init__(self, config: Eagle1Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

        # the bias is saved as zeros and not trained: SGLang leaves a missing one random, vLLM runs without one
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=True)
        # no norm before it: the output of `fc` goes straight into attention
        self.layers = nn.ModuleList([DraftLayer(config, EagleAttention(config, config.hidden_size))])
        self.lm_head = LentHead(config)

        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False  # switched by `gradient_checkpointing_enable`

        self.register_vocabulary(config)
        self.post_init()
        self.freeze()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def attach(self, target) -> None:
        """Use what a [`FrozenTarget`] lends its draft and is never saved: its embeddings and its head.

        Raises:
            ValueError: if the draft was made for another target.
        """
        super().attach(target)
        embedding, head = target.embedding_weight(), target.head_weight()
        self.set_target_head(self.embed_tokens.weight if head is embedding else head)

    def set_target_head(self, weight: torch.Tensor) -> None:
        """Use the target's head; storage is shared if dtype and device are the draft's.

        Args:
            weight: `(vocab_size, hidden)`.

        Raises:
            ValueError: if it belongs to another model.
        """
        wanted = (self.config.vocab_size, self.config.hidden_size)
        if tuple(weight.shape) != wanted:
            raise ValueError(
                f"The target's head is {tuple(weight.shape)} but this draft was made for {wanted}: it belongs to "
                "another target."
            )
        self.lm_head.weight = self._lent(weight)

    take_target_head = set_target_head  # a new draft has no head of its own to initialise

    def freeze(self) -> None:
        super().freeze()
        self.lm_head.requires_grad_(False)
        self.fc.bias.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, LentHead):
            # zeros until one is lent, so that `_check_loaded` notices a folder that holds one
            nn.init.zeros_(module.weight)
        else:
            super()._init_weights(module)

    def _check_loaded(self) -> None:
        if self.lm_head.weight.any():
            raise ValueError(
                "This folder holds `lm_head.weight`, but an EAGLE-1 draft uses the target's head, and vLLM refuses "
                "one of its own: remove it."
            )
        if self.fc.bias.any():
            raise ValueError(
                "`fc.bias` of this draft is not zero: vLLM drops it and SGLang adds it, so the two would run different "
                "drafts. Train the draft without one."
            )

    def select_features(self, features) -> torch.Tensor:
        """Those of the [`TargetFeatures`] that `combine_features` takes: `(batch, length, hidden)`."""
        return features.last_hidden

    def combine_features(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., hidden)`, in the draft's dtype: the feature itself is fed back."""
        return features.to(self.embed_tokens.weight.dtype)

    def _layer_input(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.cat([self.embed_tokens(input_ids), hidden], dim=-1))

    def _check_steps(self, num_steps: int) -> None:
        if num_steps != 1:
            raise ValueError(f"`num_steps` of an EAGLE-1 draft must be 1, got {num_steps}.")

    def _unroll(self, input_ids, features, position_ids, plan, embeddings=None) -> torch.Tensor:
        """The next feature of every row; rows before them get only a key and a value."""
        predict = CastWeights(self.fc, self.layers).around(self._predict)
        if self.gradient_checkpointing and self.training:
            predict = partial(self._gradient_checkpointing_func, predict)
        return predict(input_ids, features, position_ids, plan.layout)[None]

    def _predict(self, input_ids, features, position_ids, layout: RowLayout) -> torch.Tensor:
        """Next features of the rows `layout.rows`, `(N, hidden)`."""
        layer = self.layers[0]
        attention = layer.self_attn

        next_tokens = input_ids[(layout.keys + 1).clamp_max(input_ids.numel() - 1)]
        x = self._layer_input(next_tokens, self.combine_features(features[layout.keys]))
        key, value = attention.key_value(attention.project_key_value(x), self.cos_sin(x, position_ids[layout.keys]))

        x = x[layout.row_in_keys]
        query = attention.query(attention.project_query(x), self.cos_sin(x, position_ids[layout.rows]))

        attend = ttt_attention(self.config._attn_implementation, x.device)
        return layer.finish(x, attend(query, key, value, [], [], layout, attention.scaling))

    def proposer(self, shape, prompts) -> Eagle1Proposer:
        """See [`EaglePreTrainedModel.proposer`]."""
        return Eagle1Proposer(self, shape, prompts)

    def decode(self, input_ids, hidden, position_ids, past_key_values, attention_mask=None, embeddings=None):
        """See the base class; the predicted features are both the head's input and what is fed back."""
        x = self._layer_input(input_ids, hidden)
        layer = self.layers[0]
        attended = layer.self_attn.behind_cache(x, self.cos_sin(x, position_ids), past_key_values, attention_mask)
        predicted = layer.finish(x, attended)
        return predicted, predicted
