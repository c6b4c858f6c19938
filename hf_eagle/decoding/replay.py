"""Count what greedy decoding with a draft accepts, without decoding: the target's answers are known.

One reading of prompt and answer by the target gives the features of every token. What a round drafts depends only on
these, and what it accepts on the answer. So only the draft's part of decoding is left, for as many drafts, shapes and
windows as there are. The counts are those of `speculative_generate`, one by one: a round that passes the end of an
answer is judged by what the target would have said after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..targets.features import TargetFeatures
from .checks import DraftShape, check_draft_fits
from .every_place import Documents
from .proposal import Proposer
from .target_run import TargetRun, check_target
from .verification import keep_chosen


@dataclass(frozen=True)
class Transcript:
    """Prompts with the target's greedy answers, and the target's features of their tokens.

    Attributes:
        prompts: the batch of prompts, before any decoding.
        read, said: the target's features of the prompts, and of the answers without their last tokens; `said` is `None`
            if no answer has a second token.
        ids: `(batch, longest)`, prompts, answers and the tokens beyond, padded on the right.
        ends: tokens of every answer.
    """

    prompts: TargetRun
    read: TargetFeatures
    said: TargetFeatures | None
    ids: torch.Tensor
    ends: list[int]


@torch.no_grad()
def transcribe(
    target,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    answers: Sequence[list[int]],
    after: Sequence[list[int]],
    **media: torch.Tensor,
) -> Transcript:
    """
    Read prompts and answers with the target: each token once.

    Args:
        target: the target, with the draft's taps.
        input_ids, attention_mask, media: the prompts, as for `speculative_generate`.
        answers, after: what `continued_answers` returns for them.
    """
    check_target(target, needs_masks=len(input_ids) > 1)
    ends = list(map(len, answers))
    run = TargetRun(target, input_ids, attention_mask, room=max(ends), media=media)
    # as decoding does: media are of the prompts alone, whatever tokens an answer holds
    read, said = run.read_prompt(), None
    if max(ends) > 1:
        said = run.verify(_padded([answer[:-1] for answer in answers], target.device))
    run.cache.layers.clear()  # the keys of a long prompt are large, and nothing follows

    lengths, rows = run.lengths.host, run.input_ids.tolist()
    whole = [row[:n] + a + b for row, n, a, b in zip(rows, lengths, answers, after, strict=True)]
    return Transcript(run, read, said, _padded(whole, target.device), ends)


def _padded(rows: Sequence[list[int]], device: torch.device) -> torch.Tensor:
    """`(batch, longest)`, padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)


@torch.no_grad()
def replay(draft, transcript: Transcript, shape: DraftShape) -> list[list[int]]:
    """
    Return how many drafted tokens every round accepts, by prompt: `accepted_by_round` of `speculative_generate`.

    Args:
        draft: the draft, with the target's embeddings attached.
        transcript: its answers must go on for at least `shape.depth - 1` tokens after their ends.
        shape: what is drafted in a round, a chain or a tree.

    Raises:
        `ValueError`: for a draft that was made for another target, or a shape that it does not propose.
    """
    shape, documents = _shown(draft, transcript, shape)
    at_every_place = draft.proposer(shape, transcript.prompts).replay(documents)
    if at_every_place is None:
        return _walk(draft.proposer(shape, transcript.prompts), documents, shape.depth)
    return list(map(rounds_of, at_every_place))


@torch.no_grad()
def replay_places(draft, transcript: Transcript, shape: DraftShape) -> list[list[int]] | None:
    """
    Return how many drafted tokens are right behind each token but the last of every answer, by prompt.

    Args:
        draft, transcript, shape: as for `replay`.

    Returns:
        Accepted tokens by place, of which a round of decoding begins at some; `None` for a draft, or a shape, that can
        only be proposed round after round.

    Raises:
        `ValueError`: as `replay`.
    """
    shape, documents = _shown(draft, transcript, shape)
    return draft.proposer(shape, transcript.prompts).replay(documents)


def rounds_of(accepted: Sequence[int]) -> list[int]:
    """Return the accepted tokens of each round of decoding, from those at every place of an answer."""
    rounds, place = [], 0
    while place < len(accepted):
        rounds.append(accepted[place])
        place += accepted[place] + 1
    return rounds


