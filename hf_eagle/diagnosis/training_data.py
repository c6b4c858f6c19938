"""A sample of the data that a draft was trained on: its prompts, system prompts, lengths and runs of tokens."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch

from ..data.conversations import build_dataset
from ..data.messages import read_record, read_tools, text_of
from ..evaluation.prompts import Prompt


MOST = 2000  # conversations that are looked at, spread over the data
_ANSWERS = 64  # conversations whose answers are compared with what the target says
_RUN = 3  # tokens in a row that count as seen together


class TrainingData:
    """A sample of training data.

    Args:
        records (`datasets.Dataset`): chat records, as `load_records` returns them.
        tokenizer: the target's.
        max_length: longest conversation in tokens, as in training.
        template_kwargs: further arguments of the chat template, as in training.

    Raises:
        ValueError: as `build_dataset`.
    """

    def __init__(self, records, tokenizer, max_length: int, template_kwargs: dict | None = None):
        places = spread_over(len(records), MOST)
        chosen = records.select(places)
        self.records = [chosen[place] for place in range(len(chosen))]
        self.rows = build_dataset(chosen, tokenizer, max_length, template_kwargs=template_kwargs)
        self._messages = [read_record(record, place)[0] for place, record in enumerate(self.records)]

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation."""
        return max(len(row) for row in self.rows["input_ids"])

    def prompts(self, count: int) -> list[Prompt]:
        """The first questions of so many conversations, spread over the data."""
        found = []
        for place in spread_over(len(self.records), count):
            messages = self._messages[place]
            first = next((n for n, message in enumerate(messages) if message["role"] == "assistant"), None)
            if first:
                found.append(Prompt(messages[:first], None, place, tools=read_tools(self.records[place], place)))
        return found

    def system_prompts(self) -> Counter[str]:
        """How many conversations have each system prompt; the empty text stands for none."""
        return Counter(system_prompt(messages) for messages in self._messages)

    def share_of_own_answers(self, target) -> float:
        """The share of supervised tokens that the target itself finds the most probable there."""
        same = total = 0
        for place in spread_over(len(self.rows), _ANSWERS):
            row = self.rows[place]
            ids, mask = (torch.tensor(row[name], device=target.device) for name in ("input_ids", "loss_mask"))
            hidden = target(ids[None]).last_hidden[0, :-1]
            supervised = mask[1:] > 0
            said = target.head_summary(hidden[supervised]).top
            same += int((said == ids[1:][supervised]).sum())
            total += int(supervised.sum())
        return same / max(total, 1)

    @cached_property
    def _answers(self) -> list[list[int]]:
        """The supervised tokens of each conversation."""
        pairs = zip(self.rows["input_ids"], self.rows["loss_mask"], strict=True)
        return [[token for token, supervised in zip(*pair, strict=True) if supervised > 0] for pair in pairs]

    def runs_seen(self) -> set[tuple[int, ...]]:
        """Runs of three tokens in the answers of every other conversation."""
        return {run for answer in self._answers[::2] for run in runs_of(answer)}

    def own_coverage(self) -> float:
        """The share of runs in the remaining answers that are among these: what answers to prompts alike would have."""
        return coverage(self._answers[1::2], self.runs_seen())


def spread_over(total: int, count: int) -> list[int]:
    """So many indices, evenly over all."""
    count = min(total, count)
    return [index * total // count for index in range(count)]


def system_prompt(messages: Sequence[dict]) -> str:
    """The text of a conversation's system message, empty without one."""
    return text_of(messages[0]["content"]) if messages and messages[0]["role"] == "system" else ""


def runs_of(ids: Sequence[int]) -> Iterable[tuple[int, ...]]:
    """Runs of three tokens."""
    return zip(*(ids[first:] for first in range(_RUN)), strict=False)


def coverage(rows: Iterable[Sequence[int]], seen: set[tuple[int, ...]]) -> float:
    """The share of runs of three tokens that were seen."""
    found = [run in seen for row in rows for run in runs_of(row)]
    return sum(found) / max(len(found), 1)
