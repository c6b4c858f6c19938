"""Lossless speculative decoding with a draft: what vLLM and SGLang do, in plain PyTorch."""

from .generate import SpeculativeOutput, speculative_generate, target_generate


__all__ = ["SpeculativeOutput", "speculative_generate", "target_generate"]
