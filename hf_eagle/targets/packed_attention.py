"""Causal attention inside each document of a packed row, without a mask of the whole row.

A batch runs as one long row of its real tokens, so that padding costs nothing. `transformers` gets an attention
function that calls fused causal kernels, see `document_kernels.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .document_kernels import attend_documents, attend_documents_compiled, longest_of


# the name must hold none of "sdpa", "flash" and "flex", which transformers searches names for
NAME = "eagle_segments"
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}
# what some models pass along and causal attention does not use
_IRRELEVANT = {"position_ids", "cache_position", "use_cache", "output_hidden_states", "output_router_logits"}


class CannotStandIn(Exception):
    """A model asks its attention for more than causal attention inside documents."""


@dataclass
class Segments:
    """The documents of a batch, end to end.

    Attributes:
        tokens: int64 `(N,)`, flat ids `b * length + t` of the tokens of documents, ascending: padding is left out.
        position_ids: int64 `(N,)`, counted from each document's start.
        bounds: places of the documents in `tokens`: document `i` is `bounds[i] .. bounds[i + 1] - 1`.
        bounds_there: the same in int32, where the tokens are.
        bounds_here: the same in int64, on the CPU; of a batch that is compiled.
        attended: how many layers have attended by them.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    bounds: list[int]
    bounds_there: torch.Tensor | None = None
    bounds_here: torch.Tensor | None = None
    attended: int = 0

    def __post_init__(self):
        if self.bounds_there is None:
            self.bounds_there = torch.tensor(self.bounds, dtype=torch.int32).to(self.tokens.device)

    def anew(self, compiled: bool) -> "Segments":
        """The same for a new forward, in which no layer has attended yet."""
        return replace(self, attended=0, bounds_here=torch.tensor(self.bounds) if compiled else None)

    @classmethod
    def of(cls, documents: torch.Tensor) -> "Segments":
        """From `(batch, length)` document ids, negative on padding; a document is a run of one id in one row."""
        device, (_, length) = documents.device, documents.shape
        labels = documents.flatten().cpu()  # the one transfer from the device
        tokens = (labels >= 0).nonzero()[:, 0]

        labels, rows = labels[tokens], tokens // length
        starts = torch.ones_like(tokens, dtype=torch.bool)
        starts[1:] = (labels[1:] != labels[:-1]) | (rows[1:] != rows[:-1])

        first = starts.nonzero()[:, 0]
        indices = torch.arange(len(tokens))
        positions = indices - first[starts.cumsum(0) - 1]
        return cls(tokens.to(device), positions.to(device), [*first.tolist(), len(tokens)])

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Segments":
        """The same documents, with each tensor changed, for instance moved."""
        tensors = ("tokens", "position_ids", "bounds_there")
        return replace(self, **{name: change(getattr(self, name)) for name in tensors})

    @cached_property
    def rows(self) -> list["DocumentRows"]:
        """The documents as rows, in groups of similar length: less than half of a group is padding."""
        groups: dict[int, list[int]] = {}
        for document, (start, end) in enumerate(pairwise(self.bounds)):
            groups.setdefault((end - start - 1).bit_length(), []).append(document)
        return [self._rows_of(documents) for documents in groups.values()]

    @cached_property
    def all_rows(self) -> "DocumentRows":
        """The same as one group, of the longest document's length."""
        return self._rows_of(list(range(len(self.bounds) - 1)))

    def _rows_of(self, documents: list[int]) -> "DocumentRows":
        """Compute the indices on the host, which knows the bounds."""
        bounds = torch.tensor(self.bounds)
        starts, lengths = bounds[documents], bounds.diff()[documents]
        steps = torch.arange(int(lengths.max()))

        present = steps < lengths[:, None]
        index = starts[:, None] + torch.minimum(steps, lengths[:, None] - 1)
        places = present.flatten().nonzero()[:, 0]
        beyond = (steps - lengths[:, None] + 1).clamp_min(0)
        return DocumentRows(*(x.to(self.tokens.device) for x in (index, places, index[present], beyond)))

    def flash_arguments(self) -> dict:
        """The same for `flash_attention_*` in `transformers`, whose kernels take the bounds themselves."""
        longest, sides = longest_of(self.bounds), ("q", "k")
        return {f"cu_seq_lens_{s}": self.bounds_there for s in sides} | {f"max_length_{s}": longest for s in sides}


