"""Build the API reference from the docstrings.

    python scripts/dev/build_docs.py [FOLDER]         (or: make docs, which writes outputs/docs)

Whatever pdoc would warn of is an error. That every docstring is there is what `make lint` looks at.
"""

import builtins
import pkgutil
import sys
import typing
import warnings
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a clone works without installation

# command lines, which `--help` describes
LEFT_OUT = ("__main__", "commands")


def main(folder: Path) -> None:
    import pdoc

    import hf_eagle

    # public names are imported on first use, and pdoc looks at nothing but what is there
    vars(hf_eagle).update({name: getattr(hf_eagle, name) for name in hf_eagle.__all__})
    rooms = [module.name for module in pkgutil.iter_modules(hf_eagle.__path__) if module.name not in LEFT_OUT]
    hf_eagle.__all__ = [*hf_eagle.__all__, *rooms]
    # our configs inherit fields whose types are text, which names what transformers' modules import
    builtins.Literal = typing.Literal
    pdoc.render.configure(docformat="google", show_source=False)
    # what other packages warn of while they are imported is not ours
    warnings.filterwarnings("error", module=r"pdoc\.")
    pdoc.pdoc("hf_eagle", output_directory=folder)
    print(f"wrote {folder / 'index.html'}, with {len(list(folder.rglob('*.html')))} pages")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "outputs" / "docs"))
