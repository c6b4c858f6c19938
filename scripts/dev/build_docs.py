"""Build the docs: the pages of `hf_eagle/docs`, and the API reference from the docstrings.

    python scripts/dev/build_docs.py [FOLDER]         (or: make docs, which writes outputs/docs)

Warnings of pdoc are errors. Missing docstrings are found by `make lint` instead.
"""

import argparse
import builtins
import pkgutil
import re
import shutil
import sys
import typing
import warnings
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a clone works without installation

# command lines, which `--help` describes
LEFT_OUT = ("__main__", "commands")
IN_SERVERS = "hf_eagle.serving.connector.feature_connector"  # cannot be imported here


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ max-width: 50rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif }}
pre, code {{ background: #f5f5f5 }} pre {{ padding: .6rem; overflow-x: auto }} img {{ max-width: 100% }}
table {{ border-collapse: collapse }} td, th {{ border: 1px solid #ddd; padding: .2rem .5rem }}</style>
<p><a href="README.html">hf_eagle</a> &middot; <a href="hf_eagle.html">API reference</a></p>
{body}</html>
"""


def write_pages(folder: Path) -> None:
    """README and the pages, one file each, whose links lead to each other."""
    from pdoc.render_helpers import to_html

    from hf_eagle.docs import PAGES, read_page

    texts = {name: read_page(name) for name in PAGES}
    texts |= {name: (ROOT / f"{name}.md").read_text(encoding="utf-8") for name in ("README", "CONTRIBUTING")}
    for name, text in texts.items():
        linked = re.sub(r"\]\((?:hf_eagle/docs/)?(\w+)\.md\)", r"](\1.html)", text)
        page = PAGE.format(title=text.partition("\n")[0].removeprefix("# "), body=to_html(linked))
        (folder / f"{name}.html").write_text(page, encoding="utf-8")

    shutil.copytree(
        ROOT / "model_cards", folder / "model_cards", ignore=shutil.ignore_patterns("*.py"), dirs_exist_ok=True
    )


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
    pdoc.pdoc("hf_eagle", f"!{IN_SERVERS}", output_directory=folder)
    write_pages(folder)
    print(
        f"wrote {folder / 'README.html'} and {folder / 'hf_eagle.html'}, with {len(list(folder.rglob('*.html')))} pages"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=ROOT / "outputs" / "docs", help="where they are written"
    )
    main(parser.parse_args().folder)
