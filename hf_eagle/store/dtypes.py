"""Number formats of stored features: plain, or eight bits with a scale for each token and tap."""

import torch


STORE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float8": torch.float8_e4m3fn}


def encode(x: torch.Tensor, dtype: str, width: int) -> dict[str, torch.Tensor]:
    """Encode features for the store; `decode` is the inverse.

    Args:
        x: `(..., taps * width)`.
        dtype: a key of `STORE_DTYPES`. `"float8"` is e4m3 with one float32 scale per token and tap, which maps the
            largest value to the format's largest.
        width: numbers in one tap, which share a scale.

    Returns:
        `{"values": (..., taps * width)}`, and `"scales"` `(..., taps)` for `"float8"`, whose values are bytes.
    """
    if dtype != "float8":
        return {"values": x.to(STORE_DTYPES[dtype])}

    parts = x.float().unflatten(-1, (-1, width))
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = parts.abs().amax(-1) / largest
    scales = scales.masked_fill(scales == 0, 1)
    # rounding may put the largest value just above the format's range, where e4m3 has only NaN
    values = (parts / scales[..., None]).clamp(-largest, largest).to(torch.float8_e4m3fn)
    return {"values": values.view(torch.uint8).flatten(-2), "scales": scales}  # few operations take eight-bit floats


def decode(stored: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the result of `encode` as features `(..., taps * width)` in `dtype`."""
    values, scales = stored["values"], stored.get("scales")
    if scales is None:
        return values.to(dtype)

    parts = values.view(torch.float8_e4m3fn).float().unflatten(-1, (scales.shape[-1], -1))
    return (parts * scales[..., None]).to(dtype).flatten(-2)


def bytes_a_token(dtype: str, width: int, taps: int) -> int:
    """Return the number of bytes that `encode` needs for one token's `taps * width` numbers."""
    return taps * (width * STORE_DTYPES[dtype].itemsize + (4 if dtype == "float8" else 0))
