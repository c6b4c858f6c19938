"""Key-value caches for decoding: allocated ahead, with a separate length for every row of a batch.

Row `b` keeps its keys at the slots `0 .. length - 1`: a verified token's slot is its position, and padding takes no
slot. A forward writes after each row's length and moves nothing. Then the lengths grow over what was verified; the
next forward overwrites the rest. Rolling back therefore costs nothing, and only a draft tree has to move keys: those of
its accepted path, to the front.
"""

from functools import partial

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin


# of layers that keep nothing; by name, because older versions of transformers have no such class
_NOTHING = "DummyLayer"
SPARE_SLOTS = 256  # at most so many are allocated ahead, so storage is copied only once in so many tokens


class Lengths:
    """How many verified tokens every row holds, on the host to plan with and on the device to compute with.

    Attributes:
        host: `rows` numbers.
        device: the same, int64 `(rows,)`.
        high: the largest of them.
        uniform: whether all are equal; then slots are plain ranges and no masks are needed for padding.
    """

    def __init__(self, host: list[int], device: torch.Tensor):
        self.host, self.device = host, device
        self.high = max(host)
        self.uniform = self.high == min(host)

    def grown(self, by: list[int], by_on_device: torch.Tensor) -> "Lengths":
        return Lengths([length + more for length, more in zip(self.host, by, strict=True)], self.device + by_on_device)

    def select(self, kept: list[int], kept_on_device: torch.Tensor) -> "Lengths":
        return Lengths([self.host[row] for row in kept], self.device[kept_on_device])

    def slots(self, count: int, skip: int = 0) -> torch.Tensor:
        """Return `count` slots after skipping `skip`: `(rows, count)`, or `(1, count)` if all rows have the same."""
        if self.uniform:
            return torch.arange(self.high + skip, self.high + skip + count, device=self.device.device)[None]
        return self.device[:, None] + torch.arange(skip, skip + count, device=self.device.device)

    def visible(self, seen: torch.Tensor) -> torch.Tensor:
        """Return which slots new tokens see: all verified ones, and those new ones that `seen` marks.

        Args:
            seen: bool `(rows or 1, n, m)`, whether new token `i` sees the `j`-th slot after the verified ones.

        Returns:
            bool `(rows or 1, n, high + m)`.
        """
        count, new = seen.shape[1:]
        if self.uniform:
            return torch.cat([seen.new_ones(seen.shape[0], count, self.high), seen], dim=-1)

        # a row's slots below its length hold verified tokens (place < 0), those from there on the new ones
        place = torch.arange(self.high + new, device=seen.device) - self.device[:, None]  # (rows, slots)
        index = place.clamp(0, new - 1)[:, None].expand(-1, count, -1)
        found = seen.expand(len(self.host), -1, -1).gather(2, index)
        return (place < 0)[:, None] | (found & (place < new)[:, None])


class SlotCache(Cache):
    """A `transformers` cache over slots; `place` says where the next forward writes, and from where on it reads.

    Args:
        lengths: where the first forward writes.
        limit: slots that a row will need at most; no more are allocated ahead.
    """

    def __init__(self, lengths: Lengths, limit: int):
        self.where = _Where(lengths, limit)
        super().__init__(layer_class_to_replicate=partial(_SlotLayer, self.where))

    def place(self, lengths: Lengths, skip: int = 0, first: int = 0) -> None:
        """Let the next forward write `skip` slots after these lengths, and read from slot `first` on."""
        self.where.lengths, self.where.skip, self.where.first, self.where.index = lengths, skip, first, None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.where.start  # also before the first layer exists

    def gather(self, path: torch.Tensor) -> None:
        """Move the keys of the last forward's tokens `path` `(rows, n)` to the first `n` slots it wrote to."""
        for layer in self.written:
            layer.gather(path)

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch only."""
        for layer in self.written:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    @property
    def written(self) -> list["_SlotLayer"]:
        """The layers that hold keys: recurrent layers, and those that share another's keys, write none."""
        return [layer for layer in self.layers if layer.is_initialized]


