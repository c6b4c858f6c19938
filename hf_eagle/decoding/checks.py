"""Refuse, before decoding, arguments that do not fit together and drafts of different targets."""

from dataclasses import dataclass, replace

import torch

from ..targets.media_inputs import MEDIA, TYPES
from .tree import max_nodes


METHODS = ("chain", "tree")
DEFAULTS = {"chain": {"num_speculative_tokens": 3}, "tree": {"depth": 5, "top_k": 8, "total_tokens": 40}}


@dataclass(frozen=True)
class DraftShape:
    """The shape of the chain or tree that is drafted in a round.

    Attributes:
        tree: whether it is a tree.
        depth: tokens of a chain, levels of a tree: the most that one round can accept.
        top_k: nodes expanded on each level, and children of each; 1 in a chain.
        total_tokens: drafted tokens that the target verifies.
        window: keys that a query of the draft sees, its own included; as many as in training when `None`.
    """

    tree: bool
    depth: int
    top_k: int
    total_tokens: int
    window: int | None = None

    @classmethod
    def of(
        cls,
        method: str = "chain",
        num_speculative_tokens: int | None = None,
        depth: int | None = None,
        top_k: int | None = None,
        total_tokens: int | None = None,
        window: int | None = None,
    ) -> "DraftShape":
        """From the arguments of `speculative_generate`, `None` standing for the default.

        Raises:
            `ValueError`: for an unknown method, a value out of range, or one that belongs to the other method.
        """
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, but is {method!r}.")

        given = {
            "num_speculative_tokens": num_speculative_tokens,
            "depth": depth,
            "top_k": top_k,
            "total_tokens": total_tokens,
        }

        defaults = DEFAULTS[method]
        for name, value in given.items():
            if value is not None and name not in defaults:
                raise ValueError(
                    f"`{name}` is {value}, which means nothing to `method={method!r}`; that one takes "
                    f"{', '.join(f'`{known}`' for known in defaults)}."
                )
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {value}.")

        values = {name: default if given[name] is None else given[name] for name, default in defaults.items()}
        if method == "chain":
            count = values["num_speculative_tokens"]
            return cls(tree=False, depth=count, top_k=1, total_tokens=count, window=window)

        possible = max_nodes(values["depth"], values["top_k"])
        if total_tokens is None:
            values["total_tokens"] = min(values["total_tokens"], possible)

        if not values["depth"] <= values["total_tokens"] <= possible:
            raise ValueError(
                f"`total_tokens` is {values['total_tokens']}, but a tree with `depth` {values['depth']} and `top_k` "
                f"{values['top_k']} can keep {values['depth']} to {possible} nodes; change one of the three."
            )

        return cls(tree=True, window=window, **values)

    @property
    def drafted(self) -> int:
        """Return the largest number of tokens after the newest verified one that get keys in a round."""
        return max(self.total_tokens, (self.depth - 1) * self.top_k) + 1

    def check_vocabulary(self, draft) -> None:
        """Raise `ValueError` when a node cannot have so many children."""
        if self.top_k > draft.config.draft_vocab_size:
            raise ValueError(
                f"`top_k` is {self.top_k}, but the draft can propose only {draft.config.draft_vocab_size} different "
                "tokens; lower it."
            )

    def windowed(self, draft, given: str = "`draft_window` is") -> "DraftShape":
        """Return the same shape with the window that this draft was trained with, unless it has one.

        Args:
            draft: the draft that is decoded.
            given: begins the sentence of an error; it names the argument that the window comes from.

        Raises:
            `ValueError`: for a window that shows too little, or that this kind of draft would ignore.
        """
        window = self.window
        if window is None:
            window, given = draft.config.draft_sliding_window, "`draft_sliding_window` of the draft is"
        if window is None:
            return self

        if not draft.takes_window:
            raise ValueError(f"{given} {window}, which a {type(draft).__name__} ignores: leave it out.")
        if window <= self.depth:  # the last drafted token sees all before it, and one of the target's at least
            raise ValueError(f"{given} {window}, but must be above the {self.depth} tokens of a draft.")
        return replace(self, window=window)


