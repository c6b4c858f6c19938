"""Features as they rest: plain, or eight bits with a scale."""

import pytest
import torch

from hf_eagle.store.dtypes import STORE_DTYPES, bytes_a_token, decode, encode


def features(tokens=50, taps=3, width=32):
    """Residual streams have a few channels that are hundreds of times larger, and taps of different size."""
    x = torch.randn(2, tokens, taps, width, generator=torch.Generator().manual_seed(0))
    x[..., 5] *= 300
    x *= torch.tensor([0.01, 1.0, 40.0])[:taps, None]
    return x.flatten(2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plain_dtypes_keep_what_they_can_hold(dtype):
    x = features().to(STORE_DTYPES[dtype])
    assert torch.equal(decode(encode(x, dtype, 32), x.dtype), x)


def test_eight_bits_are_close_for_every_token_and_tap():
    x = features()
    x[0, 3] = 0  # nothing to scale
    stored = encode(x, "float8", 32)
    assert stored["values"].dtype == torch.uint8 and stored["scales"].shape == (2, 50, 3)
    again = decode(stored, torch.float32)
    assert torch.equal(again[0, 3], x[0, 3])
    for tap in (slice(0, 32), slice(32, 64), slice(64, 96)):
        largest = x[..., tap].abs().amax(-1, keepdim=True)
        # three bits of mantissa; below the smallest normal number steps are even
        allowed = x[..., tap].abs() / 16 + largest / 448 * 2**-10
        assert bool(((again - x)[..., tap].abs() <= allowed * 1.001).all())
    # what was rounded once is not rounded again
    assert torch.equal(decode(encode(again, "float8", 32), torch.float32), again)


@pytest.mark.parametrize("dtype", list(STORE_DTYPES))
@pytest.mark.parametrize("taps", [1, 3])
def test_bytes_are_counted(dtype, taps):
    stored = encode(features(taps=taps), dtype, 32)
    assert sum(x.nbytes for x in stored.values()) == 100 * bytes_a_token(dtype, 32, taps)