class _Where:
    """What all layers of a cache share: where the next forward writes, and from where on it reads."""

    def __init__(self, lengths: Lengths, limit: int):
        self.lengths, self.skip, self.first, self.index, self.limit = lengths, 0, 0, None, limit

    @property
    def start(self) -> int:
        return self.lengths.high + self.skip

    def slots(self, count: int) -> torch.Tensor:
        """`(rows, count)`, computed once for all layers."""
        if self.index is None or self.index.shape[1] != count:
            self.index = self.lengths.slots(count, self.skip)
        return self.index


class _SlotLayer(DynamicLayer):
    def __init__(self, where: _Where):
        super().__init__()
        self.where = where

    def get_seq_length(self) -> int:
        return self.where.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.where.start + query_length, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write `(rows, heads, n, head_dim)`; return what is read, up to the last slot written in any row."""
        count = key_states.shape[2]
        end = self.where.start + count
        if not self.is_initialized or end > self.keys.shape[2]:
            slots = max(end, min(end + SPARE_SLOTS, self.where.limit))
            self.keys = self._reserve(self.keys, key_states, slots)
            self.values = self._reserve(self.values, value_states, slots)
            self.is_initialized = True

        # rows of one length write a plain slice and need no index
        if self.where.lengths.uniform:
            self.keys[:, :, end - count : end] = key_states
            self.values[:, :, end - count : end] = value_states
        else:
            index = self.where.slots(count)[:, None, :, None]
            self.keys.scatter_(2, index.expand_as(key_states), key_states)
            self.values.scatter_(2, index.expand_as(value_states), value_states)

        first = self.where.first
        return self.keys[:, :, first:end], self.values[:, :, first:end]

    def gather(self, path: torch.Tensor) -> None:
        count = path.shape[1]

        if self.where.lengths.uniform and path.shape[0] == 1:
            start = self.where.start
            for x in (self.keys, self.values):
                x[:, :, start : start + count] = x.index_select(2, start + path[0])
            return

        # `gather` copies before `scatter_` writes, so the slots may overlap
        source = (self.where.slots(1) + path)[:, None, :, None]
        into = self.where.slots(1)[:, None, :, None] + torch.arange(count, device=path.device)[:, None]
        for x in (self.keys, self.values):
            shape = (x.shape[0], x.shape[1], count, x.shape[3])
            x.scatter_(2, into.expand(shape), x.gather(2, source.expand(shape)))

    @staticmethod
    def _reserve(old: torch.Tensor | None, like: torch.Tensor, slots: int) -> torch.Tensor:
        # zeros, since an unwritten slot is masked by a weight of zero, and NaN times zero is NaN
        rows, heads, _, head_dim = like.shape
        new = like.new_zeros(rows, heads, slots, head_dim)
        if old is not None:
            new[:, :, : old.shape[2]] = old
        return new


def check_cache(target) -> None:
    """Raise `ValueError` for a target that keeps something between tokens that cannot be rolled back."""
    model, other = target.model, set()
    try:
        layers = DynamicCache(config=target.config).layers
    # a type of layer that transformers' own caches do not know, or a config that does not say what they ask it
    except (AttributeError, LookupError, TypeError) as unknown:
        layers = []
        other.add(f"a cache of its own ({unknown})")

    for layer in layers:
        recurrent = isinstance(layer, LinearAttentionCacheLayerMixin) and target.mixers
        plain = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) or type(layer).__name__ == _NOTHING
        if not recurrent and not plain:
            other.add(type(layer).__name__)

    if other or (getattr(model, "_is_stateful", False) and not target.mixers):
        raise ValueError(
            f"`target` is a {type(model).__name__}, which keeps {', '.join(sorted(other)) or 'a recurrent state'} "
            "between tokens in a way that rejected tokens cannot be taken back from: use a target of attention and of "
            "recurrent layers whose states lie in its cache."
        )
