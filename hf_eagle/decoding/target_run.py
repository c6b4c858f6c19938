"""The target's side of decoding: its cache, the lengths of the rows, one forward pass per round."""

import inspect
from weakref import WeakKeyDictionary

import torch

from ..targets.features import TargetFeatures
from ..targets.media_inputs import TYPES, has_mrope, rope_index
from ..targets.tapped import TappedModel
from ..targets.trial import tried
from .caches import Lengths, SlotCache, check_cache
from .recurrent_states import RecurrentStates
from .tree import DraftTree


# attention implementations that take an additive 4-D mask
MASKED_ATTENTION = ("eager", "sdpa")
ATTENTION = ("full_attention", "sliding_attention")
# layers of two parts, each of which takes its own mask
_BOTH = {
    "hybrid": {"full_attention", "linear_attention"},
    "hybrid_sliding": {"sliding_attention", "linear_attention"},
}
_checked: WeakKeyDictionary = WeakKeyDictionary()  # of models that passed: with which `needs_masks`


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
        target.check()  # now, since it runs the target's layers, which later hold the states of these prompts
        input_ids = input_ids.to(target.device)
        self.media = {name: _to(x, target.device) for name, x in (media or {}).items() if x is not None}
        for name in self.media.keys() & set(TYPES):
            self.media[name] = _without_left_padding(self.media[name], attention_mask)[0]

        self.input_ids, self.lengths = _without_left_padding(input_ids, attention_mask)
        self.limit = self.lengths.high + room
        self.cache = SlotCache(self.lengths, self.limit)
        self.states = RecurrentStates(target.mixers)
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

        with self.states.reading(self.lengths):
            return self.target(self.input_ids, **arguments)

    def last_of_prompt(self, hidden: torch.Tensor) -> torch.Tensor:
        """The rows of every prompt's last token, `(rows, 1, hidden)`."""
        if self.lengths.uniform:
            return hidden[:, -1:]
        index = (self.lengths.device - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return hidden.gather(1, index)

    def _place_window(self, size: int, tree: DraftTree | None = None) -> dict:
        """Return arguments of the target's forward: the positions of a window of `size` tokens, and what it sees.

        A chain after rows of one length needs no mask. With attention alone and without m-RoPE it needs no positions
        either: the target's own are right.
        """
        self.cache.place(self.lengths)
        if tree is None and self.lengths.uniform:
            own = self.moved is None and not self.states  # some hybrids count from 0 if they are not told (Bamba)
            return {} if own else {"position_ids": self._rotated(self.lengths.slots(size))}

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
        with self.states.stepping():
            return self.target(window, past_key_values=self.cache, use_cache=True, **arguments)

    def keep(self, counts: list[int], counts_on_device: torch.Tensor) -> None:
        """Verify the first `counts` tokens of each row's window, at least one."""
        self.lengths = self.lengths.grown(counts, counts_on_device)
        self.states.keep(counts, counts_on_device)

    def logits_of(self, newest: torch.Tensor) -> torch.Tensor:
        """Logits `(rows, 1, vocabulary)` of what follows each row's newest token `(rows, 1)`, by the plain forward."""
        inputs = {"input_ids": newest, "use_cache": True, **self._place_window(1)}
        inputs["past_key_values"] = self.cache
        sharding = self.target.sharding
        with self.states.stepping():
            if sharding is None:
                return self.target.decode(**inputs).logits

            # all ranks of a group need the same logits: a tie rounded in two ways would part them for good
            output = sharding.run(self.target.decode, inputs)
            sharding.release()
            return output.logits

    def select(self, kept: list[int], kept_on_device: torch.Tensor) -> None:
        self.lengths = self.lengths.select(kept, kept_on_device)
        self.cache.select(kept_on_device)
        self.states.select(kept_on_device)
        self.moved = None if self.moved is None else self.moved[kept_on_device]

    def _masks(self, positions: torch.Tensor, visible: torch.Tensor):
        """Additive 4-D masks, one for each type of layer if the target has several."""
        config = self.target.config
        window = getattr(config, "sliding_window", None)
        layer_types = set(
            getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
        )
        for both in layer_types & set(_BOTH):
            layer_types = layer_types | _BOTH[both]

        masks = {}
        for layer_type in layer_types:
            if layer_type not in ATTENTION:  # it has nothing to mask
                masks[layer_type] = None
                continue

            seen = visible
            # a sliding window counts positions: in a tree, tokens of one level share theirs
            if layer_type == "sliding_attention":
                seen = visible & (self._slot_positions(positions, visible.shape[-1]) > positions[..., None] - window)
            mask = torch.zeros(seen.shape, dtype=self.target.dtype, device=seen.device)
            masks[layer_type] = mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[:, None]
        return masks if len(layer_types) > 1 else masks.popitem()[1]

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


def check_target(target: TappedModel, needs_masks: bool, branches: bool = False) -> None:
    """Raise `ValueError` when this target cannot verify: what it keeps cannot be rolled back, or it ignores 4-D masks.

    Args:
        target: the target.
        needs_masks: for draft trees and batches; a chain for one prompt works without.
        branches: for draft trees.
    """
    model, name = target.model, type(target.model).__name__
    check_cache(target)

    if branches and target.mixers:
        raise ValueError(
            f"`method` is 'tree', but `target` is a {name}, whose recurrent layers carry one state from token to token "
            "and cannot follow the branches of a draft tree: use `method='chain'`."
        )

    if needs_masks in _checked.get(model, ()):
        return

    if needs_masks:
        _check_masks(target, name)
    if target.mixers and not _carries_states(target, rows=2 if needs_masks else 1):
        raise ValueError(
            f"`target` is a {name}, whose recurrent layers could not be brought back to the state before a rejected "
            f"token{' in a batch: decode one prompt at a time' if needs_masks else ''}, or use another target."
        )
    _checked.setdefault(model, set()).add(needs_masks)


def why_alone(target: TappedModel, branches: bool = False) -> str | None:
    """Why this target decodes prompts only one at a time, as a sentence to tell; `None` if it also decodes batches.

    Args:
        target: the target.
        branches: for draft trees.

    Raises:
        ValueError: if it cannot verify even for one prompt.
    """
    try:
        check_target(target, needs_masks=True, branches=branches)
    except ValueError as problem:
        check_target(target, needs_masks=branches, branches=branches)
        return f"Every prompt is decoded alone: {problem}"
    return None


def _check_masks(target: TappedModel, name: str) -> None:
    what = "which draft trees and batches need; decode one prompt at a time with a chain"
    implementation = target.config._attn_implementation
    if implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"`target` was loaded with `attn_implementation={implementation!r}`, which takes no 4-D attention mask, "
            f"{what}, or load it with one of {', '.join(MASKED_ATTENTION)}."
        )
    if target.mixers:  # hidden tokens reach their states all the same: `_carries_states` tries batches
        return

    kinds = set(getattr(target.config, "layer_types", None) or ()) - set(ATTENTION)
    takes_positions = "position_ids" in inspect.signature(target.model.forward).parameters
    if kinds or not takes_positions or not _obeys_masks(target):
        raise ValueError(f"`target` is a {name}, which does not obey a 4-D attention mask with positions, {what}.")


