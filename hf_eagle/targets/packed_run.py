"""Run packed documents through a target, in the fastest way in which none sees another.

1. By segments: all tokens in one row, attention inside each document (`packed_attention`), recurrent layers with a row
   for each document.
2. By a mask of documents: for targets with an attention of their own that obeys masks, and no recurrent layers.
3. By rows: each document is a row of the whole model, padded on the right. This is for all other targets, for instance
   those that choose which keys they attend to (sparse attention), and takes up to twice the time.
"""

import inspect
import logging
import math
from collections.abc import Callable

import torch

from .document_kernels import length_of_all
from .features import TargetFeatures, at_indices
from .packed_attention import CannotStandIn, Segments, documents_mask, segment_attention, takes_document_masks
from .recurrent import Mixer, Way
from .trial import tried


logger = logging.getLogger(__name__)

# relative distance of packed features from those of documents alone up to which it is surely rounding
_ROUNDING = 1e-3
_PROBE = (7, 5)  # tokens of the two documents that a target is checked with


def packed_features(
    target,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    documents: torch.Tensor,
    segments: Segments | None,
) -> TargetFeatures:
    """Features of documents, in the fastest way that this target's layers allow.

    Args:
        target ([`FrozenTarget`]): the target.
        input_ids, position_ids, documents, segments: as for [`FrozenTarget.features`]; positions are flat.

    Raises:
        ValueError: if nothing keeps documents apart in this target.
    """
    compiled = target.model._compiled_call_impl is not None
    segments = (Segments.of(documents) if segments is None else segments).anew(compiled)
    if not keeps_documents_apart(target):
        raise ValueError(
            f"`packing` needs a target that keeps documents apart, but {_seen_of(target)}: train it on padded batches, "
            "or choose another target."
        )

    positions = segments.position_ids
    if position_ids is not None:
        positions = position_ids.expand_as(input_ids).take(segments.tokens)
    flat = input_ids.take(segments.tokens)

    found = _by_segments(target, flat, positions, segments)
    if found is not None:
        return at_indices(found, segments.tokens, input_ids.shape)

    if is_plain(target):
        # transformers derives masks from restarting positions, which leaks between documents in some models (gpt-oss)
        mask = documents_mask(target.decoder.config, documents, target.dtype)
        if position_ids is None:
            position_ids = torch.zeros_like(input_ids).put_(segments.tokens, segments.position_ids)
        return target._forward(input_ids, attention_mask=mask, position_ids=position_ids)

    return at_indices(_by_rows(target, flat, positions, segments), segments.tokens, input_ids.shape)


def is_plain(target) -> bool:
    """Return whether the target has attention alone, of the kinds known to obey masks, so that it needs no trial."""
    return not target.mixers and takes_document_masks(target.decoder)


def _by_segments(target, flat, positions, segments: Segments) -> TargetFeatures | None:
    """All tokens in one row; `None` if the target's attention asks for more than causal attention."""
    inputs = {"input_ids": flat[None], "position_ids": positions[None]}
    documents = target.mixers.run_by(row_for_each(segments))

    by_flash = "flash" in target._attention  # kernels of the Hub too
    if by_flash and (target._by_segments or is_plain(target)):
        with documents:
            return target._forward(**inputs, **segments.flash_arguments())

    # it fails once, on the first batch, where the model's attention asks for more
    if target._by_segments and not by_flash:
        try:
            # of ones, so that transformers does not read the positions to find documents
            unmasked = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
            with segment_attention(target.decoder), documents:
                features = target._forward(**inputs, attention_mask=unmasked, segments=segments)
            # a layer that ignores the switch leaks silently
            if segments.attended < (target.mixers.attending if target.mixers else target.num_layers):
                raise CannotStandIn("a way around the attention interface")
            return features
        except CannotStandIn as asked:
            target._by_segments = False
            logger.warning("The target's attention asks for %s, so batches are masked and padded.", asked)
    return None


