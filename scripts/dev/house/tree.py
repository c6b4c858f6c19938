"""The package as it lies on disk: modules, the rooms they belong to, and what each imports."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


PACKAGE = "hf_eagle"
# `commands` is an empty package that the wheel puts scripts/ under: part of the hall, and no room
HALL_FOLDERS = ("commands",)
HALL = "the hall"


@dataclass(frozen=True)
class Module:
    """One Python file.

    Attributes:
        path: from the root of the repository, with `/`.
        text: what it holds.
    """

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def is_package(self) -> bool:
        return self.path.endswith("/__init__.py")

    @property
    def name(self) -> str:
        """Dotted, as it is imported: `hf_eagle.drafts.kinds`."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def room(self) -> str:
        """The folder below `hf_eagle/`, or the hall for a loose file."""
        parts = self.path.split("/")
        return parts[1] if len(parts) > 2 and parts[1] not in HALL_FOLDERS else HALL

    @property
    def loose(self) -> bool:
        return self.path.count("/") == 1 and self.path.startswith(f"{PACKAGE}/")


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        source: who imports.
        line: where.
        target: dotted name of a module of the package, or a foreign top-level name.
        at_start: whether it runs as soon as `source` is imported: outside functions and `TYPE_CHECKING`.
    """

    source: Module
    line: int
    target: str
    at_start: bool

    @property
    def place(self) -> str:
        return f"{self.source.path}:{self.line}"


def read_modules(root: Path, folder: str) -> list[Module]:
    """All Python files below a folder of the repository, in the order of their paths."""
    found = []
    for path in sorted((root / folder).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        found.append(Module(name, path.read_text(encoding="utf-8")))
    return found


class Package:
    """The modules of `hf_eagle` by their dotted names, and the imports between them."""

    def __init__(self, modules: list[Module]):
        self.modules = {module.name: module for module in modules}
        # folders among them, with or without an `__init__.py`
        self.names = {parent for name in self.modules for parent in _parents(name)}
        self.public = self._public_names()

    def _public_names(self) -> dict[str, str]:
        """Public name -> module: `from hf_eagle import load_draft` imports that module, though no statement says so."""
        hall = self.modules.get(PACKAGE)
        if hall is None:
            return {}

        for node in hall.tree.body:
            named = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_PUBLIC"
            if named and isinstance(node.value, ast.Dict):
                return {name: f"{PACKAGE}.{module}" for name, module in ast.literal_eval(node.value).items()}
        return {}

    @cached_property
    def imports(self) -> list[Import]:
        """Every import at any depth, those of type checkers included, in the order of files and lines."""
        return [found for module in self.modules.values() for found in self._imports_of(module)]

    def room_of(self, target: str) -> str:
        """Of a module, or of a folder of modules."""
        inner = target if target in self.modules else f"{target}."
        return next((module.room for name, module in self.modules.items() if name.startswith(inner)), HALL)

    def _imports_of(self, module: Module) -> Iterator[Import]:
        for node, at_start in _statements(module.tree, True):
            for target in self.targets(module, node):
                yield Import(module, node.lineno, target, at_start)

    def targets(self, module: Module, node: ast.AST) -> list[str]:
        """The modules that one import statement of a file names."""
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            return list(dict.fromkeys(self._one(base, alias.name) for alias in node.names))
        return [_imported_by_name(module, node)]

    def _one(self, base: str, name: str) -> str:
        """What `from base import name` imports: a module, or the module that holds the name."""
        inside = f"{base}.{name}"
        if inside in self.names:
            return inside
        return self.public.get(name, base) if base == PACKAGE else base


def _parents(name: str) -> list[str]:
    """A dotted name and what it lies in: `a.b.c`, `a.b`, `a`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _statements(node: ast.AST, at_start: bool) -> Iterator[tuple[ast.AST, bool]]:
    """The imports below a node, and whether each runs at the start."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)) or _imported_by_name(None, child):
            yield child, at_start

        late = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        late |= isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        yield from _statements(child, at_start and not late)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    """The dotted name behind `from`."""
    if not node.level:
        return node.module or ""

    package = module.name.split(".") if module.is_package else module.name.split(".")[:-1]
    parts = package[: len(package) - node.level + 1]
    return ".".join(parts + ([node.module] if node.module else []))


def _imported_by_name(module: Module | None, node: ast.AST) -> str:
    """The module of `import_module("hf_eagle.x")` and `import_module(".x", __name__)`; empty for anything else."""
    if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
        return ""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    name = node.args[0].value
    if called != "import_module" or not isinstance(name, str):
        return ""

    if not name.startswith(".") or module is None:
        return name
    inside = ast.ImportFrom(module=name.lstrip("."), names=[], level=len(name) - len(name.lstrip(".")))
    return _absolute(module, inside)
