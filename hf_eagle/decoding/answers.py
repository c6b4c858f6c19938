"""Keep a batch's answers on the host while they are decoded: their tokens, the unfinished rows, and times."""

import time
from collections.abc import Collection

import torch
from transformers.generation.streamers import BaseStreamer


class Answers:
    """The answers of a batch while they grow.

    Attributes:
        tokens: new token ids of every prompt, cut at the end of the answer.
        rows: prompts whose answers are not finished, in the order of the remaining batch.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int,
        eos_token_ids: Collection[int],
        streamer: BaseStreamer | None = None,
    ):
        self.input_ids, self.max_new_tokens, self.eos_token_ids = input_ids, max_new_tokens, frozenset(eos_token_ids)
        self.tokens: list[list[int]] = [[] for _ in input_ids]
        self.rows = list(range(len(self.tokens)))
        self.streamer = streamer
        if streamer is not None:
            streamer.put(input_ids.cpu())  # as `generate` does; a streamer may skip the prompt

    def extend(self, found: list[list[int]]) -> list[int] | None:
        """Append new tokens to the unfinished answers, up to their ends.

        Returns:
            The batch indices of the answers that continue, or `None` if all of them do.
        """
        kept = [
            place
            for place, (row, tokens) in enumerate(zip(self.rows, found, strict=True))
            if not self._extend_row(self.tokens[row], tokens)
        ]

        if len(kept) == len(self.rows):
            return None

        self.rows = [self.rows[place] for place in kept]
        if self.streamer is not None:
            self.streamer.end()
        return kept

    def _extend_row(self, answer: list[int], found: list[int]) -> bool:
        """Return whether the answer's end is reached."""
        before, finished = len(answer), False
        for token in found:
            answer.append(token)
            finished = token in self.eos_token_ids or len(answer) == self.max_new_tokens
            if finished:
                break

        if self.streamer is not None:
            self.streamer.put(torch.tensor(answer[before:]))
        return finished

    def sequences(self, pad_token_id: int) -> torch.Tensor:
        """Prompts and answers, `(batch, length + longest answer)`, padded on the right."""
        longest = max(map(len, self.tokens))
        padded = [answer + [pad_token_id] * (longest - len(answer)) for answer in self.tokens]
        return torch.cat([self.input_ids, self.input_ids.new_tensor(padded)], dim=1)


class RoundClock:
    """Seconds spent on drafting and in the target. With CUDA, events measure them, so the host does not wait."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.marks: list[tuple] = []

    def mark(self):
        if not self.cuda:
            if self.device.type != "cpu":  # or the time would be that of asking for the work
                torch.accelerator.synchronize(self.device)
            return time.perf_counter()

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, start, drafted, verified) -> None:
        """One round's marks."""
        self.marks.append((start, drafted, verified))

    def seconds(self) -> tuple[float, float]:
        """Return the total seconds of drafting and of the target. Call it after the last transfer to the host."""
        return tuple(
            sum(m[i].elapsed_time(m[i + 1]) / 1000 if self.cuda else m[i + 1] - m[i] for m in self.marks) + 0.0
            for i in (0, 1)
        )
