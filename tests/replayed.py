"""Decode with a draft, and replay the same answers: the two must count the same, round by round."""

from hf_eagle.decoding import speculative_generate
from hf_eagle.decoding.checks import DraftShape
from hf_eagle.decoding.continued import continued_answers
from hf_eagle.decoding.replay import replay, transcribe


def replayed(target, draft, inputs, shapes, max_new_tokens, eos_token_ids=()):
    """Accepted tokens of every round for each of `shapes`, from one forward of the target: (decoded, replayed) each."""
    asked = {"max_new_tokens": max_new_tokens, "eos_token_ids": eos_token_ids}
    decoded = [speculative_generate(target, draft, **inputs, **asked, **shape) for shape in shapes]
    made = [DraftShape.of(**{{"draft_window": "window"}.get(k, k): x for k, x in shape.items()}) for shape in shapes]
    answers, after = continued_answers(target, **inputs, **asked, beyond=max(shape.depth for shape in made) - 1)
    assert all(out.answers == answers for out in decoded)

    transcript = transcribe(target, answers=answers, after=after, **inputs)
    return [(out.accepted_by_round, replay(draft, transcript, one)) for out, one in zip(decoded, made, strict=True)]
