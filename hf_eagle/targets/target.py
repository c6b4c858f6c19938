"""The frozen target: load and check it, spread it over ranks, ask it for batches that may be packed."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from .architectures import check_returned
from .config_fields import values_of_field
from .decoder_parts import find_decoder
from .document_kernels import needs_own_keys
from .features import (
    HeadSummary,
    TargetDistribution,
    TargetFeatures,
    by_draft_head,
    by_whole_head,
    summarize_head,
)
from .loading import load_causal_lm
from .media_inputs import MEDIA, check_media, rope_index
from .packed_attention import Segments, stands_in_for
from .packed_run import check_padding_is_right, is_plain, keeps_documents_apart, packed_features
from .shard_layout import loading_arguments
from .sharding import TargetSharding, check_weights, move_shards_to_main_memory
from .tapped import TappedModel
from .teacher_check import check_teacher
from .vision_sizes import VisionSizes


logger = logging.getLogger(__name__)

TAP_METHODS = ("hooks", "output_hidden_states")


class FrozenTarget(TappedModel):
    """A causal language model that only runs forward: no gradients, no optimiser state, and nothing of it is saved.

    The first call compares what a draft would be taught with the model's own forward, see `check_teacher`.

    Args:
        model (`PreTrainedModel`), tap_ids (`list[int]`, *optional*): as for [`TappedModel`].
        tap_method (`str`, defaults to `"hooks"`): or `"output_hidden_states"`, where layers cannot be hooked.

    Raises:
        ValueError: for a tap id that the model does not have or the method does not return, an unknown method, or
            weights that would teach nonsense (on the meta device, zeroed, or distributed in part).

    Example:
        >>> target = FrozenTarget.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", tap_ids=[2, 15, 27])
        >>> target(input_ids).taps.shape  # (batch, length, 3 * 576)
    """

    def __init__(self, model: PreTrainedModel, tap_ids: list[int] | None = None, tap_method: str = "hooks"):
        if tap_method not in TAP_METHODS:
            raise ValueError(f"`tap_method` must be one of {', '.join(TAP_METHODS)}, got {tap_method!r}.")

        check_weights(model)
        self.tap_method = tap_method
        self.sharding = TargetSharding.of(model)
        super().__init__(model)
        self.decoder = find_decoder(model)
        self.packing_gap: float | None = None  # see `keeps_documents_apart`
        self._by_segments = stands_in_for(self.decoder, recurrent=bool(self.mixers))
        self._said_quadratic = False

        # every rank must know whether segment attention works before one of them meets the first padding
        if self.sharding is not None and (self._by_segments or not is_plain(self)):
            documents = torch.arange(2, device=self.device)[None]  # two of one token each
            if keeps_documents_apart(self):
                self(torch.ones_like(documents), documents=documents)

        self.tap_ids = tap_ids

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        tap_ids: list[int] | None = None,
        dtype: str | torch.dtype = "auto",
        gguf_file: str | None = None,
        attn_implementation: str | None = None,
        tap_method: str = "hooks",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        revision: str = "main",
        sharding: str = "none",
        shard_size: int | None = None,
        cpu_offload: bool = False,
        media: bool = False,
    ) -> "FrozenTarget":
        """Load and freeze any causal language model, also one that takes images, a GGUF file or a PEFT adapter.

        Args:
            dtype: `"auto"` keeps the checkpoint's dtype.
            device: where to put it; `None` is the default device. A sharded target stays on its rank's device.
            sharding, shard_size, cpu_offload: how to spread it over ranks, see `shard_layout.layout_of`. All ranks must
                then load it, and run it equally often.
            media: whether it is to be shown images or videos. Without, of some models only the text part is loaded.

        Raises:
            ValueError: if it cannot be spread as asked.
        """
        hub = {"trust_remote_code": trust_remote_code, "revision": revision}
        spread = loading_arguments(name_or_path, sharding, shard_size, cpu_offload, gguf_file, **hub)
        model = load_causal_lm(
            name_or_path,
            dtype=dtype,
            gguf_file=gguf_file,
            attn_implementation=attn_implementation,
            media=media,
            **hub,
            **spread,
        )

        if cpu_offload:
            move_shards_to_main_memory(model)
        if spread:  # the ranks' devices are already chosen
            device = None
        target = cls(model if device is None else model.to(device), tap_ids, tap_method)

        if target.sharding is not None:
            logger.info("%s", target.sharding.describe(model))
        return target

    def _checked_taps(self, tap_ids: list[int]) -> list[int]:
        tap_ids = super()._checked_taps(tap_ids)
        if self.tap_method == "output_hidden_states":
            check_returned(self.model, tap_ids, self.num_layers)
        return tap_ids

    @property
    def device(self) -> torch.device:
        return super().device if self.sharding is None else self.sharding.device

    def to(self, device: str | torch.device) -> "FrozenTarget":
        """Move it; a sharded target stays where its ranks are."""
        if self.sharding is None:
            self.model.to(device)
        return self

    def compile(self, **options: Any) -> "FrozenTarget":
        """`torch.compile` the model in place, for batches of any length; hooks still record the taps.

        Raises:
            ValueError: if the target is sharded.
        """
        if self.sharding is not None:
            raise ValueError("`compile_target` cannot be combined with `target_sharding`: leave one of them out.")
        self.model.compile(**{"dynamic": True, **options})
        return self

    @torch.no_grad()
    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        segments: Segments | None = None,
        vision_sizes: VisionSizes | None = None,
        **inputs: Any,
    ) -> TargetFeatures:
        """Features of a batch, see `features`; all ranks of a sharded target must call it, each with its own batch."""
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {"position_ids": position_ids, "documents": documents}
        if self.sharding is None or self.sharding.mode != "tensor":  # there ranks send each other tensors only
            inputs |= {"segments": segments, "vision_sizes": vision_sizes}
        return self.features(**inputs) if self.sharding is None else self.sharding.run(self.features, inputs)

    runs_here = True  # its layers; those of a [`ServedTarget`] do not
    # a target in this process runs a batch when a step needs it, and has nothing to do before
    ask_ahead: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    def forget_asked(self) -> None:
        """Drop what was asked ahead: nothing here."""

    def told_to_card(self) -> list[str]:
        """Sentences for the draft's model card, without their full stops: none of a target in this process."""
        return []

    def check(self) -> None:
        """Compare what a draft would be taught with the model's own forward, once."""
        check_teacher(self)

    @torch.no_grad()
    def features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        segments: Segments | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        vision_sizes: VisionSizes | None = None,
        **inputs: Any,
    ) -> TargetFeatures:
        """Features of a batch; no `(batch, length, vocabulary)` logits are made.

        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`, 0 on padding of either side, or the model's own 4-D form (a dict of them
                where it has layers of several kinds).
            position_ids: `(batch, length)`, or `(3, batch, length)` of a target with m-RoPE; by default counted along
                the tokens of each document, with media as the model's own `get_rope_index` says.
            documents: `(batch, length)` ids of packed documents, which do not see each other; negative on padding.
            segments: the documents, or the rows without padding, if they were found before; this spares a wait.
            past_key_values, use_cache: as in `transformers`, for decoding.
            vision_sizes: what the vision tower would compute from sizes that it reads from the device.
            inputs: whatever else the model's forward takes (images, video grids); `None` values are left out.

        Raises:
            ValueError: if this target cannot keep documents apart, does not take the media given, or returns logits
                other than its head's.
        """
        self.check()
        inputs = {name: value for name, value in inputs.items() if value is not None}

        check_media(self.model, inputs)
        has_2d_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
        if past_key_values is not None or use_cache:
            inputs.update(past_key_values=past_key_values, use_cache=use_cache)

        if documents is not None:
            if inputs or (attention_mask is not None and not has_2d_mask):
                raise ValueError(
                    f"`documents` packs plain text, but {', '.join(inputs) or 'a 4-D `attention_mask`'} came with it: "
                    "leave out one of the two."
                )

            if has_2d_mask:
                documents = documents.masked_fill(attention_mask == 0, -1)
            return packed_features(self, input_ids, position_ids, documents, segments)

        # without media, segments replace padding, so no mask is made
        flat_positions = position_ids is None or position_ids.dim() == 2
        if has_2d_mask and flat_positions and not inputs and self._replaces_padding:
            if self._wants_segments(attention_mask, segments):
                return packed_features(self, input_ids, position_ids, attention_mask.long() - 1, segments)

        if has_2d_mask and not is_plain(self) and not inputs and not keeps_documents_apart(self):
            check_padding_is_right(self.model, attention_mask)

        if position_ids is None and past_key_values is None:
            found = self.rope_index(input_ids, attention_mask, **inputs)
            position_ids = None if found is None else found[0]
        if position_ids is None and has_2d_mask and past_key_values is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        if past_key_values is None:
            self._say_quadratic(input_ids.device)
        if vision_sizes is not None:  # added last: the name of one may be that of another family's media
            inputs |= vision_sizes.arguments
        return super().features(input_ids, attention_mask, position_ids, **inputs)

    def rope_index(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Positions `(3, batch, length)` of a batch with media and the offset of the text after them, `(batch,)`."""
        media = {name: inputs[name] for name in MEDIA if name in inputs}
        return rope_index(self.model, input_ids, attention_mask, **media)

    def _say_quadratic(self, device: torch.device) -> None:
        """Warn once if the model's own attention holds all scores of a row; by segments, keys are repeated instead."""
        config, dtype = self.config, self.dtype
        grouped = values_of_field(config, "num_key_value_heads") not in ([], [config.num_attention_heads])
        if self._said_quadratic or self._attention != "sdpa" or not (grouped and needs_own_keys(device, dtype)):
            return

        self._said_quadratic = True
        name = str(dtype).removeprefix("torch.")
        logger.warning(
            "The target's attention takes quadratic memory: its heads share keys, and PyTorch has no other kernel for "
            "that in %s on %s. Load it in bfloat16 (`target_dtype`).",
            *(name, device.type),
        )

    @property
    def _attention(self) -> str:
        return self.decoder.config._attn_implementation

    @property
    def _replaces_padding(self) -> bool:
        """Whether padded batches run as documents: it spares masks, which targets that are not plain may not obey."""
        if is_plain(self):
            return self._by_segments and self._attention == "sdpa"
        return keeps_documents_apart(self)

    def _wants_segments(self, attention_mask: torch.Tensor, segments: Segments | None) -> bool:
        """Whether to run a batch by segments: if rows are padded, or segments are known, since only reading the mask
        tells that nothing is padding."""
        return segments is not None or not attention_mask.all()

    def _recorded(self, entries: list[int], **arguments: Any):
        if self.tap_method == "hooks":
            output, seen = super()._recorded(entries, **arguments)
        else:
            with self._recording([]) as seen:
                output = self.model(output_hidden_states=True, **arguments)
            seen |= {i: output.hidden_states[i] for i in entries}
        if self.sharding is not None:
            self.sharding.release()
        return output, seen

    def teacher_head(self, ids: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
        """The head for training, `(..., hidden)` -> `(..., vocabulary)`, gathered once; call this once a batch.

        Unlike `logits`, its rounding does not depend on how a batch is split.

        Args:
            ids: `(n,)` tokens whose logits are computed, `None` for all.
        """
        return self._head.for_training(ids)

    @torch.no_grad()
    def head_summary(self, hidden: torch.Tensor, chunk: int = 256) -> HeadSummary:
        """What the whole head says of each place of `hidden`, `(positions, hidden)`; `chunk` as in `distribution`."""
        return summarize_head(self.teacher_head(), hidden, chunk)

    @torch.no_grad()
    def distribution(
        self,
        hidden: torch.Tensor,
        draft_ids: torch.Tensor | None,
        dtype: torch.dtype = torch.float32,
        with_mass: bool = False,
        chunk: int = 256,
        head_summary: HeadSummary | None = None,
    ) -> TargetDistribution:
        """What the target predicts at each place, streamed in chunks of rows.

        Args:
            hidden: `(positions, hidden)` after the final norm.
            draft_ids: `(draft_vocab,)` target ids of the draft vocabulary, `None` for the whole vocabulary.
            dtype: in which the probabilities are kept.
            with_mass: also sum the full softmax, which costs another pass over the whole vocabulary.
            chunk: rows whose full logits exist at a time.
            head_summary: of these `hidden`, if known; then the head's rows outside the draft vocabulary are skipped.
        """
        if head_summary is None or draft_ids is None:
            return by_whole_head(self.teacher_head(), hidden, draft_ids, dtype, with_mass, chunk)
        return by_draft_head(self.teacher_head(draft_ids), head_summary, hidden, draft_ids, dtype, with_mass, chunk)
