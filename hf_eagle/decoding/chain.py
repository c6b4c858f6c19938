"""Chain speculative decoding: an EAGLE-3 draft proposes K tokens, one target forward verifies them.

The output is the target's own greedy output; the draft only decides how many tokens a target forward yields (EAGLE-3,
arXiv 2503.01840, without its tree). The order of work is vLLM's, and so are the counts:

* The prompt's forward yields the first new token. Nothing is drafted before it, nothing is counted for it.
* Every later target forward is one round: it verifies K drafted tokens and counts as one draft of K tokens. This holds
  for the last round too, however few tokens are still wanted.
* A round's accepted tokens are the leading ones that equal the target's choices. They are counted *before* the output
  is cut at an end-of-sequence token or at `max_new_tokens`: tokens accepted behind the cut count.
* An answer that is finished by its first token has no round.

vLLM 0.32.0 counts by this rule (`Scheduler.update_from_output`, `SpecDecodingStats.observe_draft`) as long as prompt,
answer and 2K more tokens fit in its `max_model_len`; nearer to that end it verifies zeros, or fewer than K tokens.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from transformers import DynamicCache


@dataclass(frozen=True)
class ChainOutput:
    """What `chain_generate` returns."""

    sequences: torch.Tensor  # (1, prompt + new_tokens), the prompt first, as `generate` returns it
    new_tokens: int  # after the cut at an end-of-sequence token or `max_new_tokens`
    drafts: int  # rounds, each of which verified K drafted tokens
    accepted_per_position: list[int]  # length K: rounds that accepted at least k + 1 drafted tokens


@torch.no_grad()
def chain_generate(
    target,
    draft,
    input_ids: torch.Tensor,
    *,
    num_speculative_tokens: int = 3,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
) -> ChainOutput:
    """
    Decodes one prompt greedily with a draft. In float32 the tokens are those of `greedy_generate`.

    Args:
        target (`FrozenTarget`):
            The model that decides; its taps must be those the draft was trained on.
        draft (`LlamaForCausalLMEagle3`):
            The draft, with the target's embeddings attached, on the target's device.
        input_ids (`torch.Tensor`):
            The prompt, (1, length), length at least 1.
        num_speculative_tokens (`int`, *optional*, defaults to `3`):
            K, the tokens drafted a round.
        max_new_tokens (`int`):
            The longest answer, in tokens.
        eos_token_ids (collection of `int`, *optional*):
            Tokens that end the answer; the one that ended it is kept in the output.

    Raises:
        `ValueError`: an argument out of range, or a draft that was made for a target of another shape.
    """
    _check_arguments(target, draft, input_ids, num_speculative_tokens, max_new_tokens)
    input_ids = input_ids.to(target.device)
    # without a config every layer keeps all its keys, also a sliding one, so any of them can be rolled back
    target_cache, draft_cache = DynamicCache(), DynamicCache()

    features = target(input_ids, past_key_values=target_cache, use_cache=True)
    taps = features.taps  # (1, rows, taps * hidden) of tokens whose features the draft has not seen
    first = target.logits(features.last_hidden[:, -1:]).argmax(-1)
    next_ids = torch.cat([input_ids[:, 1:], first], dim=1)  # (1, rows): token i + 1 beside the features of token i

    new_tokens: list[int] = []
    finished = _extend(new_tokens, first[0].tolist(), max_new_tokens, eos_token_ids)
    position, drafts, accepted_per_position = 0, 0, [0] * num_speculative_tokens
    while not finished:
        proposed = _propose(draft, taps, next_ids, position, draft_cache, num_speculative_tokens)
        position += next_ids.shape[1]

        # choice k is the target's token after the window's token k, so it judges proposal k
        window = torch.cat([next_ids[:, -1:], proposed], dim=1)  # (1, K + 1)
        features = target(window, past_key_values=target_cache, use_cache=True)
        choices = target.logits(features.last_hidden).argmax(-1)  # (1, K + 1)

        # the only transfer to the host in a round
        row = torch.cat([proposed, choices], dim=1)[0].tolist()
        chosen = row[num_speculative_tokens:]
        accepted = _count_leading_matches(row[:num_speculative_tokens], chosen)

        drafts += 1
        for index in range(accepted):
            accepted_per_position[index] += 1
        _drop_last(target_cache, num_speculative_tokens - accepted)
        taps, next_ids = features.taps[:, : accepted + 1], choices[:, : accepted + 1]
        finished = _extend(new_tokens, chosen[: accepted + 1], max_new_tokens, eos_token_ids)

    sequences = torch.cat([input_ids, input_ids.new_tensor([new_tokens])], dim=1)
    return ChainOutput(sequences, len(new_tokens), drafts, accepted_per_position)


@torch.no_grad()
def greedy_generate(
    model, input_ids: torch.Tensor, *, max_new_tokens: int, eos_token_ids: Collection[int] = ()
) -> torch.Tensor:
    """
    Decodes one prompt greedily with the target alone, by the plain forward of the Hugging Face model.

    This is `model.generate(do_sample=False)` without what a `generation_config` may add (a repetition penalty changes
    greedy output), and without its work per token, so that speeds compare fairly.

    Args:
        model (`PreTrainedModel`):
            The causal language model itself (`FrozenTarget.model`).
        input_ids (`torch.Tensor`):
            The prompt, (1, length).
        max_new_tokens (`int`), eos_token_ids (collection of `int`, *optional*):
            As in `chain_generate`.

    Returns:
        `torch.Tensor`: the prompt and the answer, (1, length + new tokens).
    """
    input_ids = input_ids.to(model.device)
    cache = DynamicCache(config=model.config)
    new_tokens: list[int] = []
    window, finished = input_ids, False
    while not finished:
        logits = model(window, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        window = logits[:, -1:].argmax(-1)
        finished = _extend(new_tokens, window[0].tolist(), max_new_tokens, eos_token_ids)
    return torch.cat([input_ids, input_ids.new_tensor([new_tokens])], dim=1)


def _propose(draft, taps, next_ids, position: int, cache: DynamicCache, count: int) -> torch.Tensor:
    """Drafts `count` target ids, (1, count); `cache` gains the given rows' keys and nothing else.

    Rows are (features of token i, id of token i + 1) for the tokens that the target has newly verified; the first of
    them stands at `position`. Each further step feeds the draft its own hidden state and token, one position on.
    """
    positions = torch.arange(position, position + next_ids.shape[1], device=next_ids.device)[None]
    hidden = draft.combine_features(taps)
    normed, feedback = draft.decode(next_ids, hidden, positions, cache)
    tokens = [_draft_token(draft, normed)]

    feedback, positions = feedback[:, -1:], positions[:, -1:]
    for _ in range(count - 1):
        positions = positions + 1
        normed, feedback = draft.decode(tokens[-1], feedback, positions, cache)
        tokens.append(_draft_token(draft, normed))

    # these keys came from the draft's own hidden states; accepted tokens come again, with the target's features
    _drop_last(cache, count - 1)
    return torch.cat(tokens, dim=1)


def _draft_token(draft, normed: torch.Tensor) -> torch.Tensor:
    """The target id (1, 1) that the last row of `normed` (1, rows, hidden) proposes."""
    return draft.to_target_ids(draft.compute_logits(normed[:, -1:]).argmax(-1))


def _count_leading_matches(proposed: list[int], chosen: list[int]) -> int:
    for index, token in enumerate(proposed):
        if token != chosen[index]:
            return index
    return len(proposed)


def _drop_last(cache: DynamicCache, count: int) -> None:
    # `crop` takes a negative number of tokens to remove; 0 means "keep none" in older releases
    if count > 0:
        cache.crop(-count)


def _extend(tokens: list[int], found: list[int], max_new_tokens: int, eos_token_ids: Collection[int]) -> bool:
    """Appends `found` up to the end of the answer; whether that end is reached."""
    for token in found:
        tokens.append(token)
        if token in eos_token_ids or len(tokens) == max_new_tokens:
            return True
    return False


def _check_arguments(target, draft, input_ids: torch.Tensor, num_speculative_tokens: int, max_new_tokens: int) -> None:
    if num_speculative_tokens < 1:
        raise ValueError(f"`num_speculative_tokens` must be at least 1, but is {num_speculative_tokens}.")
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, but is {max_new_tokens}.")
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        raise ValueError(
            f"`input_ids` must be one prompt of shape (1, length) with at least one token, but has shape "
            f"{tuple(input_ids.shape)}; decode several prompts one after the other."
        )
    check_draft_fits(target, draft)


def check_draft_fits(target, draft) -> None:
    """Raises a `ValueError` when the draft was made for a target of another vocabulary, hidden size or taps."""
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
    tap_ids = config.eagle_aux_hidden_state_layer_ids
    if tap_ids is not None and list(tap_ids) != list(target.tap_ids):
        raise ValueError(
            f"`draft` was trained on the taps {list(tap_ids)}, but the target takes {list(target.tap_ids)}; load the "
            "target with `tap_ids=draft.config.eagle_aux_hidden_state_layer_ids`."
        )
