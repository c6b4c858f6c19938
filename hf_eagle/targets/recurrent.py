"""Recurrent layers of a target: find the modules that carry a state from token to token, and run them in our own way.

Hybrids mix attention with layers that keep one state of fixed size (linear attention, state space models, short
convolutions). Such modules are found by what they do, not by name: in a run over one token, each module that takes a
cache gets an empty one of its own. Those that leave a state in it, and no keys, are the mixers.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_map
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .decoder_parts import find_decoder
from .trial import tried


# types of layer that keep keys of every token, or nothing; for any other type mixers are searched for
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "indexed_attention", "moe", "mlp"}
# `way(mixer, hidden, apply)` returns the mixer's output for `hidden`, from calls of `apply(cut, cache)`, see `_Call`
Way = Callable[..., torch.Tensor]


@dataclass(eq=False)
class Mixer:
    """A module that carries a state from token to token, inside a decoder layer.

    Attributes:
        module: its first argument is hidden states `(rows, length, hidden)`. It returns as many, alone or in a tuple.
        empty: an empty cache of the target.
    """

    module: nn.Module
    empty: Cache
    _own: Callable | None = None
    _way: "Way | None" = None

    def __post_init__(self):
        # one object for good, since a new one would have the model compiled again; it is not compiled itself
        self._stand_in = torch.compiler.disable(self._run)

    def new_cache(self) -> Cache:
        """A cache for this module alone, so that its state lies apart from the keys of attention."""
        return copy.deepcopy(self.empty)

    def stand_in(self, way: "Way") -> None:
        """Let `way` run the module from now on."""
        self._own, self._way, self.module.forward = self.module.forward, way, self._stand_in

    def _run(self, *args, **kwargs):
        call = _Call(self._own, args, kwargs)
        return call.returned(self._way(self, call.hidden, call))


@dataclass
class Mixers:
    """What was seen of a target: its mixers, and how many of its modules keep keys."""

    found: list[Mixer] = field(default_factory=list)
    attending: int = 0

    def __bool__(self) -> bool:
        return bool(self.found)

    @contextmanager
    def run_by(self, way: Way) -> Iterator[None]:
        """Inside the block, let `way` run the mixers; masks and the model's own cache do not reach them."""
        before = {mixer.module: mixer.module.__dict__.get("forward") for mixer in self.found}
        try:
            for mixer in self.found:
                mixer.stand_in(way)
            yield
        finally:
            _give_back(before)


class _Call:
    """One call of a mixer, which can be repeated for a part of its tokens.

    Attributes:
        hidden: `(rows, length, hidden)`, what the mixer was called with.
    """

    def __init__(self, own: Callable, args: tuple, kwargs: dict):
        bound = inspect.signature(own).bind(*args, **kwargs)
        named = {
            name: x
            for name, x in bound.arguments.items()
            if bound.signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD
        }
        self._own, self._first = own, next(iter(named))
        self.hidden, self.output = named.pop(self._first), None
        self._cache = _cache_argument(bound.signature)
        named.pop(self._cache, None)
        self._others = {name: None if "mask" in name else x for name, x in named.items()}

    def __call__(self, cut: Callable[[torch.Tensor], torch.Tensor], cache: Cache | None = None) -> torch.Tensor:
        """Run the mixer on `cut(hidden)`; other arguments that have the tokens' dimension are cut as well."""

        def cut_others(x: Any) -> Any:
            of_tokens = isinstance(x, torch.Tensor) and x.dim() > 2 and x.shape[1] == self.hidden.shape[1]
            return cut(x.expand(self.hidden.shape[0], *x.shape[1:])) if of_tokens else x

        others = {self._cache: cache, **tree_map(cut_others, self._others)}
        self.output = self._own(**{self._first: cut(self.hidden)}, **others)
        return self.output[0] if isinstance(self.output, tuple) else self.output

    def returned(self, hidden: torch.Tensor):
        """`hidden` in the form in which the mixer returns it."""
        return (hidden, *self.output[1:]) if isinstance(self.output, tuple) else hidden