def row_for_each(segments: Segments) -> Way:
    """Recurrent layers over one row of all tokens: each document is a row of its own, from an empty state."""

    def run(mixer: Mixer, hidden: torch.Tensor, apply: Callable) -> torch.Tensor:
        length = length_of_all(segments.bounds)
        if length is not None:
            return apply(lambda x: x[0].unflatten(0, (-1, length))).flatten(0, 1)[None]

        output = None
        for rows in segments.rows:
            part = apply(lambda x, rows=rows: x[0][rows.index]).flatten(0, 1)[rows.places]
            output = part.new_empty(hidden.shape[1], part.shape[-1]) if output is None else output
            output.index_copy_(0, rows.tokens, part)
        return output[None]

    return run


def _by_rows(target, flat, positions, segments: Segments) -> TargetFeatures:
    """Each document as a row of the whole model; `(1, tokens, ...)`."""
    taps, last = None, None
    counts_itself = "position_ids" not in inspect.signature(target.model.forward).parameters

    # ranks that share a target run it equally often, whatever the lengths of their documents
    for rows in segments.rows if target.sharding is None else [segments.all_rows]:
        # padding goes on counting, so that no model takes it for another document
        counted = None if counts_itself else positions[rows.index] + rows.beyond
        found = target._forward(flat[rows.index], position_ids=counted)
        last = _put(last, found.last_hidden, rows, len(flat))
        taps = None if found.taps is None else _put(taps, found.taps, rows, len(flat))
    return TargetFeatures(taps=None if taps is None else taps[None], last_hidden=last[None])


def _put(into: torch.Tensor | None, found: torch.Tensor, rows, count: int) -> torch.Tensor:
    into = found.new_empty(count, found.shape[-1]) if into is None else into
    return into.index_copy_(0, rows.tokens, found.flatten(0, 1)[rows.places])


@torch.no_grad()
def keeps_documents_apart(target) -> bool:
    """Return whether packed documents have the features of each alone; targets that are not plain are tried, once.

    All ranks of a sharded target must call this together.
    """
    if not is_plain(target) and target.packing_gap is None:
        target.packing_gap, gap = 0.0, None  # while it is tried
        try:
            gap = _smallest_gap(target)
        finally:
            target.packing_gap = gap
    return not target.packing_gap


def _seen_of(target) -> str:
    """What was seen of a target that does not keep documents apart."""
    name, gap = type(target.model).__name__, target.packing_gap
    if not math.isfinite(gap):
        return f"{name} cannot run packed documents, or its features of them are not finite"
    return f"in {name} the features of a packed document differ by {gap:.2g} of their size from those of it alone"


def check_padding_is_right(model, attention_mask: torch.Tensor) -> None:
    """Refuse padding before tokens, for a target that neither keeps documents apart nor is known to obey masks.

    Raises:
        ValueError: names the target.
    """
    if not bool(attention_mask[:, 0].all()):
        raise ValueError(
            f"`attention_mask` has zeros before tokens, which {type(model).__name__} may see: pad on the right "
            "(`padding_side='right'`), where its tokens do not look."
        )


def _smallest_gap(target) -> float:
    """How far packed features are from those of documents alone, 0 for rounding; sets the way to run them."""
    ids = (20 + torch.arange(sum(_PROBE), device=target.device)[None]) % target.vocab_size
    documents = torch.arange(len(_PROBE), device=target.device).repeat_interleave(torch.tensor(_PROBE).to(ids.device))

    alone = torch.cat([target._forward(part).last_hidden for part in ids.split(_PROBE, dim=1)], dim=1).float()
    joined = target._forward(ids).last_hidden.float()
    leak = (joined - alone).norm() / alone.norm()

    gap = torch.inf
    for by_segments in (True, False) if target._by_segments else (False,):
        target._by_segments = by_segments
        packed = tried(lambda: packed_features(target, ids, None, documents[None], None))
        if packed is None:
            continue  # its layers cannot be run in this way

        gap = float((packed.last_hidden.float() - alone).norm() / alone.norm())
        if gap <= _ROUNDING or (gap <= 16 * torch.finfo(target.dtype).eps and gap < leak / 2):
            if not target._by_segments:
                logger.warning(
                    "%s gets a row for each document, since nothing else keeps them apart: packing takes up to twice "
                    "the target's time.",
                    type(target.model).__name__,
                )
            return 0.0
    return gap
