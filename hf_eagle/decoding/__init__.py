"""Lossless speculative decoding with a draft: what vLLM and SGLang do, in plain PyTorch."""

from .chain import ChainOutput, chain_generate, greedy_generate


__all__ = ["ChainOutput", "chain_generate", "greedy_generate"]
