"""Chat templates of published models (tests/templates/) on the small tokenizer, with each family's special tokens."""

from pathlib import Path

from tiny_tokenizer import tiny_tokenizer


TEMPLATES = Path(__file__).parent / "templates"
_LLAMA = ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"], [])
_QWEN = (None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"], ["<tool_call>", "</tool_call>", "<think>", "</think>"])
_MISTRAL = "[INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]".split()
_HARMONY = "<|start|> <|end|> <|message|> <|channel|> <|call|> <|constrain|>".split()
_DEEPSEEK = (
    "<｜User｜> <｜Assistant｜> <｜tool▁calls▁begin｜> <｜tool▁call▁begin｜> <｜tool▁sep｜> <｜tool▁call▁end｜> "
    "<｜tool▁calls▁end｜> <｜tool▁outputs▁begin｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜> "
    "<｜tool▁outputs▁end｜> <think> </think>"
).split()
_KIMI = (
    "[BOS]",
    "<|im_end|>",
    "[EOS] <|im_system|> <|im_user|> <|im_assistant|> <|im_middle|>".split(),
    "<|tool_calls_section_begin|> <|tool_calls_section_end|> <|tool_call_begin|> <|tool_call_argument_begin|> "
    "<|tool_call_end|> <think> </think>".split(),
)
# family -> template, beginning and end of text, other special tokens, added tokens that are not special
FAMILIES = {
    "smollm2": ("smollm2", None, "<|im_end|>", ["<|im_start|>"], []),
    "llama3": ("llama3", *_LLAMA),
    "llama3_1": ("llama3_1", *_LLAMA),
    "llama3_marked": ("llama3_training", *_LLAMA),
    "qwen2_5": ("qwen2_5", *_QWEN),
    "qwen3": ("qwen3", *_QWEN),
    "qwen3_marked": ("qwen3_training", *_QWEN),
    "phi3": ("phi3", "<s>", "<|endoftext|>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], []),
    "mistral": ("mistral_v3_tekken", "<s>", "</s>", _MISTRAL, []),
    "gemma3": ("gemma3", "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], []),
    "gptoss": ("gptoss", "<|startoftext|>", "<|return|>", _HARMONY, []),
    "deepseek_v3": ("deepseekv3", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", [], _DEEPSEEK),
    "kimi_k2": ("kimi_k2", *_KIMI),
    "kimi_k2_thinking": ("kimi_k2_thinking", *_KIMI),
}


def switched_template(families: list[str]) -> str:
    """One template of several families, of which the option `family` takes one: a server has one template."""
    branches = [
        f"{{%- {'elif' if n else 'if'} family | default('{families[0]}') == '{family}' %}}" + _text(FAMILIES[family][0])
        for n, family in enumerate(families)
    ]
    return "".join([*branches, "{%- endif %}"])


def _text(template: str) -> str:
    return (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")


def family_tokenizer(family: str, **kwargs):
    """The small tokenizer with a family's template and tokens."""
    template, bos, eos, special, added = FAMILIES[family]
    tokenizer = tiny_tokenizer(_text(template), **kwargs)
    ends = {"eos_token": eos, "pad_token": eos} | ({"bos_token": bos} if bos else {})
    tokenizer.add_special_tokens({**ends, "additional_special_tokens": special})
    tokenizer.add_tokens(added)
    return tokenizer
