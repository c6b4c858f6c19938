"""The EAGLE-1/2 draft, as vLLM and SGLang run it (arXiv 2401.15077, 2406.16858; contract section 3)."""

from functools import partial

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..attention import EagleAttention
from ..cast_weights import CastWeights
from ..layers import DraftLayer
from ..lent_head import LentHead, WithLentHead
from ..modeling_unrolled import UnrolledDraft
from ..probe import Probe
from ..row_layout import RowLayout
from ..ttt_attention import ttt_attention
from .configuration import Eagle1Config
from .probes import probes_of
from .proposal import Eagle1Proposer


class LlamaForCausalLMEagle(WithLentHead, UnrolledDraft):
    """EAGLE-1/2 draft: `fc(cat(embedding, feature))` -> one layer -> the next feature -> the target's own head.

    Row `i` holds the target's last hidden state `f_i`, after its final norm, and the embedding of token `i + 1`. It
    predicts `f_{i+1}`, from which the target's head makes token `i + 2`. Embeddings and head are the target's and are
    never saved. EAGLE-2 is the same draft, decoded with a dynamic draft tree.
    """

    config_class = Eagle1Config

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

    def freeze(self) -> None:
        super().freeze()
        self.fc.bias.requires_grad_(False)

    def _check_loaded(self) -> None:
        super()._check_loaded()
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

    def probes(self, target, bases=()) -> list[Probe]:
        """See [`EaglePreTrainedModel.probes`]."""
        return probes_of(self, target, bases)

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