@dataclass
class DocumentRows:
    """Documents as rows, padded on the right, where no causal layer sees it.

    Attributes:
        index: `(documents, longest)`, places in `Segments.tokens`; padding repeats a document's last token.
        places: `(n,)`, the flat places of tokens in it, without padding.
        tokens: `(n,)`, what stands there: `index.flatten()[places]`.
        beyond: `(documents, longest)`, how far padding stands behind its document's last token, 0 for tokens.
    """

    index: torch.Tensor
    places: torch.Tensor
    tokens: torch.Tensor
    beyond: torch.Tensor


def stands_in_for(decoder: PreTrainedModel, recurrent: bool = False) -> bool:
    """Return whether the decoder's attention is `softmax(q k) v`, causal, with at most a sliding window.

    Models with sinks, soft caps or chunks keep their own attention.

    Args:
        recurrent: it has recurrent layers as well, see `recurrent`; their types are no reason against it.
    """
    config = decoder.config
    return (
        (recurrent or takes_document_masks(decoder))
        and getattr(decoder, "_supports_sdpa", False)  # false for gpt-oss, which has sinks
        and getattr(config, "attn_logit_softcapping", None) is None
        and getattr(config, "attention_chunk_size", None) is None
    )


def takes_document_masks(decoder: PreTrainedModel) -> bool:
    """Return whether a 4-D mask, see `documents_mask`, keeps documents apart in all that the decoder computes."""
    return (
        decoder.is_backend_compatible()
        and not getattr(decoder, "_is_stateful", False)
        and set(getattr(decoder.config, "layer_types", None) or ()) <= _PLAIN_LAYERS
    )


@contextmanager
def segment_attention(decoder: PreTrainedModel) -> Iterator[None]:
    """Let the decoder attend by segments within the block; its forward then needs `segments=`.

    Only the decoder is switched: the vision tower of a multimodal model keeps its own attention.
    """
    own = decoder.config._attn_implementation
    decoder.set_attn_implementation(NAME)
    try:
        yield
    finally:
        decoder.set_attn_implementation(own)


def attend_by_segments(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = -1,
    is_causal: bool | None = None,
    segments: Segments | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """An attention function of `transformers`: causal attention in each segment, GQA by the kernel.

    Args:
        query, key, value: `(1, heads, N, head_dim)`; values may have another width.
        sliding_window: keys that a query sees, including its own.
        segments: from the forward's keyword arguments.

    Returns:
        `(1, N, heads, value_dim)`, and `None` for the weights.

    Raises:
        CannotStandIn: if the model asks for anything that this does not compute.
    """
    asked = [name for name, x in others.items() if x is not None and x is not False and name not in _IRRELEVANT]

    if sliding_window == -1:  # not passed
        sliding_window = None
        if getattr(getattr(module, "config", None), "sliding_window", None):
            asked.append("a sliding window")

    if is_causal is False or getattr(module, "is_causal", True) is False:
        asked.append("attention that is not causal")
    if segments is None or attention_mask is not None:
        asked.append("a mask of its own")

    if asked:
        raise CannotStandIn(", ".join(asked))

    segments.attended += 1
    rows, there = (query, key, value), segments.bounds_there
    if torch.compiler.is_compiling():
        return attend_documents_compiled(*rows, segments.bounds_here, there, scaling, sliding_window), None
    return attend_documents(*rows, segments.bounds, there, scaling, sliding_window), None


def documents_mask(config, documents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | dict[str, torch.Tensor]:
    """The mask for a model with its own attention: 0 where a token sees another, the lowest number elsewhere.

    Returns:
        `(batch, 1, length, length)`, or one for each type of layer if some of them slide.
    """
    indices = torch.arange(documents.shape[1], device=documents.device)
    behind = indices[:, None] - indices
    seen = (documents[:, None, :, None] == documents[:, None, None, :]) & (behind >= 0)

    def additive(seen: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)

    window, layer_types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = "sliding_attention" in layer_types if layer_types else window is not None
    if not slides:
        return additive(seen)

    sliding = additive(seen & (behind < window))
    return {"full_attention": additive(seen), "sliding_attention": sliding} if layer_types else sliding


def _no_mask(*args, use_vmap: bool = False, **kwargs) -> None:
    # a model sets it for masks that it adds to the causal one, for instance among the tokens of an image
    if use_vmap:
        raise CannotStandIn("a mask of its own")


AttentionInterface.register(NAME, attend_by_segments)
AttentionMaskInterface.register(NAME, _no_mask)