def _cache_argument(signature: inspect.Signature) -> str | None:
    """The name of the argument that takes a cache; `transformers` has had three of them."""
    return next((n for n in ("cache", "past_key_values", "cache_params") if n in signature.parameters), None)


# ---- finding them ----


def may_have_state(decoder: PreTrainedModel) -> bool:
    """Return whether a decoder's config or class says that something other than keys is kept between tokens."""
    config = decoder.config.get_text_config()
    if getattr(decoder, "_is_stateful", False):
        return True
    if set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS:
        return True
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError):  # a type of layer that transformers' own caches do not know
        return True
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


@torch.no_grad()
def find_mixers(model: PreTrainedModel) -> Mixers:
    """The mixers of a target, none for attention alone; takes one forward over one token if there may be some.

    All ranks of a sharded target must call this together.
    """
    decoder = find_decoder(model)
    if not may_have_state(decoder):
        return Mixers()

    seen = _Seen()
    candidates = {module: module.__dict__.get("forward") for module in decoder.modules() if _takes_cache(module)}
    try:
        for module in candidates:
            module.forward = partial(seen.look, module, module.forward)
        # `forward` skips torch.compile; a sharded model gathers its weights only when it is called itself
        run = model if isinstance(model, FSDPModule) else model.forward
        one = torch.ones(1, 1, dtype=torch.long, device=model.device)
        if tried(lambda: run(input_ids=one, use_cache=True)) is None:
            return Mixers()
    finally:
        _give_back(candidates)

    return Mixers([Mixer(module, seen.empty) for module in seen.stateful], attending=len(seen.attending))


def _takes_cache(module: nn.Module) -> bool:
    # whatever reads or writes a layer of a cache knows the layer's number
    return hasattr(module, "layer_idx") and _cache_argument(inspect.signature(module.forward)) is not None


def _give_back(forwards: dict[nn.Module, Callable | None]) -> None:
    """Give modules their own `forward` back, or the one that something else had set before."""
    for module, own in forwards.items():
        module.__dict__.pop("forward", None)
        if own is not None:
            module.forward = own


class _Seen:
    """What modules leave in a cache of their own: a state keeps its shape, keys grow from token to token."""

    def __init__(self):
        self.empty: Cache | None = None
        self.stateful: list[nn.Module] = []
        self.attending: list[nn.Module] = []

    def look(self, module: nn.Module, own: Callable, *args, **kwargs):
        name = _cache_argument(inspect.signature(own))
        given = kwargs.get(name)
        if given is None:
            return own(*args, **kwargs)

        if self.empty is None:  # the first module to run finds it empty
            self.empty = copy.deepcopy(given)
        cache = kwargs[name] = copy.deepcopy(self.empty)
        output, once = own(*args, **kwargs), self._shapes(cache)

        if once:  # modules that only hand the cache on to others leave nothing in their own
            own(*args, **kwargs)
            (self.stateful if self._shapes(cache) == once else self.attending).append(module)
        return output

    @staticmethod
    def _shapes(cache: Cache) -> list[torch.Size]:
        return [container[key].shape for container, key in states_of(cache)]


def states_of(cache: Cache) -> list[tuple[Any, Any]]:
    """Where a cache holds states: containers and keys, `container[key]` a tensor `(rows, ...)`.

    Both forms are covered: layers with dicts of states, and a cache with a list of its own (MiniMax).
    """
    places = []

    def walk(container: Any) -> None:
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, x in items:
            if isinstance(x, torch.Tensor) and x.dim() > 1:
                places.append((container, key))
            elif isinstance(x, dict | list):
                walk(x)
            elif hasattr(x, "is_initialized") or isinstance(x, LinearAttentionCacheLayerMixin):
                walk(vars(x))

    walk(vars(cache))
    return places
