"""The target's side of decoding: its cache, the lengths of the rows, one forward pass per round."""

import inspect
from weakref import WeakKeyDictionary

import torch

from ..targets.features import TargetFeatures
from ..targets.media_inputs import has_mrope, rope_index
from ..targets.tapped import TappedModel
from .caches import Lengths, SlotCache, check_cache
from .tree import DraftTree


# attention implementations that take an additive 4-D mask
MASKED_ATTENTION = ("eager", "sdpa")
_checked: WeakKeyDictionary = WeakKeyDictionary()  # models that were seen to obey a 4-D mask


class TargetRun:
    """Prompts of a batch and what the target has verified after them.

    Args:
        target: the target.
        input_ids: `(rows, length)`, padded on the left.
        attention_mask: `(rows, length)`, 0 on padding; no padding when `None`.
        room: the most tokens that will follow a prompt, drafted ones included.
        media: what else the prompts' forward takes, see `targets.media_inputs.MEDIA`.

    Attributes:
        lengths: verified tokens of every row, prompt included. The newest token of an answer is not counted: it is the
            first of the next round's window.
        prompt_positions: `(3, rows, length)` of prompts with media for a target with m-RoPE, else `None`.
        moved: `(rows,)`, the offset that a target with m-RoPE adds to positions after the prompt, else `None`.
    """

    def __init__(
        self,
        target: TappedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        room: int,
        media: dict[str, torch.Tensor] | None = None,
    ):
        self.target = target
        input_ids = input_ids.to(target.device)
        self.media = {name: _to(x, target.device) for name, x in (media or {}).items() if x is not None}
        if "mm_token_type_ids" in self.media:
            types = self.media["mm_token_type_ids"]
            self.media["mm_token_type_ids"] = _without_left_padding(types, attention_mask)[0]

        self.input_ids, self.lengths = _without_left_padding(input_ids, attention_mask)
        self.limit = self.lengths.high + room
        self.cache = SlotCache(self.lengths, self.limit)
        self.prompt_positions = self.moved = None

        if has_mrope(target.config):
            present = torch.arange(self.input_ids.shape[1], device=target.device) < self.lengths.device[:, None]
            found = rope_index(target.model, self.input_ids, present.long(), **self.media)
            self.prompt_positions, self.moved = found or (None, torch.zeros_like(self.lengths.device))

    def read_prompt(self) -> TargetFeatures:
        """The prompts' forward, each from slot 0, so that no token sees what follows a shorter prompt."""
        self.cache.place(Lengths([0] * len(self.lengths.host), torch.zeros_like(self.lengths.device)))
        arguments = {"past_key_values": self.cache, "use_cache": True, **self.media}

        if self.moved is not None:  # without positions the model would use those it remembers of an earlier prompt
            positions = self.prompt_positions
            if positions is None:
                positions = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
                positions = positions.expand(3, *self.input_ids.shape)
            arguments["position_ids"] = positions

        return self.target(self.input_ids, **arguments)

    def last_of_prompt(self, hidden: torch.Tensor) -> torch.Tensor:
        """The rows of every prompt's last token, `(rows, 1, hidden)`."""
        if self.lengths.uniform:
            return hidden[:, -1:]
        index = (self.lengths.device - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return hidden.gather(1, index)

    def _place_window(self, size: int, tree: DraftTree | None = None) -> dict:
        """Return arguments of the target's forward: the positions of a window of `size` tokens, and what it sees.

        A chain after rows of one length needs no mask. Without m-RoPE it needs no positions either: the target's own
        are right.
        """
        self.cache.place(self.lengths)
        if tree is None and self.lengths.uniform:
            return {} if self.moved is None else {"position_ids": self._rotated(self.lengths.slots(size))}

        device = self.lengths.device.device
        if tree is None:
            steps = torch.arange(size, device=device)[None]
            seen = torch.ones(1, size, size, dtype=torch.bool, device=device).tril()
        else:
            steps, seen = tree.depths, tree.ancestors

        positions = self.lengths.device[:, None] + steps
        masks = self._masks(positions, self.lengths.visible(seen))
        return {"position_ids": self._rotated(positions), "attention_mask": masks}

    def _rotated(self, places: torch.Tensor) -> torch.Tensor:
        """Positions of the tokens after the prompts that stand at `places` `(rows, n)` among all tokens."""
        return places if self.moved is None else (places + self.moved[:, None]).expand(3, -1, -1)

    def verify(self, window: torch.Tensor, tree: DraftTree | None = None) -> TargetFeatures:
        """The round's forward over `(rows, n)`: the newest verified token of each row and the drafted ones."""
        arguments = self._place_window(window.shape[1], tree)
        return self.target(window, past_key_values=self.cache, use_cache=True, **arguments)

    def logits_of(self, newest: torch.Tensor) -> torch.Tensor:
        """Logits `(rows, 1, vocabulary)` of what follows each row's newest token `(rows, 1)`, by the plain forward."""
        inputs = {"input_ids": newest, "use_cache": True, **self._place_window(1)}
        inputs[self.target.cache_argument] = self.cache
        sharding = self.target.sharding
        if sharding is None:
            return self.target.model(**inputs).logits

        # all ranks of a group need the same logits: a tie rounded in two ways would part them for good
        output = sharding.run(self.target.model, inputs)
        sharding.release()
        return output.logits

    def select(self, kept: list[int], kept_on_device: torch.Tensor) -> None:
        self.lengths = self.lengths.select(kept, kept_on_device)
        self.cache.select(kept_on_device)
        self.moved = None if self.moved is None else self.moved[kept_on_device]

    def _masks(self, positions: torch.Tensor, visible: torch.Tensor):
        """Additive 4-D masks, one for each kind of layer if the target has several."""
        config = self.target.config
        window = getattr(config, "sliding_window", None)
        kinds = set(
            getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
        )

        masks = {}
        for kind in kinds:
            seen = visible
            # a sliding window counts positions: in a tree, tokens of one level share theirs
            if kind == "sliding_attention":
                seen = visible & (self._slot_positions(positions, visible.shape[-1]) > positions[..., None] - window)
            mask = torch.zeros(seen.shape, dtype=self.target.dtype, device=seen.device)
            masks[kind] = mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[:, None]
        return masks if len(kinds) > 1 else masks.popitem()[1]

    def _slot_positions(self, positions: torch.Tensor, slots: int) -> torch.Tensor:
        """`(rows, 1, slots)`: a verified token's position is its slot; a window's tokens have the given ones."""
        own = torch.arange(slots, device=positions.device).repeat(positions.shape[0], 1)
        index = self.lengths.device[:, None] + torch.arange(positions.shape[1], device=positions.device)
        return own.scatter(1, index, positions)[:, None]


def _to(x, device: torch.device):
    return x.to(device) if isinstance(x, torch.Tensor) else x


def _without_left_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor | None):
    """`(rows, longest)` with every prompt at the left, and the prompts' lengths."""
    rows, length = input_ids.shape
    if attention_mask is None:
        return input_ids, Lengths([length] * rows, torch.full((rows,), length, device=input_ids.device))
    counts = attention_mask.to(input_ids.device).long().sum(1)
    host = counts.tolist()
    if min(host) == length:
        return input_ids, Lengths(host, counts)
    source = torch.arange(max(host), device=input_ids.device) + (length - counts)[:, None]
    return input_ids.gather(1, source.clamp_max(length - 1)), Lengths(host, counts)


