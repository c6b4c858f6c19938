"""Regenerate answers with a tiny random model, in children that can be killed: see forks.py."""

import tempfile

import torch
from forks import serve_forks
from tiny_tokenizer import CHATML, assistant, tiny_tokenizer, user
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_chat_model(tokenizer, max_position_embeddings: int = 256) -> LlamaForCausalLM:
    """A random Llama over the tokenizer's vocabulary which ends about one answer in three early."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=list(range(10, 24)),
    )
    return LlamaForCausalLM(config).eval()


def records(number: int = 24) -> list[dict]:
    """One to three turns each, of different lengths, with answers that are to be replaced."""
    chats = []
    for n in range(number):
        messages = []
        for turn in range(1 + n % 3):
            messages += [user(f"what is {n} and {turn}? " * (1 + n * 7 % 5)), assistant("somebody else's answer")]
        chats.append({"messages": messages})
    return chats


def regenerate(output, temperature: float = 0.0, number: int = 24, **arguments):
    from hf_eagle.answers.regeneration import regenerate_answers

    tokenizer = tiny_tokenizer(CHATML)
    arguments = {"max_new_tokens": 12, "batch_size": 3, "progress": False, **arguments}
    model = tiny_chat_model(tokenizer)
    return regenerate_answers(model, tokenizer, records(number), output, temperature=temperature, **arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        regenerate(f"{folder}/first", number=1)  # whatever is loaded at first use, the children then have
    serve_forks(lambda output, temperature, number: regenerate(output, float(temperature), int(number)))
