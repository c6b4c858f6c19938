"""The EAGLE-3 / 3.1 draft, as vLLM and SGLang run it (contract section 2), and the unroll that trains it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..attention import DraftAttention, EagleAttention, side_by_side
from ..cast_weights import CastWeights
from ..layers import DraftLayer, EagleRMSNorm
from ..modeling_unrolled import UnrolledDraft
from ..mrope import EagleMRotaryEmbedding
from ..probe import Probe
from ..ttt_attention import shared_by_steps, ttt_attention
from ..unroll_plan import UnrollPlan
from .configuration import EagleConfig
from .probes import probes_of
from .proposal import Eagle3Proposer


class EagleDecoderLayer(DraftLayer):
    """The draft's one layer: two norms, attention, SwiGLU."""

    def __init__(self, config: EagleConfig, attention: DraftAttention):
        super().__init__(config, attention)
        self.input_layernorm = EagleRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = EagleRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def attention_input(self, embeds: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., 2 * hidden)`, embeddings first."""
        return torch.cat([self.input_layernorm(embeds).to(hidden.dtype), self.hidden_norm(hidden)], dim=-1)


class Eagle3Draft(UnrolledDraft):
    """EAGLE-3 draft: taps -> `fc` -> one layer over `cat(embedding, hidden)` -> head over the draft vocabulary.

    Row `i` holds the taps of token `i` and the embedding of token `i + 1`; it predicts token `i + 2`. A subclass
    chooses the attention in the layer.
    """

    config_class = EagleConfig
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
        self.rotary_emb = self.rotary_of(config)
        self.gradient_checkpointing = False  # switched by `gradient_checkpointing_enable`: one checkpoint a TTT step

        self.register_vocabulary(config)
        self.post_init()
        self.freeze()

    def rotary_of(self, config: EagleConfig) -> LlamaRotaryEmbedding:
        """What makes the RoPE tables of a draft with this config."""
        return LlamaRotaryEmbedding(config)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def probes(self, target, bases=()) -> list[Probe]:
        """See [`EaglePreTrainedModel.probes`]."""
        return probes_of(self, target, bases)

    @torch.no_grad()
    def take_target_head(self, weight: torch.Tensor) -> None:
        """Initialise from the target: the head from the rows of its head, `(vocab_size, hidden)`, and `fc` so that it
        passes the last tap through. Then the draft's residual stream starts as the target's, which the head expects."""
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

    def _unroll(self, input_ids, features, position_ids, plan, embeddings=None) -> torch.Tensor:
        """The whole training-time test: all steps, with teacher-forced tokens and the draft's own hidden states.

        Step 0 makes a key and a value for every row that is looked at; all else is computed only for the unrolled rows.
        That is exact in a draft of one layer: later steps see only step-0 keys and their own row.
        """
        casts, layout = CastWeights(self.midlayer), plan.layout  # all else is used once
        with casts:
            run = TTTUnroll(self, input_ids, position_ids, plan, embeddings)
            hidden = self.combine_features(features[layout.keys])
            key, value = run.context(hidden)

        hidden, own_keys, own_values, normed = hidden[layout.row_in_keys], [], [], []

        step_function = casts.around(run.step)
        if self.gradient_checkpointing and self.training:
            step_function = partial(self._gradient_checkpointing_func, step_function)

        for step in range(plan.num_steps):
            result, hidden, own_key, own_value = step_function(step, hidden, key, value, own_keys, own_values)
            normed.append(result)
            if step:
                own_keys, own_values = [*own_keys, own_key], [*own_values, own_value]

        return torch.stack(normed)

    def feedback(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs of the head and of the next step: the latter is the residual stream, in EAGLE-3.1 the normed one."""
        normed = self.norm(hidden)
        return normed, normed if self.config.norm_output else hidden

    def proposer(self, shape, prompts) -> Eagle3Proposer:
        """See [`EaglePreTrainedModel.proposer`]."""
        return Eagle3Proposer(self, shape, prompts)

    def decode(self, input_ids, hidden, position_ids, past_key_values, attention_mask=None, embeddings=None):
        """See the base class; the head takes normed hidden states."""
        x = self.midlayer.attention_input(self.embed(input_ids, embeddings), hidden)
        cos_sin = self.cos_sin(x, self.on_axes(position_ids))
        attended = self.midlayer.self_attn.behind_cache(x, cos_sin, past_key_values, attention_mask)
        return self.feedback(self.midlayer.finish(hidden, attended))


class LlamaForCausalLMEagle3(Eagle3Draft):
    """The EAGLE-3 draft with grouped-query attention as in Llama."""

    attention_class = EagleAttention

    def rotary_of(self, config: EagleConfig) -> LlamaRotaryEmbedding:
        return super().rotary_of(config) if config.mrope_section is None else EagleMRotaryEmbedding(config)


Projection = Callable[[torch.Tensor], torch.Tensor]


class TTTUnroll:
    """One batch's unroll: what the steps share, and the step itself.

    The layer's input is `cat(embedding, hidden)`, and a projection of it is the sum of one of each half. The token's
    half does not depend on the step, so it is projected once for every token.

    Args:
        draft: the draft, of one layer.
        input_ids: `(batch * length,)`.
        position_ids: `(batch * length,)`, with m-RoPE `(3, batch * length)`.
        plan: which rows are unrolled, which keys they need, and which tokens they meet.
        embeddings: `(batch * length, hidden)` instead of the tokens' own; `None` for those.
    """

    def __init__(
        self,
        draft,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        plan: UnrollPlan,
        embeddings: torch.Tensor | None = None,
    ):
        self.draft, self.layer, self.layout = draft, draft.midlayer, plan.layout
        self.attention = self.layer.self_attn
        self.attend = ttt_attention(draft.config._attn_implementation, input_ids.device)
        self.key_positions = position_ids[..., self.layout.keys]

        token_query, self.hidden_query = halves(self.attention.query_projections, draft.config.hidden_size)
        token_key_value, self.hidden_key_value = halves(self.attention.key_value_projections, draft.config.hidden_size)

        self.tokens = plan.tokens
        embeds = self.layer.input_layernorm(draft.embed(input_ids[self.tokens.ids], embeddings, self.tokens.ids))
        self.key_value_of_token = token_key_value(embeds)
        self.key_value_of_key = self.key_value_of_token[self.tokens.of_key]
        self.query_of_token = token_query(embeds[self.tokens.asked])

        steps = torch.arange(plan.num_steps, device=position_ids.device)[:, None]
        rows = position_ids[..., self.layout.rows].unsqueeze(-2) + steps  # (steps, N), with m-RoPE (3, steps, N)
        self.cos_sin = list(zip(*(table.unbind() for table in draft.cos_sin(self.query_of_token, rows)), strict=True))

    def context(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Step-0 keys and values `(K, kv_heads, dim)` of the rows `layout.keys`, from their features `(K, hidden)`, as
        the attention shares them among the steps."""
        projected = self.key_value_of_key + self.hidden_key_value(self.layer.hidden_norm(hidden))
        key, value = self.attention.key_value(projected, self.draft.cos_sin(projected, self.key_positions))
        return shared_by_steps(self.attend, key), shared_by_steps(self.attend, value)

    def step(self, step: int, hidden: torch.Tensor, key, value, own_keys: list, own_values: list):
        """One TTT step of every row.

        Args:
            hidden: `(N, hidden)`, fed back by the step before.
            key, value: of step 0.
            own_keys, own_values: of earlier steps, without step 0.

        Returns:
            Normed hidden states for the head, hidden states to feed back, and this step's own keys and values.
        """
        normed = self.layer.hidden_norm(hidden)
        projected = self.query_of_token.index_select(0, self.tokens.asked_by_row[step]) + self.hidden_query(normed)
        cos_sin = self.cos_sin[step]
        query = self.attention.query(projected, cos_sin)

        own_key = own_value = None
        if step:
            projected = self.key_value_of_token.index_select(0, self.tokens.of_row[step])
            own_key, own_value = self.attention.key_value(projected + self.hidden_key_value(normed), cos_sin)
            own_keys, own_values = [*own_keys, own_key], [*own_values, own_value]

        attended = self.attend(query, key, value, own_keys, own_values, self.layout, self.attention.scaling)
        return *self.draft.feedback(self.layer.finish(hidden, attended)), own_key, own_value


def halves(projections: list[nn.Module], width: int) -> tuple[Projection, Projection]:
    """The concatenated projections of `cat(first, second)`, as one function of each half; add the two results.

    Inside [`CastWeights`]: autocast would cast a part of a weight at every use.
    """
    if not all(type(projection) is nn.Linear for projection in projections):  # an adapter is more than its weight
        return (
            lambda first: side_by_side(projections, torch.cat([first, torch.zeros_like(first)], dim=-1)),
            lambda second: side_by_side(projections, torch.cat([torch.zeros_like(second), second], dim=-1)),
        )

    first, second = torch.cat([projection.weight for projection in projections]).split(width, dim=1)
    return lambda x: linear(x, first), lambda x: linear(x, second)
