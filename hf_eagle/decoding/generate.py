"""Lossless speculative decoding: a draft proposes a chain or a tree of tokens, one target forward pass verifies them.

The output is the target's own, token for token when greedy and in distribution when sampling; the draft only decides
how many tokens a forward pass of the target yields. The order of work and the counts are vLLM's:

* The prompt's forward pass yields the first new token. Nothing is drafted before it, nothing is counted for it.
* Every later forward pass of the target is one round: it verifies K drafted tokens (in a tree, `depth` levels of them)
  and counts as one draft. This holds for the last round too, however few tokens remain.
* A round's accepted tokens are the leading ones that equal the target's choices. They are counted *before* the output
  is cut at an end-of-sequence token or at `max_new_tokens`: tokens accepted after the cut count.
* An answer that ends with its first token has no round.

vLLM 0.32.0 counts by this rule (`Scheduler.update_from_output`, `SpecDecodingStats.observe_draft`) as long as prompt,
answer and 2K more tokens fit in its `max_model_len`; nearer to that end it verifies zeros, or fewer than K tokens.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from transformers.generation.streamers import BaseStreamer

from ..targets.few_rows import few_rows_products
from .answers import Answers, RoundClock
from .checks import (
    DraftShape,
    chain_length,
    check_draft_fits,
    check_draws,
    check_prompt_media,
    check_prompts,
    check_sampling,
)
from .target_run import TargetRun, check_target
from .verification import Sampling, judge, per_position


@dataclass(frozen=True)
class SpeculativeOutput:
    """The result of `speculative_generate`; lists have one entry per prompt.

    Attributes:
        sequences: `(batch, prompt + longest answer)`, the prompt first, as `generate` returns it.
        answers: new token ids, cut at an end-of-sequence token or at `max_new_tokens`.
        drafts: rounds.
        accepted_per_position: rounds that accepted at least k + 1 drafted tokens (in a tree: levels), for every k.
        accepted_by_round: accepted drafted tokens of every round. The context of a round is the prompt, the first new
            token, and for each earlier round its accepted tokens and one more.
        rounds: forward passes of the target after the prompts' own; one serves all prompts of the batch.
        draft_seconds, target_seconds: time of these rounds for drafting and for the target's forward passes.
    """

    sequences: torch.Tensor
    answers: list[list[int]]
    drafts: list[int]
    accepted_per_position: list[list[int]]
    accepted_by_round: list[list[int]]
    rounds: int
    draft_seconds: float
    target_seconds: float


@torch.no_grad()
def speculative_generate(
    target,
    draft,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    method: str = "chain",
    num_speculative_tokens: int | None = None,
    depth: int | None = None,
    top_k: int | None = None,
    total_tokens: int | None = None,
    draft_window: int | None = None,
    eos_token_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    sampling_top_k: int | None = None,
    generator: torch.Generator | None = None,
    streamer: BaseStreamer | None = None,
    **media: torch.Tensor,
) -> SpeculativeOutput:
    """
    Decode prompts with a draft, losslessly.

    Args:
        target (`FrozenTarget`):
            The model that verifies; its taps must be those that the draft was trained on.
        draft:
            The draft, with the target's embeddings attached, on the target's device.
        input_ids (`torch.Tensor`):
            The prompts, (batch, length), padded on the left.
        attention_mask (`torch.Tensor`, *optional*):
            (batch, length), 0 on padding; no padding when left out.
        max_new_tokens (`int`):
            The longest answer, in tokens.
        method (`str`, *optional*, defaults to `"chain"`):
            `"chain"`, or `"tree"` for EAGLE-2's dynamic tree.
        num_speculative_tokens (`int`, *optional*):
            Chain: K, the tokens drafted per round. By default 3, of a block draft what its blocks hold.
        depth, top_k, total_tokens (`int`, *optional*, default to `5`, `8` and `40`):
            Tree: its levels, the nodes expanded on each and the children of each, and the nodes that are verified.
            With `top_k` 1 and `depth` K it is the chain of K.
        draft_window (`int`, *optional*):
            Let the draft's attention see only so many last tokens, its own included, as a server with a sliding window
            does. Above the number of tokens drafted in a row. By default as many as in training.
        eos_token_ids (collection of `int`, *optional*):
            Tokens that end an answer; the one that ended it is kept in the output.
        temperature (`float`, *optional*, defaults to `0.0`):
            0 decodes greedily; above it tokens are drawn from the target's distribution.
        top_p (`float`, *optional*, defaults to `1.0`), sampling_top_k (`int`, *optional*):
            Draw from the nucleus of this mass, and from this number of most probable tokens.
        generator (`torch.Generator`, *optional*):
            The source of randomness, on the target's device. A target that is spread over ranks needs one, with the
            same seed on all of them.
        streamer (`transformers` streamer, *optional*):
            Receives the prompt by `put`, then the tokens of every round as they come; one prompt only.
        media:
            The processor's other outputs for prompts with images or videos (`pixel_values`, `image_grid_thw`,
            `mm_token_type_ids`, ...), for the prompts' forward pass.

    Raises:
        `ValueError`: an argument out of range or without meaning given the others, a draft that was made for a target
            of another shape, or a target that cannot verify such drafts.
    """
    num_speculative_tokens = chain_length(draft, method, num_speculative_tokens)
    shape = DraftShape.of(method, num_speculative_tokens, depth, top_k, total_tokens, draft_window)
    shape.check_vocabulary(draft)
    shape = shape.windowed(draft)
    check_sampling(temperature, top_p, sampling_top_k)
    check_draws(target, temperature, generator)
    check_prompts(input_ids, attention_mask, max_new_tokens, streamer)
    check_prompt_media(input_ids, media)
    check_draft_fits(target, draft)
    check_target(target, needs_masks=shape.tree or input_ids.shape[0] > 1, branches=shape.tree)

    sampling = Sampling(temperature, top_p, sampling_top_k, generator)
    answers = Answers(input_ids, max_new_tokens, eos_token_ids, streamer)
    run = TargetRun(target, input_ids, attention_mask, room=max_new_tokens + shape.drafted, media=media)
    accepted: list[list[int]] = [[] for _ in answers.tokens]
    with few_rows_products(target.model, draft):
        decoding = _Decoding(target, draft, shape, sampling, run)
        kept = answers.extend(decoding.newest.tolist())
        while answers.rows:
            if kept is not None:
                decoding.select(kept)
            report = decoding.round()

            for row, (count, *_) in zip(answers.rows, report, strict=True):
                accepted[row].append(count)

            kept = answers.extend([chosen[: count + 1] for count, *chosen in report])

    sequences = answers.sequences(_pad_token_id(target, eos_token_ids)).to(target.device)
    clock, depth = decoding.clock, shape.depth
    counts = list(map(len, accepted)), [per_position(rounds, depth) for rounds in accepted], accepted
    return SpeculativeOutput(sequences, answers.tokens, *counts, len(clock.marks), *clock.seconds())


class _Decoding:
    """A batch between two rounds: what both models have seen, and what the draft has yet to see."""

    def __init__(self, target, draft, shape: DraftShape, sampling: Sampling, run: TargetRun):
        self.target, self.draft, self.shape, self.sampling = target, draft, shape, sampling
        self.clock = RoundClock(target.device)
        self.target_run, lengths = run, run.lengths
        self.proposer = draft.proposer(shape, run)

        features = run.read_prompt()
        # (rows, 1): the newest token of each answer; the target has no keys for it yet
        self.newest = sampling.choose(target.logits(run.last_of_prompt(features.last_hidden)))
        # the features of token i go with the id of token i + 1
        self.features = draft.select_features(features)
        next_ids = run.input_ids.roll(-1, dims=1)
        last = (lengths.device - 1)[:, None]
        self.next_ids = next_ids.scatter(1, last, self.newest)

        self.embeddings = draft.select_embeddings(features)
        if self.embeddings is not None:  # likewise of token i + 1; the newest token stands for no image or video
            rolled = self.embeddings.roll(-1, dims=1)
            own = draft.embed_tokens(self.newest).to(rolled.dtype)
            self.embeddings = rolled.scatter(1, last[..., None].expand_as(own), own)

    def round(self) -> list[list[int]]:
        """Draft and verify once; return a list per row: the number of accepted drafted tokens, then its new tokens."""
        start = self.clock.mark()
        embeddings, self.embeddings = self.embeddings, None  # only the prompts have media
        proposal = self.proposer.propose(self.features, self.next_ids, self.target_run.lengths, embeddings)
        drafted = self.clock.mark()

        window, tree = torch.cat([self.newest, proposal.tokens], dim=1), proposal.tree
        features = self.target_run.verify(window, tree)
        verdict = judge(self.target.logits(features.last_hidden), window, tree, self.shape.depth, self.sampling)
        self.clock.add(start, drafted, self.clock.mark())

        # the only transfer to the host in a round
        report = torch.cat([verdict.accepted[:, None], verdict.chosen], dim=1).tolist()
        counts = [row[0] + 1 for row in report]

        # features along the kept path; whoever reads them ignores what stands after a row's own tokens
        path, self.features = verdict.path, self.draft.select_features(features)
        if path is None:
            self.features = self.features[:, : max(counts)]
        else:
            path = path[:, : max(counts)]
            self.target_run.cache.gather(path)
            index = path[..., None].expand(-1, -1, self.features.shape[-1])
            self.features = self.features.gather(1, index)

        self.next_ids = verdict.chosen[:, : max(counts)]
        self.newest = self.next_ids.gather(1, verdict.accepted[:, None])
        self.target_run.keep(counts, verdict.accepted + 1)
        return report

    def select(self, kept: list[int]) -> None:
        """Drop finished rows from the batch."""
        rows = torch.tensor(kept, device=self.newest.device)
        self.target_run.select(kept, rows)
        self.proposer.select(kept, rows)
        self.features, self.next_ids, self.newest = self.features[rows], self.next_ids[rows], self.newest[rows]
        self.embeddings = None if self.embeddings is None else self.embeddings[rows]


@torch.no_grad()
def target_generate(
    target,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    sampling_top_k: int | None = None,
    generator: torch.Generator | None = None,
    **media: torch.Tensor,
) -> list[list[int]]:
    """
    Decode with the target alone, the baseline for a draft's speed.

    This is `model.generate` without what a `generation_config` may add (a repetition penalty changes greedy output),
    and without its work per token. Speeds compare fairly: it uses the model's plain forward, and the same caches and
    choices as decoding with a draft.

    Args:
        See `speculative_generate`.

    Returns:
        New token ids of every prompt, cut at an end-of-sequence token or at `max_new_tokens`.
    """
    check_sampling(temperature, top_p, sampling_top_k)
    check_draws(target, temperature, generator)
    check_prompts(input_ids, attention_mask, max_new_tokens, None)
    check_prompt_media(input_ids, media)
    check_target(target, needs_masks=input_ids.shape[0] > 1)

    sampling = Sampling(temperature, top_p, sampling_top_k, generator)
    answers = Answers(input_ids, max_new_tokens, eos_token_ids)
    run = TargetRun(target, input_ids, attention_mask, room=max_new_tokens, media=media)
    answer_alone(target, run, answers, sampling)
    return answers.tokens


def answer_alone(target, run: TargetRun, answers: Answers, sampling: Sampling) -> None:
    """Let the target answer the prompts of a run, token by token, until all `answers` are finished."""
    with few_rows_products(target.model):
        newest = sampling.choose(target.logits(run.last_of_prompt(run.read_prompt().last_hidden)))
        kept = answers.extend(newest.tolist())
        while answers.rows:
            if kept is not None:
                index = torch.tensor(kept, device=target.device)
                run.select(kept, index)
                newest = newest[index]

            newest = sampling.choose(run.logits_of(newest))
            kept = answers.extend(newest.tolist())
            run.keep([1] * len(newest), torch.ones_like(run.lengths.device))


def _pad_token_id(target, eos_token_ids: Collection[int]) -> int:
    pad = getattr(target.config, "pad_token_id", None)
    return pad if pad is not None else min(eos_token_ids, default=0)
