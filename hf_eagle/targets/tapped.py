"""Run a target: tap its layers, read its last hidden states, and apply its head to them."""

import inspect
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from .architectures import check_tap_ids
from .decoder_parts import DecoderParts, find_decoder_parts
from .features import TargetFeatures
from .head import TargetHead, plain_embedding
from .media_inputs import complete_text_output, shows_media
from .recurrent import Mixers, find_mixers


# the config's field for the number of residual streams that layers pass on (DeepSeek-V4)
_STREAMS = "hc_mult"


class _Hooks:
    """Registered hooks, and where they write what they see; nowhere while `seen` is `None`."""

    def __init__(self, tap_ids: list[int]):
        self.tap_ids, self.handles = tap_ids, []
        self.seen: dict[int | str, torch.Tensor] | None = None


class TappedModel:
    """A causal language model whose layers are tapped and whose head is read: all that decoding asks of a target.

    Taps are recorded at a layer's ENTRY, id `k` being the input of layer `k` and id `N` the final norm's, as vLLM does
    (contract section 1).

    Args:
        model (`PreTrainedModel`): it is frozen and put into evaluation mode.
        tap_ids (`list[int]`, *optional*): ascending entry ids; set later through the attribute when not yet known, and
            left out for a draft that looks at the last hidden state only.

    Raises:
        ValueError: for a tap id that the model does not have, or a model whose layers are not found.
    """

    sharding = None  # only a [`FrozenTarget`] can be spread over ranks

    def __init__(self, model: PreTrainedModel, tap_ids: list[int] | None = None):
        self.model = model.eval().requires_grad_(False)
        self.config = model.config.get_text_config()
        self.parts = self._parts_of(model)
        complete_text_output(model)
        # what the model's forward calls its cache: transformers 5.24 renames it, and warns when called by the old name
        parameters = inspect.signature(model.forward).parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._hooks: _Hooks | None = None
        self._head = TargetHead(self.parts.head, self.config, sharded=self.sharding is not None)
        self.tap_ids = tap_ids

    @staticmethod
    def _parts_of(model: PreTrainedModel) -> DecoderParts:
        return find_decoder_parts(model)

    @cached_property
    def mixers(self) -> Mixers:
        """Its modules that carry a state from token to token; looked for once, see `find_mixers`."""
        return find_mixers(self.model)

    @property
    def tap_ids(self) -> list[int] | None:
        return self._tap_ids

    @tap_ids.setter
    def tap_ids(self, tap_ids: list[int] | None):
        self._tap_ids = self._checked_taps(tap_ids) if tap_ids else tap_ids

    def _checked_taps(self, tap_ids: list[int]) -> list[int]:
        streams = getattr(self.config, _STREAMS, None) or 1
        if streams > 1:
            raise ValueError(self._several_streams(f"in {streams} streams"))
        return check_tap_ids(tap_ids, self.num_layers)

    def _several_streams(self, seen: str) -> str:
        return (
            f"The target {type(self.model).__name__} ({self.config.model_type}) keeps what goes from layer to layer "
            f"{seen}, and a tap is one vector of {self.hidden_size} for each token, so use another target, or "
            "`--method eagle1`, which has no taps."
        )

    @property
    def num_layers(self) -> int:
        return len(self.parts.layers)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def check(self) -> None:
        """Run what is checked once, by forwards of its own: nothing here, in a [`FrozenTarget`] what it teaches."""

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, **inputs: Any) -> TargetFeatures:
        """Features of a batch, see `features`."""
        return self.features(input_ids, **inputs)

    def features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        **inputs: Any,
    ) -> TargetFeatures:
        """Features of a batch; no `(batch, length, vocabulary)` logits are made.

        Args:
            input_ids: `(batch, length)`.
            attention_mask, position_ids, past_key_values, use_cache: as the model's own forward takes them.
            inputs: whatever else it takes (images, video grids).
        """
        inputs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        features = self._forward(
            input_ids, shows_media(inputs), past_key_values=past_key_values, use_cache=use_cache, **inputs
        )
        if position_ids is not None and position_ids.dim() == 3:
            features.position_ids = position_ids
        return features

    def _forward(self, input_ids: torch.Tensor, with_embeddings: bool = False, **arguments: Any) -> TargetFeatures:
        """Run the model and record; `None` arguments are left out."""
        arguments = {"use_cache": False, **{name: x for name, x in arguments.items() if x is not None}}
        use_cache = arguments["use_cache"]
        arguments = self._with_cache(arguments)

        tap_ids = self.tap_ids or []
        # an index of no position: the head runs on nothing (`1` would expand its weight once a sequence)
        no_logits = torch.empty(0, dtype=torch.long, device=input_ids.device)
        entries = sorted({*tap_ids, *([0] if with_embeddings else ())})
        output, seen = self._recorded(entries, input_ids=input_ids, logits_to_keep=no_logits, **arguments)
        return TargetFeatures(
            taps=torch.cat([seen[i] for i in tap_ids], dim=-1) if tap_ids else None,
            last_hidden=seen["last_hidden"],
            past_key_values=getattr(output, self.cache_argument) if use_cache else None,
            embeddings=seen[0] if with_embeddings else None,
        )

    def _with_cache(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The same arguments with the cache by the name that this model has for it."""
        cache = arguments.pop("past_key_values", None)
        if cache is None:
            return arguments
        # with `use_cache`, some hybrids refuse a cache of another class than theirs (MiniMax); without, they use it
        return {**arguments, self.cache_argument: cache, "use_cache": not self.mixers}

    def decode(self, **arguments: Any):
        """The model's own forward, with logits, for decoding; arguments as for `features`."""
        return self.model(**self._with_cache(arguments))

    def _recorded(self, entries: list[int], **arguments: Any):
        """The output of one forward, and what was seen in it: a tensor for each of `entries`, and `"last_hidden"`."""
        with self._recording(entries) as seen:
            return self.model(output_hidden_states=False, **arguments), seen

    @contextmanager
    def _recording(self, tap_ids: list[int]):
        """What one forward shows. Hooks of a compiled model stay, and are idle between its forwards: for every new hook
        PyTorch 2.9 compiles it again."""
        if self._hooks is None or self._hooks.tap_ids != tap_ids:
            self._drop_hooks()
            self._hooks = self._hooked(tap_ids)

        self._hooks.seen = seen = {}
        try:
            yield seen
        finally:
            self._hooks.seen = None
            if self.model._compiled_call_impl is None:
                self._drop_hooks()

    def _drop_hooks(self) -> None:
        if self._hooks is not None:
            for handle in self._hooks.handles:
                handle.remove()
        self._hooks = None

    def _hooked(self, tap_ids: list[int]) -> "_Hooks":
        """Register a pre-hook at every tapped entry, and one behind the final norm."""
        hooks = _Hooks(tap_ids)

        def entry(tap_id):
            def record(module, args, kwargs):
                seen = hooks.seen
                if seen is None:
                    return
                if tap_id in seen:
                    raise ValueError(
                        f"The target {type(self.model).__name__} ({self.config.model_type}) runs its layer {tap_id} "
                        "several times in one forward, so a tap there has no one value: use another target."
                    )
                found = args[0] if args else kwargs["hidden_states"]
                if found.dim() != 3 or found.shape[-1] != self.hidden_size:
                    raise ValueError(self._several_streams(f"as {tuple(found.shape)}"))
                seen[tap_id] = found

            return record

        def after_norm(module, args, output):
            if hooks.seen is not None:
                hooks.seen["last_hidden"] = output

        entries = [*self.parts.layers, self.parts.final_norm]
        hooks.handles = [entries[i].register_forward_pre_hook(entry(i), with_kwargs=True) for i in tap_ids]
        hooks.handles.append(self.parts.final_norm.register_forward_hook(after_norm))
        return hooks

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The target's logits `(..., vocabulary)` of post-norm hidden states `(..., hidden)`."""
        return self._head.logits(hidden)

    def head_weight(self) -> torch.Tensor:
        """`(vocabulary, hidden)`: the head, gathered when it is sharded, dequantised when it is quantised."""
        return self._head.table(self.model.dtype, self.device)

    def embedding_weight(self) -> torch.Tensor:
        """`(vocabulary, hidden)`: the input embedding, gathered when it is sharded."""
        return plain_embedding(self.model.get_input_embeddings())
