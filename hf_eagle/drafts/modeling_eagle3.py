"""The EAGLE-3 / 3.1 draft, as vLLM and SGLang run it (contract section 2), and its form with Llama attention."""

from functools import partial

import torch
from torch import nn
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .attention import DraftAttention, EagleAttention
from .configuration_eagle import EagleConfig
from .layers import EagleMLP, EagleRMSNorm
from .modeling_base import EagleOutput, EaglePreTrainedModel, Objective, complete_batch
from .row_layout import RowLayout
from .unroll import TTTUnroll


class EagleDecoderLayer(nn.Module):
    """The draft's one layer: two norms in front, attention, SwiGLU."""

    def __init__(self, config: EagleConfig, attention: DraftAttention):
        super().__init__()
        norm = {"hidden_size": config.hidden_size, "eps": config.rms_norm_eps}
        self.input_layernorm = EagleRMSNorm(**norm)
        self.hidden_norm = EagleRMSNorm(**norm)
        self.self_attn = attention
        self.post_attention_layernorm = EagleRMSNorm(**norm)
        self.mlp = EagleMLP(config)

    def attention_input(self, embeds: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., 2 * hidden)`, embeddings first."""
        return torch.cat([self.input_layernorm(embeds).to(hidden.dtype), self.hidden_norm(hidden)], dim=-1)

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Residual of the UN-normed hidden state, then the MLP."""
        hidden = hidden + self.self_attn.o_proj(attended.flatten(-2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


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
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
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
    ) -> EagleOutput:
        """The whole training-time test in one forward: `num_steps` steps, teacher-forced tokens, own hidden states.

        Step 0 makes a key and a value for every row that is looked at; all else is computed for `rows` only, which is
        exact in a draft of one layer since later steps see nothing but step-0 keys and their own row.

        Args:
            input_ids: `(batch, length)`.
            features: the taps, `(batch, length, taps * target_hidden)`.
            rows: `(N,)` flat ids `b * length + t` of the rows to unroll, ascending; all rows when `None`.
            num_steps: TTT steps.
            objective: called once with the normed hidden states `(num_steps, N, hidden)` and the head.
            attention_mask: `(batch, length)`, 0 on padding.
            position_ids: `(batch, length)`, counted along the unpadded tokens when `None`.
            documents: `(batch, length)` ids of packed documents, which do not see each other.

        Returns:
            [`EagleOutput`].
        """
        rows, position_ids, documents = complete_batch(input_ids, rows, attention_mask, position_ids, documents)
        if rows.numel() == 0:
            return self._judge(self._untrained(num_steps), objective)

        layout = RowLayout.of(rows, documents)
        run = TTTUnroll(self, input_ids.flatten(), position_ids.flatten(), layout, num_steps)
        hidden = self.combine_features(features.flatten(0, 1)[layout.keys])
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
        return self._judge(torch.stack(normed), objective)

    def feedback(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head sees and what the next step gets: the residual stream, or with EAGLE-3.1 the normed one."""
        normed = self.norm(hidden)
        return normed, normed if self.config.norm_output else hidden

    def decode(
        self,
        input_ids: torch.Tensor,
        hidden: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Cache,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Serving: run rows behind those in the cache, and add their keys to it.

        Args:
            input_ids: `(batch, n)`, for each row the NEXT token.
            hidden: `(batch, n, hidden)` from `combine_features`, or fed back by an earlier call.
            position_ids: `(batch, n)` of the rows.
            past_key_values: cache of one layer.
            attention_mask: bool `(batch, 1, n, past + n)`; causal when `None`.

        Returns:
            Normed hidden states for the head and hidden states to feed back, each `(batch, n, hidden)`.
        """
        x = self.midlayer.attention_input(self.embed_tokens(input_ids), hidden)
        cos_sin = self.cos_sin(x, position_ids)
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
