"""Let the target answer alone, and say what it would have said behind the end of each answer."""

from collections.abc import Collection

import torch

from .answers import Answers
from .checks import check_prompt_media, check_prompts
from .generate import answer_alone
from .target_run import TargetRun, check_target
from .verification import Sampling


class ContinuedAnswers(Answers):
    """Answers that go on behind their ends.

    Attributes:
        after: of every prompt the first `beyond` tokens behind the end of its answer.
    """

    def __init__(self, input_ids: torch.Tensor, max_new_tokens: int, eos_token_ids: Collection[int], beyond: int):
        super().__init__(input_ids, max_new_tokens, eos_token_ids)
        self.after: list[list[int]] = [[] for _ in self.tokens]
        self.beyond = beyond
        self._ended: set[int] = set()

    def _extend_row(self, answer: list[int], found: list[int]) -> bool:
        row = next(row for row in self.rows if self.tokens[row] is answer)
        for token in found:
            if row in self._ended:
                self.after[row].append(token)
            elif super()._extend_row(answer, [token]):
                self._ended.add(row)
        return row in self._ended and len(self.after[row]) >= self.beyond


@torch.no_grad()
def continued_answers(
    target,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    beyond: int,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
    **media: torch.Tensor,
) -> tuple[list[list[int]], list[list[int]]]:
    """
    Return the greedy answers of `target_generate`, and the `beyond` tokens that follow each of them.

    Args:
        See `speculative_generate`.
    """
    check_prompts(input_ids, attention_mask, max_new_tokens, None)
    check_prompt_media(input_ids, media)
    check_target(target, needs_masks=input_ids.shape[0] > 1)

    answers = ContinuedAnswers(input_ids, max_new_tokens, eos_token_ids, beyond)
    run = TargetRun(target, input_ids, attention_mask, room=max_new_tokens + beyond, media=media)
    answer_alone(target, run, answers, Sampling())
    return answers.tokens, answers.after
