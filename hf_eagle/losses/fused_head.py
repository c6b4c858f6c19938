"""Fuse draft head and loss: compute a chunk of logits, take its loss, turn it into its own gradient, and drop it.

No `(rows, draft_vocab)` tensor of all rows ever exists. The forward pass computes the gradients while it has the
logits. So each row's factor in the final loss must be known by then; the trainer knows it.

How large the gradients are is left to the backward pass: float16 cannot hold the gradient of one row of 40,000, before
a loss scaler has made it larger.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch.nn.functional import linear

from ..regions import region


# logits that exist at one time on a CPU, and those that fit in a core's cache while they are worked on
CHUNK_ELEMENTS = 2**25
BLOCK_ELEMENTS = 2**20
# on an accelerator a chunk grows to this many rows: each one reads and writes the head's gradient, 0.5 GB for 32,000
# columns of 4,096
CHUNK_ROWS = 4096
# of an accelerator's memory for each logit of a chunk: about 16 bytes (logits, both distributions, the loss), which
# together shall be a sixteenth of it. Where the memory is unknown, little is assumed
MEMORY_PER_LOGIT = 16 * 16
UNKNOWN_MEMORY = 16 * 2**30


@dataclass
class LossRows:
    """What `M` rows are compared with, and how.

    Attributes:
        loss: `"ce"`, `"lk_alpha"` or `"lk_lambda"`, as in [`DraftObjective`].
        probs: `(P, draft_vocab)`, the target's distributions, renormalised to the draft vocabulary.
        argmax: `(P,)` the most probable draft id of each distribution.
        mass: `(P,)` share of the full softmax that lies in the draft vocabulary; `None` for cross-entropy.
        where: `(M,)` which of the `P` each row is compared with.
        factor: `(M,)` float32, the factor of each row's loss in the total.
        ce_share: `(M,)` float32, the share of cross-entropy in `lk_lambda`.
        transform: what follows the head's projection (scale, soft cap); `None` for nothing.
    """

    loss: str
    probs: torch.Tensor
    argmax: torch.Tensor
    mass: torch.Tensor | None
    where: torch.Tensor
    factor: torch.Tensor
    ce_share: torch.Tensor | None = None
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None

    def chunk(self, rows: slice) -> "LossRows":
        """Select a slice of the rows."""
        share = None if self.ce_share is None else self.ce_share[rows]
        return replace(self, where=self.where[rows], factor=self.factor[rows], ce_share=share)

    def judge(self, logits: torch.Tensor, block: slice, with_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and hits of a block of rows; with `with_grad`, `logits` become `d loss / d logits`."""
        share = None if self.ce_share is None else self.ce_share[block]
        compared = (self.probs, self.argmax, self.mass, self.where[block], share)
        return _judged(logits, *compared, self.loss, with_grad)


@dataclass
class LabelRows:
    """`M` rows that are compared with tokens: the loss of each is `-log q(token)`.

    Attributes:
        labels: `(M,)` the tokens.
        factor, transform: as in [`LossRows`].
    """

    labels: torch.Tensor
    factor: torch.Tensor
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None

    def chunk(self, rows: slice) -> "LabelRows":
        """Select a slice of the rows."""
        return replace(self, labels=self.labels[rows], factor=self.factor[rows])

    def judge(self, logits: torch.Tensor, block: slice, with_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`LossRows.judge`]; a row is a hit when its argmax is the token."""
        return _judged_by_label(logits, self.labels[block], with_grad)


@dataclass
class StreamedRows:
    """`M` rows for cross-entropy whose distributions are too large to keep: each chunk computes and drops its own.

    Attributes:
        hidden: `(P, hidden)`, what the teacher's head takes.
        teacher: maps hidden states `(rows, hidden)` to the teacher's logits `(rows, vocabulary)`.
        where, factor, transform: as in [`LossRows`].
        dtype: the dtype of the distributions.
        ascending: `where` on the CPU, if it ascends: then a chunk makes the distribution of each place once.
    """

    hidden: torch.Tensor
    teacher: Callable[[torch.Tensor], torch.Tensor]
    where: torch.Tensor
    factor: torch.Tensor
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None
    dtype: torch.dtype = torch.float32
    ascending: torch.Tensor | None = None

    def chunk(self, rows: slice) -> LossRows:
        """Select a slice of the rows, and compute their distributions."""
        where = self.where[rows]
        if self.ascending is None:
            hidden, where = self.hidden[where], torch.arange(len(where), device=where.device)
        else:
            first, last = self.ascending[rows.start].item(), self.ascending[rows.stop - 1].item()
            hidden, where = self.hidden[first : last + 1], where - first

        logits = self.teacher(hidden)
        # a softmax in half precision accumulates in float32 too, and writes half as much
        same = logits.dtype == self.dtype
        return LossRows(
            loss="ce",
            probs=logits.softmax(-1) if same else logits.softmax(-1, dtype=torch.float32).to(self.dtype),
            argmax=logits.max(-1).indices,  # `argmax` of bfloat16 costs 7x as much
            mass=None,
            where=where,
            factor=self.factor[rows],
            transform=self.transform,
        )


def chunk_rows(columns: int, memory: int | None) -> int:
    """How many rows' logits exist at one time.

    Args:
        columns: of the head.
        memory: of the accelerator, in bytes; `None` for a CPU.
    """
    rows = max(1, CHUNK_ELEMENTS // columns)
    return rows if memory is None else max(rows, min(CHUNK_ROWS, memory // (MEMORY_PER_LOGIT * columns)))


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that an accelerator has; `None` for a CPU, whose chunks are not chosen by its memory."""
    if device.type == "cpu":
        return None
    properties = getattr(torch.get_device_module(device), "get_device_properties", None)
    return UNKNOWN_MEMORY if properties is None else properties(device).total_memory


