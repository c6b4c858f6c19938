"""The pages of this folder, which `hf-eagle docs [PAGE]` shows."""

import difflib
from pathlib import Path


# for users, in the order in which they are needed; then for people who change hf_eagle
PAGES = (
    "getting_started data data_forms answers training kinds targets served_targets pictures picture_positions "
    "measuring diagnose serving draft_folders publishing performance troubleshooting changelog contract rooms walk "
    "add_a_draft collectives chaos fuzzing"
).split()


def read_page(name: str) -> str:
    """A page as Markdown.

    Raises:
        ValueError: if there is no such page; with the nearest name.
    """
    known = name.removesuffix(".md").replace("-", "_")
    if known in PAGES:
        return Path(__file__).with_name(f"{known}.md").read_text(encoding="utf-8")

    near = difflib.get_close_matches(known, PAGES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"pages are {', '.join(PAGES)}."
    raise ValueError(f"`docs` has no page {name}: {hint}")


def contents() -> str:
    """The pages, each with its title."""
    titles = {name: read_page(name).partition("\n")[0].removeprefix("# ") for name in PAGES}
    width = max(map(len, PAGES))
    return "\n".join(["usage: hf-eagle docs PAGE", "", *(f"  {name:<{width}}  {titles[name]}" for name in PAGES)])