def chain_length(draft, method: str, asked: int | None) -> int | None:
    """Return the tokens of a chain in a round, by default what the draft's config says; of a tree what was given."""
    return draft.config.chain_length if method == "chain" and asked is None else asked


def check_sampling(temperature: float, top_p: float, top_k: int | None, name: str = "sampling_top_k") -> None:
    """Raise `ValueError` for a value out of range, or for one that greedy decoding would ignore."""
    if temperature < 0:
        raise ValueError(f"`temperature` must not be negative, but is {temperature}; 0 decodes greedily.")
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must lie above 0 and at most at 1, but is {top_p}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"`{name}` must be at least 1, but is {top_k}; leave it out to draw from all tokens.")

    if temperature == 0 and (top_p < 1 or top_k is not None):
        ignored = "top_p" if top_p < 1 else name
        raise ValueError(f"`{ignored}` is set, but `temperature` is 0, which decodes greedily: set `temperature` too.")


def check_draws(target, temperature: float, generator: torch.Generator | None) -> None:
    """Raise `ValueError` when the ranks that share one target would each draw tokens of their own."""
    if temperature > 0 and generator is None and target.sharding is not None:
        raise ValueError(
            f"`generator` is None and `temperature` is {temperature}, but the target is spread over ranks, each of "
            "which would draw different tokens and then hang: give every rank a `torch.Generator` on the "
            "target's device, all with the same seed."
        )


def check_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, max_new_tokens: int, streamer) -> None:
    """Raise `ValueError` for prompts that are not a left-padded batch, or that cannot be streamed."""
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, but is {max_new_tokens}.")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"`input_ids` must be prompts of shape (batch, length) with at least one token each, but has shape "
            f"{tuple(input_ids.shape)}."
        )

    if streamer is not None and input_ids.shape[0] > 1:
        raise ValueError(f"`streamer` takes one prompt, but `input_ids` holds {input_ids.shape[0]}.")

    if attention_mask is None:
        return

    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, but `input_ids` {tuple(input_ids.shape)}."
        )

    mask = attention_mask.bool()
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError(
            "`attention_mask` has zeros after a token; pad prompts on the left (`padding_side='left'`), and give each "
            "at least one token."
        )


def check_prompt_media(input_ids: torch.Tensor, media: dict) -> None:
    """Raise `TypeError` for arguments that are not media. The target itself refuses media that it does not take."""
    unknown = next((name for name in media if name not in MEDIA), None)
    if unknown is not None:
        raise TypeError(f"`{unknown}` is not an argument of decoding; media are {', '.join(MEDIA)}.")

    for name in TYPES:
        types = media.get(name)
        if types is not None and types.shape != input_ids.shape:
            raise ValueError(f"`{name}` has shape {tuple(types.shape)}, but `input_ids` {tuple(input_ids.shape)}.")


def check_draft_fits(target, draft) -> None:
    """Raise `ValueError` when the draft was made for a target of another vocabulary, hidden size or taps."""
    config = draft.config
    if config.vocab_size != target.vocab_size:
        raise ValueError(
            f"`draft` was made for a vocabulary of {config.vocab_size} tokens, but the target has {target.vocab_size}; "
            "give the target that the draft was trained with."
        )

    hidden_size = getattr(config, "target_hidden_size", None) or config.hidden_size
    if hidden_size != target.hidden_size:
        raise ValueError(
            f"`draft` was made for a target with hidden size {hidden_size}, but the target's is {target.hidden_size}; "
            "give the target that the draft was trained with."
        )

    tap_ids, given = config.tap_ids, list(target.tap_ids or [])
    if tap_ids and list(tap_ids) != given:
        raise ValueError(
            f"`draft` was trained on the taps {list(tap_ids)}, but the target takes {given}; load the target with "
            "`tap_ids=draft.config.tap_ids`."
        )
    if tap_ids is None and len(given) != config.num_taps:
        raise ValueError(
            f"`draft` looks at {config.num_taps} taps, which its config does not name, but the target takes {given}; "
            "load the target with the `tap_ids` that the draft was trained on."
        )