class FusedHeadLoss(torch.autograd.Function):
    """`(normed (M, hidden), head weight (draft_vocab, hidden)) -> (total, losses (M,), hits (M,))`.

    Only `total`, the sum of `factor * loss`, carries a gradient; a row is a hit when its argmax is the target's. The
    backward pass hands out the gradients that the forward pass made, uncopied, so it runs once. Who has the
    weight in autocast's dtype already passes it as `cast`.
    """

    @staticmethod
    def forward(
        ctx,
        normed,
        weight,
        rows: LossRows | LabelRows | StreamedRows,
        with_grad: bool,
        cast: torch.Tensor | None = None,
    ):
        wants_x, wants_w = (with_grad and wanted for wanted in ctx.needs_input_grad[:2])
        dx = torch.empty_like(normed) if wants_x else None
        # the first chunk fills it
        dw = (torch.empty_like if len(normed) else torch.zeros_like)(weight) if wants_w else None
        # of a row's factor here only its share of the largest, which follows in the backward pass
        largest = rows.factor.max().clamp_min(torch.finfo(torch.float32).tiny) if len(normed) else rows.factor.sum()
        share = rows.factor / largest
        losses = torch.empty(len(normed), dtype=torch.float32, device=normed.device)
        hits = torch.empty(len(normed), dtype=torch.bool, device=normed.device)

        for chunk, x, w, logits in _chunks(normed, weight if cast is None else cast):
            seen = rows.chunk(chunk)
            judge = seen.judge if seen.transform is None else partial(_judge_transformed, seen)
            for block, piece in _blocks(logits):
                losses[chunk][block], hits[chunk][block] = judge(piece, block, wants_x or wants_w)

            # `judge` has turned the logits into their gradients
            if wants_x:
                dx[chunk] = logits @ w
            if wants_w:
                _add_product(dw, logits.T, (x * share[chunk, None]).to(x.dtype), first=chunk.start == 0)
            del seen, logits, piece  # before the next ones are made

        ctx.made, ctx.factor, ctx.largest = (dx, dw), rows.factor, largest
        ctx.mark_non_differentiable(losses, hits)
        return (losses * rows.factor).sum(), losses, hits

    @staticmethod
    def backward(ctx, grad, *_):
        if ctx.made is None:
            raise RuntimeError(
                "The gradients of a draft's head and loss are made once, in the forward pass, and a backward pass has "
                "taken them: run the draft again instead of a second `backward`."
            )
        (dx, dw), ctx.made = ctx.made, None

        # factors in float32, also where the gradients are not
        if dx is not None:
            dx.mul_((ctx.factor * grad.float())[:, None])
        if dw is not None:
            dw.mul_(ctx.largest * grad.float())
        return dx, dw, None, None, None


