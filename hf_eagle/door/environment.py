"""Known traps among the installed packages, found in their metadata without importing them, and what they end in."""

import logging
import traceback
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from .sentences import first_line


logger = logging.getLogger(__name__)

# which torch a torchcodec was built for, from its README; later versions are not checked
_TORCHCODEC = {
    **{"0.1": "2.5", "0.2": "2.6", "0.3": "2.7", "0.4": "2.7", "0.5": "2.7"},
    **{"0.6": "2.8", "0.7": "2.8", "0.8": "2.9", "0.9": "2.9", "0.10": "2.10"},
}
_CUDNN = ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13")


def tell_traps() -> None:
    """Warn of each known trap."""
    for trap in traps():
        logger.warning("%s", trap)


def traps() -> Iterator[str]:
    """A sentence for each known trap, with what to do about it."""
    torch = _version("torch")
    if torch is not None:
        yield from _slow_convolution(torch)
        yield from _other_torchvision(torch)
        yield from _other_torchcodec(torch)


def broken_torchvision(problem: BaseException) -> str | None:
    """What to do if an import failed because torchvision does not fit torch; `None` for any other error.

    transformers imports torchvision wherever it is installed, so text needs one that fits, too. Its error names
    neither: the cause is at the end of the chain.
    """
    chain = [problem]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if not isinstance(problem, ImportError) or not _passed_through("torchvision", chain[-1]):
        return None

    torch, vision = _version("torch"), _version("torchvision")
    return (
        f"torchvision {vision} cannot be imported next to torch {torch} ({first_line(chain[-1])}): "
        f"{how_to_install('torchvision', torch)}, or uninstall it, which leaves films alone unread."
    )


def how_to_install(package: str, torch: Version | None = None) -> str:
    """How to install the build of a package that belongs to an installed torch; its own by default."""
    torch = torch or _version("torch")
    build = torch and torch.local
    index = build if build and (build == "cpu" or build.startswith(("cu", "rocm", "xpu"))) else None
    if index is None:
        return f"install the {package} that belongs to your torch, from where torch came from"
    return (
        f"install the {package} that belongs to your torch, `pip install {package} --index-url "
        f"https://download.pytorch.org/whl/{index}`"
    )


def _passed_through(package: str, problem: BaseException) -> bool:
    """Whether an error was raised in a package's code, or while it was called."""
    files = [frame.filename for frame in traceback.extract_tb(problem.__traceback__)]
    return any(f"/{package}/" in file.replace("\\", "/") for file in files)


def _slow_convolution(torch: Version) -> Iterator[str]:
    """torch 2.9's slow Conv3d, which Qwen-VL's vision towers use (github.com/pytorch/pytorch/issues/166643)."""
    found = [(name, cudnn) for name in _CUDNN if (cudnn := _version(name)) is not None]
    if torch.release[:2] != (2, 9) or not found:
        return  # without its own cuDNN, torch is a CPU build, or uses the system's, whose version is unknown

    name, cudnn = found[0]
    if torch.release[:3] == (2, 9, 0):
        yield (
            f"torch {torch} runs Conv3d without cuDNN, which makes targets that look at pictures or films slow and "
            f"eats memory: install torch 2.10 or later, or torch 2.9.1 with {name} 9.15 or later."
        )
    elif cudnn < Version("9.15"):
        yield (
            f"torch {torch} runs Conv3d without cuDNN where that is older than 9.15 ({name} is {cudnn}), which makes "
            f"targets that look at pictures or films slow and eats memory: `pip install '{name}>=9.15'`, whatever pip "
            "says about torch's own pin, or install torch 2.10 or later."
        )


def _other_torchvision(torch: Version) -> Iterator[str]:
    """torchvision's metadata names the torch that it was built for."""
    try:
        needed = [Requirement(line) for line in requires("torchvision") or ()]
    except (PackageNotFoundError, InvalidRequirement):
        return

    pins = [pin.version for one in needed if one.name == "torch" for pin in one.specifier if pin.operator == "=="]
    vision = _version("torchvision")
    if pins and _generation(Version(pins[0].removesuffix(".*"))) != _generation(torch):
        yield _other("torchvision", pins[0], torch)
    elif torch.local == "cpu" and vision is not None and vision.local is None:  # PyPI has CUDA builds alone, on Linux
        yield (
            f"torchvision {vision} is PyPI's build, for torch with CUDA, and torch {torch} is installed: it may fail "
            f"to load, and every verb with it; {how_to_install('torchvision', torch)}."
        )


def _other_torchcodec(torch: Version) -> Iterator[str]:
    codec = _version("torchcodec")
    built_for = None if codec is None else _TORCHCODEC.get(_generation(codec))
    if built_for not in (None, _generation(torch)):
        yield _other("torchcodec", built_for, torch)


def _other(package: str, built_for: str, torch: Version) -> str:
    return (
        f"{package} {_version(package)} was built for torch {built_for}, and torch {torch} is installed: it may fail "
        f"to load, and pictures or films with it; {how_to_install(package, torch)}."
    )


def _generation(known: Version) -> str:
    return ".".join(map(str, known.release[:2]))


def _version(package: str) -> Version | None:
    """Version of an installed package; `None` if it is absent or its version cannot be read."""
    try:
        return Version(version(package))
    except (PackageNotFoundError, InvalidVersion, TypeError):
        return None
