"""How large files and functions are, and how much air is in them."""

import ast
import io
import statistics
import tokenize
from dataclasses import dataclass
from functools import cached_property

from house.tree import Module


@dataclass(frozen=True)
class Function:
    """A function's lines, by their numbers.

    Attributes:
        module: where it stands.
        node: its definition.
    """

    module: Module
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def length(self) -> int:
        return self.node.end_lineno - self.node.lineno + 1

    @cached_property
    def body(self) -> range:
        """The lines behind the docstring: blank lines inside it are no paragraphs of code."""
        first = self.node.body[0]
        start = first.end_lineno + 1 if _is_text(first) else first.lineno
        return range(start, self.node.end_lineno + 1)


def style_measures(modules: list[Module], readme_bytes: int) -> dict[str, str]:
    """The measures of style by their names in the table. Files that hold a docstring and nothing else are left out."""
    modules = [module for module in modules if not all(map(_is_text, module.tree.body))]
    functions = [Function(module, node) for module in modules for node in ast.walk(module.tree) if _defines(node)]
    comments = {module.path: _comment_lines(module) for module in modules}
    blank = {module.path: _blank_lines(module) for module in modules}

    inside = sum(len(f.body) for f in functions)
    air = sum(len(blank[f.module.path].intersection(f.body)) for f in functions)
    long = [f for f in functions if len(f.body) >= 20]
    dense = [f for f in long if not (blank[f.module.path] | comments[f.module.path]).intersection(f.body)]
    written = sum(len(m.text.splitlines()) - len(blank[m.path]) for m in modules)
    commented = sum(map(_number_of_comments, modules))

    return {
        "file lines, median / p90 / max": _spread([len(m.text.splitlines()) for m in modules]),
        "function lines, median / p90 / max": _spread([f.length for f in functions]),
        "blank lines per 100 inside functions": _share(air, inside, 1),
        "bodies >= 20 lines without blank line or comment, %": _share(len(dense), len(long), 0),
        "lines with a comment per 100 written ones": _share(commented, written, 1),
        "README, bytes": f"{readme_bytes:,}",
    }


def _defines(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def _is_text(node: ast.stmt) -> bool:
    """Return whether a statement is a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _comment_lines(module: Module) -> set[int]:
    """Lines that are a comment and nothing else."""
    return {number for number, line in enumerate(module.text.splitlines(), 1) if line.lstrip().startswith("#")}


def _number_of_comments(module: Module) -> int:
    """Those behind code among them."""
    tokens = tokenize.generate_tokens(io.StringIO(module.text).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def _blank_lines(module: Module) -> set[int]:
    return {number for number, line in enumerate(module.text.splitlines(), 1) if not line.strip()}


def _spread(lengths: list[int]) -> str:
    if not lengths:
        return "-"
    ordered = sorted(lengths)
    return f"{statistics.median(ordered):g} / {ordered[int(0.9 * len(ordered))]} / {ordered[-1]}"


def _share(part: int, whole: int, digits: int) -> str:
    return f"{100 * part / whole:.{digits}f}" if whole else "-"
