"""Drafts that propose one token at a time: training unrolls them, decoding runs them with a cache."""

import torch
from transformers import Cache, DynamicCache

from ..losses.output import EagleOutput, Objective
from ..targets.features import TargetFeatures
from .modeling_base import EaglePreTrainedModel
from .unroll_plan import UnrollPlan


class UnrolledDraft(EaglePreTrainedModel):
    """A draft that runs on its own output, in training for the steps of its plan. Each kind defines one step."""

    takes_window = True

    def select_features(self, features: TargetFeatures) -> torch.Tensor:
        """Those of the [`TargetFeatures`] that `combine_features` takes: `(batch, length, ...)`.

        Raises:
            ValueError: if the target returned no taps.
        """
        if features.taps is None:
            raise ValueError("Set `tap_ids` of the target before asking it for the features of an EAGLE-3 draft.")
        return features.taps

    def select_positions(self, features, position_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Positions of a batch's tokens: with m-RoPE those of the target, see [`TargetFeatures`]."""
        by_axes = self.config.mrope_section is not None and features.position_ids is not None
        return features.position_ids if by_axes else position_ids

    def select_embeddings(self, features) -> torch.Tensor | None:
        """What replaces the embeddings of a batch's tokens: with `image_embeddings` vision the input of the target's
        first layer, `(batch, length, hidden)`; else `None`."""
        return features.embeddings if self.config.image_embeddings == "vision" else None

    def embed(self, tokens: torch.Tensor, embeddings: torch.Tensor | None, indices=...) -> torch.Tensor:
        """Embeddings of token ids, or the given ones at `indices`, in the draft's dtype."""
        table = self.embed_tokens
        return table(tokens) if embeddings is None else embeddings[indices].to(table.weight.dtype)

    def on_axes(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Positions `(batch, n)`, or `(3, batch, n)`, in the form that this draft takes: the latter only with m-RoPE.

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
        features: TargetFeatures,
        plan: UnrollPlan,
        objective: Objective | None = None,
    ) -> EagleOutput:
        """Unroll all steps in one forward, so that DDP and FSDP see one forward and one backward.

        Args:
            input_ids: `(batch, length)`.
            features: the target's, of every token.
            plan: which rows are unrolled, for how many steps, and at which positions. With m-RoPE, the positions in
                `features` replace the plan's. Step s is shifted by s positions on every axis.
            objective: called once with the head's inputs at every step, `(num_steps, N, hidden)`, and the head.

        Returns:
            [`EagleOutput`].
        """
        self._check_steps(plan.num_steps)
        planned, own = plan.layout.window, self.config.draft_sliding_window
        if planned != own:
            raise ValueError(f"`plan` has the window {planned}, but the draft has {own}: plan with `window={own}`.")

        if plan.layout.rows.numel():
            embeddings = self.select_embeddings(features)
            positions = self.select_positions(features, plan.position_ids)
            hidden = self._unroll(
                input_ids.flatten(),
                self.select_features(features).flatten(0, 1),
                self.on_axes(positions).flatten(-2),
                plan,
                None if embeddings is None else embeddings.flatten(0, 1),
            )
        else:
            hidden = self._untrained(plan.num_steps)

        return EagleOutput(hidden_states=hidden) if objective is None else objective(hidden, self.lm_head)

    def _check_steps(self, num_steps: int) -> None:
        """`ValueError` for more steps than this kind of draft is unrolled for."""

    def _unroll(
        self,
        input_ids: torch.Tensor,
        features: torch.Tensor,
        position_ids: torch.Tensor,
        plan: UnrollPlan,
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The head's inputs for the rows `plan.layout.rows` at every step, `(num_steps, N, hidden)`.

        Args:
            input_ids: `(batch * length,)`.
            position_ids: `(batch * length,)`, with m-RoPE `(3, batch * length)`.
            features: `(batch * length, ...)`.
            plan: which rows are unrolled, and which keys and tokens they need.
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
        """Serving: run rows after those in the cache, and add their keys to it.

        Args:
            input_ids: `(batch, n)`, for each row the NEXT token.
            hidden: `(batch, n, hidden)` from `combine_features`, or fed back by an earlier call.
            position_ids: `(batch, n)` of the rows, with m-RoPE also `(3, batch, n)`.
            past_key_values: cache of one layer.
            attention_mask: bool `(batch, 1, n, past + n)`; causal when `None`.
            embeddings: `(batch, n, hidden)` instead of those of `input_ids`, see `select_embeddings`.

        Returns:
            Hidden states for the head and hidden states to feed back, each `(batch, n, hidden)`.
        """
        raise NotImplementedError

    def drafted_logits(self, next_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """See [`EaglePreTrainedModel.drafted_logits`]: of all rows of features, then of one drafted row a step."""
        rows, cache, found = len(features), DynamicCache(), []
        hidden = self.combine_features(features[None])

        for start, end in ((0, rows), *((row, row + 1) for row in range(rows, len(next_ids)))):
            positions = torch.arange(start, end)[None]
            result, hidden = self.decode(next_ids[None, start:end], hidden, positions, cache)
            found.append(self.compute_logits(result[0]))
            hidden = hidden[:, -1:]
        return torch.cat(found)

    def _untrained(self, num_steps: int) -> torch.Tensor:
        """The hidden states of a batch without a supervised row."""
        return self.fc.weight.new_empty(num_steps, 0, self.config.hidden_size) + self.nothing()
