"""The EAGLE-3 / 3.1 draft, as vLLM and SGLang run it (contract section 2), and its form with Llama attention."""

from functools import partial

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..attention import DraftAttention, EagleAttention
from ..layers import DraftLayer, EagleRMSNorm
from ..modeling_base import EaglePreTrainedModel
from ..mrope import EagleMRotaryEmbedding
from .configuration import EagleConfig
from .unroll import TTTUnroll


class EagleDecoderLayer(DraftLayer):
    """The draft's one layer: two norms in front, attention, SwiGLU."""

    def __init__(self, config: EagleConfig, attention: DraftAttention):
        super().__init__(config, attention)
        self.input_layernorm = EagleRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = EagleRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def attention_input(self, embeds: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., 2 * hidden)`, embeddings first."""
        return torch.cat([self.input_layernorm(embeds).to(hidden.dtype), self.hidden_norm(hidden)], dim=-1)


class Eagle3Draft(EaglePreTrainedModel):
    """EAGLE-3 draft: taps -> `fc` -> one layer over `cat(embedding, hidden)` -> head over the draft vocabulary.

    Row `i` holds the taps of token `i` and the embedding of token `i + 1`; it predicts token `i + 2`. What attends
    inside the layer is a subclass's.
    """

    attention_class: type[DraftAttention]

    def __init__(self, config: EagleConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.fc_norm:
            norms = [EagleRMSNorm(config.target_hidden_size, config.rms_norm_eps) for _ in range(config.num_taps)]
            self.fc_norm = nn.ModuleList(norms)
        self.fc = nn.Linear(config.num_taps * config.target_hidden_size, config.hidden_size, bias=False)
        self.midlayer = EagleDecoderLayer(config, self.attention_class(config, 2 * config.hidden_size))
        self.norm = EagleRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary_emb = (LlamaRotaryEmbedding if config.mrope_section is None else EagleMRotaryEmbedding)(config)
        self.gradient_checkpointing = False  # switched by `gradient_checkpointing_enable`: one checkpoint a TTT step
        self._register_vocabulary(config)
        self.post_init()
        self._freeze()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    @torch.no_grad()
    def start_from_target(self, weight: torch.Tensor) -> None:
        """Start in the target's terms: the head from the rows of its own, `(vocab_size, hidden)`, which are at home in
        its residual stream, and `fc` passing its last tap through, so that the draft's stream is the same one."""
        self.lm_head.weight.copy_(weight if self.d2t is None else weight[self.draft_ids.to(weight.device)])
        if self.config.target_hidden_size == self.config.hidden_size:
            self.fc.weight[:, -self.config.hidden_size :].diagonal().add_(1)

    def combine_features(self, taps: torch.Tensor) -> torch.Tensor:
        """`(..., taps * target_hidden)` -> `(..., hidden)`."""
        taps = taps.to(self.fc.weight.dtype)
        if self.config.fc_norm:
            chunks = taps.chunk(self.config.num_taps, dim=-1)
            taps = torch.cat([norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], dim=-1)
        return self.fc(taps)

    def _unroll(self, input_ids, features, position_ids, layout, num_steps: int, embeddings=None) -> torch.Tensor:
        """The whole training-time test: `num_steps` steps, teacher-forced tokens, own hidden states.

        Step 0 makes a key and a value for every row that is looked at; all else is computed for the unrolled rows only,
        which is exact in a draft of one layer: later steps see nothing but step-0 keys and their own row.
        """
        run = TTTUnroll(self, input_ids, position_ids, layout, num_steps, embeddings)
        hidden = self.combine_features(features[layout.keys])
        key, value = run.context(hidden)
        hidden, own_keys, own_values, normed = hidden[layout.row_in_keys], [], [], []
        step_function = run.step
        if self.gradient_checkpointing and self.training:
            step_function = partial(self._gradient_checkpointing_func, run.step)
        for step in range(num_steps):
            result, hidden, own_key, own_value = step_function(step, hidden, key, value, own_keys, own_values)
            normed.append(result)
            if step:
                own_keys, own_values = [*own_keys, own_key], [*own_values, own_value]
        return torch.stack(normed)

    def feedback(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head sees and what the next step gets: the residual stream, or with EAGLE-3.1 the normed one."""
        normed = self.norm(hidden)
        return normed, normed if self.config.norm_output else hidden

    def decode(self, input_ids, hidden, position_ids, past_key_values, attention_mask=None, embeddings=None):
        """As the base class says; the head takes normed hidden states."""
        x = self.midlayer.attention_input(self.embed(input_ids, embeddings), hidden)
        cos_sin = self.cos_sin(x, self.on_axes(position_ids))
        attended = self.midlayer.self_attn.behind_cache(x, cos_sin, past_key_values, attention_mask)
        return self.feedback(self.midlayer.finish(hidden, attended))


class LlamaForCausalLMEagle3(Eagle3Draft):
    """The EAGLE-3 draft with grouped-query attention as in Llama.

    Example:
        >>> config = EagleConfig.from_target(target.config, draft_vocab_size=8192)
        >>> draft = LlamaForCausalLMEagle3(config)
        >>> draft.set_target_embeddings(target.embedding_weight())
    """

    attention_class = EagleAttention
