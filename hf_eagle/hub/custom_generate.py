"""Put the decoding code beside a draft, so that plain transformers can use it: a repository's `custom_generate/`.

The files are this package's own modules, flattened into one folder with their imports rewritten; there is no second
copy to keep up.
"""

import re
from pathlib import Path


PACKAGE = Path(__file__).resolve().parents[1]
ENTRY = "hub.generate_entry"
FOLDER = "custom_generate"
_RELATIVE_IMPORT = re.compile(r"^(\s*from )(\.+)([\w.]*)( import )", re.MULTILINE)
_HEADER = "# A module of hf_eagle, copied when this draft was published; the source is there.\n"


def write_custom_generate(folder: str | Path, repo_id: str | None = None) -> Path:
    """
    Write `custom_generate/` into a draft's folder.

    Args:
        folder (`str` or `Path`):
            The draft's folder.
        repo_id (`str`, *optional*):
            Where the draft is published, so that `generate` finds it by itself. Without one its `draft` must be passed.

    Returns:
        `Path`: the folder that was written; an earlier one is replaced.
    """
    written = Path(folder) / FOLDER
    written.mkdir(exist_ok=True)
    for old in written.glob("*.py"):
        old.unlink()
    for name, source in bundle(repo_id).items():
        (written / name).write_text(source)
    return written


def bundle(repo_id: str | None = None) -> dict[str, str]:
    """Sources by file name: `generate.py` and every module of this package that it needs."""
    files, waiting = {}, [ENTRY]
    while waiting:
        module = waiting.pop()
        if _file_name(module) in files:
            continue
        source, needed = _flattened(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text(), module)
        files[_file_name(module)] = _HEADER + source
        waiting += needed
    entry = files[_file_name(ENTRY)]
    files[_file_name(ENTRY)] = entry.replace("\nDRAFT = None\n", f"\nDRAFT = {repo_id!r}\n", 1)
    return dict(sorted(files.items()))


def _file_name(module: str) -> str:
    return "generate.py" if module == ENTRY else f"{module.replace('.', '_')}.py"


def _flattened(source: str, module: str) -> tuple[str, list[str]]:
    """A module whose relative imports all name files beside it, and the modules that these were."""
    needed = []

    def beside(match: re.Match) -> str:
        parts = module.split(".")[: -len(match[2])]
        needed.append(".".join([*parts, match[3]]))
        return f"{match[1]}.{_file_name(needed[-1]).removesuffix('.py')}{match[4]}"

    return _RELATIVE_IMPORT.sub(beside, source), needed