@torch.no_grad()
def _carries_states(target: TappedModel, rows: int) -> bool:
    """Return whether prompts of different lengths go on as they do alone after tokens were rejected, once per model."""
    ids = (20 + torch.arange(5 * rows, device=target.device).view(rows, 5)) % target.vocab_size
    present = torch.ones_like(ids)
    present[1:, 0] = 0
    # of three tokens row 0 keeps one, and row 1 two: another one follows
    window, kept = ids[:, :3].flip(1), [1, 2][:rows]

    def go_on() -> torch.Tensor:
        run = TargetRun(target, ids, present, room=5)
        run.read_prompt()
        run.verify(window)
        run.keep(kept, torch.tensor(kept, device=target.device))
        return run.verify(ids[:, :1]).last_hidden[:, -1].float()

    last = tried(go_on)
    if last is None:
        return False

    def alone(row: int, count: int) -> torch.Tensor:
        tokens = torch.cat([ids[row, present[row].bool()], window[row, :count], ids[row, :1]])
        return target(tokens[None]).last_hidden[0, -1].float()

    # nearer by far to the accepted tokens alone than to what the window left behind
    gaps = [[(last[row] - alone(row, end)).norm() for end in (count, 3)] for row, count in enumerate(kept)]
    return all(right < wrong / 4 for right, wrong in gaps)


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

    def masked() -> TargetFeatures:
        masks = run._masks(positions, seen)
        return target(ids, attention_mask=masks, position_ids=positions, past_key_values=run.cache, use_cache=True)

    hidden = tried(masked)
    if hidden is None:
        return False

    absent, ignored = target(ids[:, ::2]), target(ids)
    last = [features.last_hidden[:, -1].float() for features in (hidden, absent, ignored)]
    return bool((last[0] - last[1]).norm() < (last[0] - last[2]).norm())
