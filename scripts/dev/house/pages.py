"""What is written about the package: its pages, and what docstrings cite of them."""

import ast
import re
from pathlib import Path

from house.tree import Module


DOCS = "hf_eagle/docs"
_SECTION = re.compile(r"[Cc]ontract sections? (\d)(?:(?: to |, | and )(\d))?")
_ALONE = re.compile(r"(?<!docs/)\bcontract\b(?! sections? \d)", re.IGNORECASE)
_PAGE = re.compile(r"docs/(\w+\.md)")


def pages(root: Path) -> list[str]:
    """The pages, by their paths."""
    return sorted(path.relative_to(root).as_posix() for path in (root / DOCS).glob("*.md"))


def lost_citations(modules: list[Module], root: Path) -> list[str]:
    """Docstrings that cite a section of the contract, or a page, which is not there."""
    contract = root / DOCS / "contract.md"
    sections = re.findall(r"^## (\d)", contract.read_text(encoding="utf-8"), re.MULTILINE) if contract.is_file() else []
    lost = []
    for module in modules:
        for line, text in _docstrings(module):
            cited = {section for match in _SECTION.findall(text) for section in match if section}
            wrong = [f"section {section} of the contract" for section in sorted(cited - set(sections))]
            wrong += [page for page in _PAGE.findall(text) if not (root / DOCS / page).is_file()]
            wrong += ["the contract, and no section of it"] if _ALONE.search(text) else []
            lost += [f"{module.path}:{line}: {what}" for what in wrong]
    return lost


def _docstrings(module: Module) -> list[tuple[int, str]]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(module.tree) if isinstance(node, kinds)]
    return [(getattr(node, "lineno", 1), ast.get_docstring(node) or "") for node in found]
