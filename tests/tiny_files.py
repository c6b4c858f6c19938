"""A tiny target with its tokenizer, and chats it can read, as files: for tests that start scripts."""

import json

import torch
from tiny_tokenizer import CHATML, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


WORDS = "red green blue one two three four five six seven eight nine ten sun moon star tree bird fish stone".split()


def write_chats(path, number=12, words=WORDS):
    generator = torch.Generator().manual_seed(0)

    def text(longest):
        length = int(torch.randint(2, longest, (), generator=generator))
        return " ".join(words[int(i)] for i in torch.randint(0, len(words), (length,), generator=generator))

    with open(path, "w") as file:
        for _ in range(number):
            messages = [{"role": "user", "content": text(6)}, {"role": "assistant", "content": text(14)}]
            file.write(json.dumps({"messages": messages}) + "\n")


def write_tiny_target(folder):
    """A random tied Llama of 8 layers and hidden size 32."""
    tokenizer = tiny_tokenizer(CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_recipe(folder) -> dict:
    """A recipe of six steps on `chats.jsonl` of a folder, for the `target` that lies beside it."""
    return {
        "target": str(folder / "target"),
        "train_data": [str(folder / "chats.jsonl")],
        "draft_vocab_size": 24,
        "ttt_steps": 2,
        "oov_rows": "renormalize",  # a random target rarely says one of 24 tokens
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_length": 128,
    }


def save_changed(adapted, folder, seed: int) -> None:
    """Save a PEFT adapter whose trained weights are random, so that it changes what its base says."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
