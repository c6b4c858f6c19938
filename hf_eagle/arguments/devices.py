"""Try the devices and kernels that arguments name, so that a missing one is reported before anything is loaded."""

import re
from importlib.util import find_spec


# attention that needs a package -> the name of its module
_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_3", "flash_attention_4": "flash_attn"}


def device_of(name: str | None) -> str:
    """Return the device that an argument `device` names; if it is unset, CUDA's if there is one, else the CPU.

    Raises:
        ValueError: if this device cannot compute anything.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"

    if not re.fullmatch(r"[a-z]+(:\d{1,3})?", name):
        raise ValueError(f"`device` is {name!r}, which is not a device: give cpu, cuda or cuda:1, for instance.")

    try:
        torch.ones(1, device=name).sum().item()
    except Exception as problem:
        text = (str(problem).strip().splitlines() or [""])[0].rstrip(".")
        said = text if len(text) < 100 else f"{text[:100]}..."
        raise ValueError(f"`device` {name} cannot be used here ({said}): choose another, or leave it out.") from problem

    return name


def check_attention(argument: str, name: str | None) -> None:
    """Check that the attention implementation which an argument names can be loaded here.

    Args:
        argument: such as `attn_implementation`.
        name: as transformers takes it; `None` for the model's own.

    Raises:
        ValueError: for an unknown name, or a missing package.
    """
    if name is None or "/" in (name or ""):  # a kernel from the Hub
        if name is not None and find_spec("kernels") is None:
            raise ValueError(
                f"`{argument}` {name} is a kernel of the Hub, which needs the package `kernels`: install it."
            )
        return

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ["eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if not key.startswith("paged|"))]
    if name not in known:
        raise ValueError(f"`{argument}` must be one of {', '.join(known)}, or a kernel of the Hub, got {name!r}.")

    package = _PACKAGES.get(name)
    # without the package, transformers would take such a kernel from the Hub
    if package is not None and find_spec(package) is None and find_spec("kernels") is None:
        raise ValueError(
            f"`{argument}` is {name}, but neither the package `{package}` nor `kernels` is installed: install one, or "
            "set it to sdpa."
        )

    if package is not None:
        import torch

        if not torch.accelerator.is_available():
            raise ValueError(f"`{argument}` is {name}, which has no kernel for a CPU: set it to sdpa or eager.")