def check_target(target: TappedModel, needs_masks: bool) -> None:
    """Raise `ValueError` when this target cannot verify: its cache cannot be rolled back, or it ignores 4-D masks.

    Draft trees and batches need a mask; a chain for one prompt works without.
    """
    check_cache(target)
    model = target.model
    if not needs_masks or model in _checked:
        return

    name, what = type(model).__name__, "which draft trees and batches need; decode one prompt at a time with a chain"
    implementation = target.config._attn_implementation
    if implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"`target` was loaded with `attn_implementation={implementation!r}`, which takes no 4-D attention mask, "
            f"{what}, or load it with one of {', '.join(MASKED_ATTENTION)}."
        )

    kinds = set(getattr(target.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if kinds or not takes_positions or not _obeys_masks(target):
        raise ValueError(f"`target` is a {name}, which does not obey a 4-D attention mask with positions, {what}.")

    _checked[model] = True


@torch.no_grad()
def _obeys_masks(target: TappedModel) -> bool:
    """Return whether a masked token acts like an absent one. Takes three short forward passes, once per model."""
    # the second and third token are siblings: the third must not see the second
    ids = torch.tensor([[1, 2, 3]], device=target.device) % target.vocab_size
    positions = torch.tensor([[0, 1, 1]], device=target.device)
    seen = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=torch.bool, device=target.device)

    run = TargetRun(target, ids, None, room=0)
    run.lengths = Lengths([0], torch.zeros(1, dtype=torch.long, device=target.device))
    run.cache.place(run.lengths)
    try:
        masks = run._masks(positions, seen)
        hidden = target(ids, attention_mask=masks, position_ids=positions, past_key_values=run.cache, use_cache=True)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False

    absent, ignored = target(ids[:, ::2]), target(ids)
    last = [features.last_hidden[:, -1].float() for features in (hidden, absent, ignored)]
    return bool((last[0] - last[1]).norm() < (last[0] - last[2]).norm())