def in_autocast(x: torch.Tensor) -> torch.Tensor:
    """In autocast's dtype, if autocast is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


@torch.no_grad()
def acceptance_rates(normed: torch.Tensor, weight: torch.Tensor, rows: LossRows) -> torch.Tensor:
    """`alpha = sum_v min(p_full(v), q(v))` of each row, `(M,)` (arXiv 2602.23881)."""
    alphas = torch.empty(len(normed), dtype=torch.float32, device=normed.device)
    for chunk, _, _, logits in _chunks(normed, weight):
        for block, piece in _blocks(logits):
            where = rows.where[chunk][block]
            p_full = rows.probs[where].float() * rows.mass[where, None]
            alphas[chunk][block] = torch.minimum(p_full, piece.softmax(-1, dtype=torch.float32)).sum(-1)
        del logits, piece
    return alphas


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """`total += a @ b`, or `total = a @ b` for the first; reads and writes `total` once where PyTorch can."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif _adds_to_float32(total.device, a.dtype):
        torch.addmm(total, a, b, beta=0 if first else 1, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


@lru_cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of this dtype can be added to float32: on CUDA, from PyTorch 2.10."""
    total, factor = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return True


def _chunks(normed, weight) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield slices of rows, those rows, the weight and their logits, in autocast's dtype if it is on."""
    normed, weight = in_autocast(normed), in_autocast(weight)
    with torch.autocast(normed.device.type, enabled=False):
        size = chunk_rows(len(weight), memory_of(normed.device))
        for start in range(0, len(normed), size):
            chunk = slice(start, min(start + size, len(normed)))
            yield chunk, normed[chunk], weight, linear(normed[chunk], weight)


def _blocks(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield slices of a chunk's rows, and a view of their logits."""
    # a GPU is fastest with all rows at once
    size = max(1, BLOCK_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), size):
        block = slice(start, min(start + size, len(logits)))
        yield block, logits[block]


@region
def _judged(logits, probs, argmax, mass, where, share, loss: str, with_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    # of equal logits the first, like `argmax` and the servers; `argmax` of bfloat16 costs 7x as much
    best, place = logits.max(-1)
    hits = place == argmax[where]

    p = probs.index_select(0, where)
    q = logits.softmax(-1, dtype=torch.float32)

    # log-sum-exp minus <p, logits>: cross-entropy, since p sums to one (up to the rounding of its dtype)
    log_partition = best.float() - q.amax(-1).log()
    ce = log_partition - torch.linalg.vecdot(p.to(logits.dtype), logits).float() if loss != "lk_alpha" else None
    if loss == "ce":
        if with_grad:
            torch.sub(q, p, out=logits)
        return ce, hits

    p_full = p.float() * mass[where, None]
    alpha = torch.minimum(p_full, q).sum(-1)
    # only probabilities below the target's change the minimum
    q_below = torch.where(q < p_full, q, 0.0)
    d_alpha = q_below - q * q_below.sum(-1, keepdim=True)
    if loss == "lk_alpha":
        alpha = alpha.clamp_min(torch.finfo(alpha.dtype).tiny)  # an alpha of 0 would make the loss infinite
        if with_grad:
            logits.copy_(d_alpha / -alpha[:, None])
        return -alpha.log(), hits

    if with_grad:
        logits.copy_((q - p) * share[:, None] - d_alpha * (1 - share)[:, None])
    return share * ce + (1 - share) * (1 - alpha), hits


@region
def _judged_by_label(logits, labels, with_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    best, place = logits.max(-1)
    q = logits.softmax(-1, dtype=torch.float32)

    losses = best.float() - q.amax(-1).log() - logits.gather(1, labels[:, None])[:, 0].float()
    if with_grad:
        logits.copy_(q.scatter_add(1, labels[:, None], -torch.ones_like(q[:, :1])))
    return losses, place == labels


def _judge_transformed(rows: LossRows | LabelRows, logits: torch.Tensor, block: slice, with_grad: bool):
    """`rows.judge` after the model's transform of its logits; autograd gives the derivative of the transform."""
    with torch.set_grad_enabled(with_grad):
        raw = logits.detach().requires_grad_(with_grad)
        transformed = rows.transform(raw)

    judged = transformed.detach().clone()  # autograd may want the original
    result = rows.judge(judged, block, with_grad)
    if with_grad:
        logits.copy_(torch.autograd.grad(transformed, raw, judged)[0])
    return result