def _shown(draft, transcript: Transcript, shape: DraftShape) -> tuple[DraftShape, Documents]:
    """The shape with the draft's own window, and what the draft is shown; both checked."""
    check_draft_fits(transcript.prompts.target, draft)
    shape.check_vocabulary(draft)
    return shape.windowed(draft), _documents(draft, transcript)


def _documents(draft, transcript: Transcript) -> Documents:
    """What a draft is shown of a transcript."""
    said, ids, run = transcript.said, transcript.ids, transcript.prompts
    features = draft.select_features(transcript.read)
    longest, prompts = features.shape[1], run.lengths
    if said is not None:  # an answer follows its own prompt, not the longest one
        features = torch.cat([features, draft.select_features(said)], dim=1)
        if not prompts.uniform:
            places = torch.arange(features.shape[1], device=ids.device)
            behind = places - prompts.device[:, None]
            index = torch.where(behind < 0, places, (longest + behind).clamp_max(features.shape[1] - 1))
            features = features[torch.arange(len(ids), device=ids.device)[:, None], index]

    places = torch.arange(features.shape[1], device=ids.device)
    positions = places.expand(len(ids), -1)
    if run.prompt_positions is not None and draft.config.mrope_section is not None:
        behind = (positions + run.moved[:, None]).expand(3, -1, -1)
        read = _wider(run.prompt_positions, features.shape[1])
        positions = torch.where(places < prompts.device[:, None], read, behind)

    embeddings = draft.select_embeddings(transcript.read)
    if embeddings is not None:
        embeddings = _wider(embeddings.roll(-1, dims=1).transpose(1, 2), features.shape[1]).transpose(1, 2)
        own = draft.embed_tokens(ids[:, 1 : features.shape[1] + 1]).to(embeddings.dtype)
        followed_by_text = (places >= prompts.device[:, None] - 1)[..., None]
        embeddings = torch.where(followed_by_text, own, embeddings)

    return Documents(features, ids, embeddings, positions, prompts, transcript.ends)


def _wider(x: torch.Tensor, length: int) -> torch.Tensor:
    """With zeros behind its last dimension, up to this length."""
    return torch.nn.functional.pad(x, (0, length - x.shape[-1]))


def _walk(proposer: Proposer, documents: Documents, depth: int) -> list[list[int]]:
    """Go through the rounds of all prompts together, one round after the other."""
    ids, features, lengths = documents.ids, documents.features, documents.prompts
    found: list[list[int]] = [[] for _ in documents.ends]
    rows = list(range(len(found)))
    limits = [length + end - 1 for length, end in zip(lengths.host, documents.ends, strict=True)]
    new, embeddings = lengths.host, documents.embeddings
    kept = [row for row in rows if documents.ends[row] > 1]

    while kept:
        if len(kept) < len(rows):
            index = torch.tensor(kept, device=ids.device)
            proposer.select(kept, index)
            lengths, ids, features = lengths.select(kept, index), ids[index], features[index]
            embeddings = None if embeddings is None else embeddings[index]
            rows, new, limits = ([x[place] for place in kept] for x in (rows, new, limits))

        # the tokens that are new to the draft, of each row from its own place on
        begin = lengths.device - torch.tensor(new, device=ids.device)
        places = (begin[:, None] + torch.arange(max(new), device=ids.device)).clamp_max(features.shape[1] - 1)
        index = torch.arange(len(rows), device=ids.device)[:, None]
        shown = None if embeddings is None else embeddings[index, places]
        embeddings = None  # later tokens are text
        proposal = proposer.propose(features[index, places], ids[index, places + 1], lengths, shown)

        window = torch.cat([ids.gather(1, lengths.device[:, None]), proposal.tokens], dim=1)
        tree, levels = proposal.tree, torch.arange(window.shape[1], device=ids.device)[None]
        # the target's choice behind a node that follows the answer; behind any other it does not matter
        behind = lengths.device[:, None] + 1 + (levels if tree is None else tree.depths)
        verdict = keep_chosen(ids.gather(1, behind.clamp_max(ids.shape[1] - 1)), window, tree, depth)

        accepted = verdict.accepted.tolist()
        for row, count in zip(rows, accepted, strict=True):
            found[row].append(count)
        new = [count + 1 for count in accepted]
        lengths = lengths.grown(new, verdict.accepted + 1)
        kept = [place for place, limit in enumerate(limits) if lengths.host[place] < limit]
    return found
