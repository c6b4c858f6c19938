"""Which rows of a document are trained, if only some are: drawn anew in each epoch, from the document alone."""

from collections.abc import Callable

import torch

from ..data.collators import number_documents
from .training_base import Draw


def draw_apart(
    input_ids: torch.Tensor, documents: torch.Tensor, candidates: torch.Tensor, most: int, draw: Draw
) -> torch.Tensor:
    """Keep at most `most` candidates of each document, any of them.

    Args:
        input_ids, documents, candidates: `(batch, length)`, the latter bool.
        most: how many.
        draw: beside it, only a document's tokens decide.

    Returns:
        bool `(batch, length)`.
    """

    def choose(count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(count, generator=generator)[:most]

    return _drawn(input_ids, documents, candidates, most, draw, choose)


def draw_together(
    input_ids: torch.Tensor, documents: torch.Tensor, candidates: torch.Tensor, most: int, draw: Draw
) -> torch.Tensor:
    """As [`draw_apart`], but those that follow one another, and fewer of them at a document's ends: so each candidate
    is as likely as any other."""

    def choose(count: int, generator: torch.Generator) -> slice:
        first = int(torch.randint(1 - most, count, (), generator=generator))
        return slice(max(0, first), first + most)

    return _drawn(input_ids, documents, candidates, most, draw, choose)


def _drawn(input_ids, documents, candidates, most: int, draw: Draw, choose: Callable) -> torch.Tensor:
    number, flat, kept = number_documents(documents), candidates.flatten(), candidates.clone()
    for document, count in enumerate(torch.bincount(number, weights=flat).tolist()):
        if count > most:
            inside = number == document
            places = (inside & flat).nonzero()[:, 0]
            chosen = places[choose(len(places), draw.generator(input_ids.flatten()[inside]))]
            kept.view(-1)[places] = False
            kept.view(-1)[chosen] = True

    return kept
