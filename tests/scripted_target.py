"""A target whose answers are chosen token by token, and what it was asked."""

import torch
from transformers import GenerationConfig, LlamaConfig


class ScriptedTarget:
    """Says the given tokens, one list a prompt, in the order of the prompts; `asked` holds each prompt with its answer.

    What follows an end of turn is what `model.generate` pads with, as in a batch.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, tokenizer, answers: list[list[int]], ends: list[int] | None = None):
        self.config = LlamaConfig(max_position_embeddings=8192)
        self.generation_config = GenerationConfig(eos_token_id=ends or [tokenizer.eos_token_id])
        self.asked: list[tuple[list[int], list[int]]] = []
        self._answers = iter(answers)

    def generate(self, input_ids, attention_mask, generation_config):
        assert len(input_ids) == 1
        answer = next(self._answers)
        self.asked.append((input_ids[0].tolist(), answer))
        return torch.cat([input_ids, torch.tensor([answer], dtype=torch.long)], 1)
