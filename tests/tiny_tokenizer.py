"""A small byte-level tokenizer built in code, chat templates of well-known families, and the fetched assets."""

import os
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_eagle.data.loss_mask import ConversationEncoder


SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|bos|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# as Qwen3's: thoughts of earlier answers are left out, the last answer always has some
THINKING = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set said = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- if '</think>' not in message.content %}{% set thought = '' %}{% endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
        {{- said + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
# the usual marks: exact, and with the header's newline and the one after the turn inside
MARKED = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
MARKED_WIDELY = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- '\\n' + message.content + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- else %}
        {{- '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
CORPUS = [
    "hello there, how are you today?\n\nthe answer is four.",
    "the cat and the other cat think; what is two and two?",
]


@lru_cache
def _trained(trim_offsets: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(template: str | None = CHATML, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 320 tokens; "\\n\\n" is one of them, so that newlines can melt across borders."""
    eos = "<|eot_id|>" if template == LLAMA3 else "<|im_end|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(trim_offsets)),
        bos_token="<|bos|>",
        eos_token=eos,
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
    )
    tokenizer.chat_template = template
    return tokenizer


def smollm2_folder() -> Path:
    """The fetched SmolLM2-135M-Instruct; `make assets` puts it there."""
    root = Path(os.environ.get("HF_EAGLE_ASSETS", Path(__file__).parents[1] / "assets"))
    folder = root / "smollm2-135m-instruct"
    assert folder.exists(), f"{folder} is missing: run `make assets`"
    return folder


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def supervised_texts(tokenizer, ids: list[int], mask: list[int]) -> list[str]:
    """The text of each run of supervised tokens."""
    runs, run = [], []
    for token, supervised in zip([*ids, 0], [*mask, 0], strict=True):
        if supervised:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def encode_conversation(messages: list[dict], tokenizer, finish_reason=None) -> dict[str, list[int]]:
    """One conversation as a row, by the encoder alone."""
    ids, mask = ConversationEncoder(tokenizer).encode([messages], [finish_reason])[0]
    return {"input_ids": ids, "loss_mask": mask}


def word_tokenizer(vocab_size: int, eos: int) -> PreTrainedTokenizerFast:
    """One token a word, `w7` being token 7, so that every token of a tiny model has a text; with a chat template."""
    words = {f"w{i}": i for i in range(vocab_size)}
    words["</s>"] = words.pop(f"w{eos}")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m.content }} w1 {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", eos_token="</s>", pad_token="w0", chat_template=template
    )
