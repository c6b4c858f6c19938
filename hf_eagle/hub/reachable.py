"""Find the part of this package's source that a function needs: definitions and methods reached from it by name.

The rule keeps too much rather than too little:

* A definition at the top of a module is kept when kept code names it.
* A method of a kept class is kept when its name is special (`__len__`), when kept code mentions it as an attribute of
  any object or as a string, or when it is among the names that libraries call.

Relative imports at the top of a module are followed, by the names that they import.
"""

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path


class Module:
    """A module's source: its top-level definitions and imports, by name.

    Attributes:
        definitions: from a name to the statement that defines it.
        relative: from an imported name to the module of this package, and the original name there.
        absolute: from a name to the import of a library that binds it.
    """

    def __init__(self, name: str, source: str):
        self.name, self.lines, self.body = name, source.splitlines(), ast.parse(source).body
        self.definitions: dict[str, ast.stmt] = {}
        self.relative: dict[str, tuple[str, str]] = {}
        self.absolute: dict[str, str] = {}
        for statement in self.body:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                self.definitions[statement.name] = statement
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                names = (x for target in targets for x in ast.walk(target) if isinstance(x, ast.Name))
                self.definitions |= {x.id: statement for x in names if isinstance(x.ctx, ast.Store)}
            elif isinstance(statement, ast.Import | ast.ImportFrom):
                self._import(statement)
            elif not ast.unparse(statement).startswith(("if TYPE_CHECKING:", "'", '"')):
                raise ValueError(
                    f"{name}, line {statement.lineno}, is neither a definition nor an import: put it into one."
                )

    def _import(self, statement: ast.Import | ast.ImportFrom) -> None:
        of_package = isinstance(statement, ast.ImportFrom) and statement.level
        origin = f"from {statement.module} " if isinstance(statement, ast.ImportFrom) else ""
        for alias in statement.names:
            name = (alias.asname or alias.name).partition(".")[0]
            if of_package:
                parts = self.name.split(".")[: -statement.level]
                self.relative[name] = (".".join([*parts, statement.module]), alias.name)
            else:
                self.absolute[name] = f"{origin}import {ast.unparse(alias)}"

    def text(self, kept: Mapping[str, set[str]], brief: bool = False) -> str:
        """Return the source with these definitions alone, and in each class these methods alone.

        Args:
            kept: from the name of a definition to the names of methods that stay in it.
            brief: of each docstring only the first paragraph.
        """
        names = {id(statement): name for name, statement in self.definitions.items() if name in kept}
        dropped = set()
        for statement in self.body:
            if id(statement) not in names:
                dropped |= self._lines_of(statement)
                continue
            for method in methods_of(statement):
                if method.name not in kept[names[id(statement)]]:
                    dropped |= self._lines_of(method)
            for documented in (statement, *methods_of(statement)) if brief else ():
                dropped |= self._details_of(documented)

        lines = [line for number, line in enumerate(self.lines, 1) if number not in dropped]
        left = "\n".join(line for line in lines if not line.startswith("# ----")).strip("\n")
        return re.sub(r"\n{3,}(?=[^\n ])", "\n\n\n", left)

    def _details_of(self, statement: ast.stmt) -> set[int]:
        """Return the lines of a definition's docstring behind its first paragraph."""
        first = next(iter(getattr(statement, "body", ())), None)
        is_docstring = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
        if not is_docstring or self.lines[first.end_lineno - 1].strip() != '"""':
            return set()
        inside = range(first.lineno, first.end_lineno)
        blank = next((number for number in inside if not self.lines[number - 1].strip()), first.end_lineno)
        return set(range(blank, first.end_lineno))

    def _lines_of(self, statement: ast.stmt) -> set[int]:
        """Return a statement's lines, with decorators and comments above it, and the blank lines above those."""
        first = min([statement.lineno, *(x.lineno for x in getattr(statement, "decorator_list", ()))])
        while first > 1 and self.lines[first - 2].lstrip().startswith("#"):
            first -= 1
        while first > 1 and not self.lines[first - 2].strip():
            first -= 1
        return set(range(first, statement.end_lineno + 1))


class Reachable:
    """The definitions reached so far, by the rule at the head of this file.

    Args:
        package: the package's folder.
        called: names of methods that libraries call.
        left_out: methods, as `Class.method`, that are never kept.
        replaced: sources to use in place of modules, by module name.

    Attributes:
        modules: the modules that were parsed.
        imported: from each module to the imported names that kept code uses.
    """

    def __init__(
        self,
        package: Path,
        called: Iterable[str] = (),
        left_out: Iterable[str] = (),
        replaced: Mapping[str, str] | None = None,
    ):
        self.package, self.left_out, self.replaced = package, frozenset(left_out), replaced or {}
        self.modules: dict[str, Module] = {}
        self.imported: dict[str, set[str]] = {}
        self._kept: dict[str, dict[str, set[str]]] = {}
        self._needs: dict[str, list[str]] = {}  # from each module to others, in the order of their use
        self._mentioned = set(called)
        self._waiting: list[tuple[str, str, ast.FunctionDef]] = []  # methods that nobody has mentioned yet

    def add(self, module: str, name: str) -> None:
        """Reach a definition, and from there all that it needs.

        Raises:
            ValueError: if source cannot be followed, in one sentence.
        """
        self._add(module, name)
        while ready := [x for x in self._waiting if x[2].name in self._mentioned]:
            self._waiting = [x for x in self._waiting if x not in ready]
            for where, owner, method in ready:
                self._kept[where][owner].add(method.name)
                self._follow(where, [method])

    def kept(self) -> dict[str, dict[str, set[str]]]:
        """Return the kept definitions of each module, as for [`Module.text`]; a module comes after those it needs."""
        seen, ordered = set(), {}

        def visit(module: str) -> None:
            if module not in seen:
                seen.add(module)
                for other in self._needs.get(module, ()):
                    visit(other)
                ordered[module] = self._kept[module]

        for module in self._kept:
            visit(module)
        return ordered

    def module(self, name: str) -> Module:
        """Return a module, parsed only once."""
        if name not in self.modules:
            file = self.package.joinpath(*name.split(".")).with_suffix(".py")
            self.modules[name] = Module(name, self.replaced.get(name) or file.read_text())
        return self.modules[name]

    def _add(self, module: str, name: str) -> None:
        kept = self._kept.setdefault(module, {})
        if name in kept:
            return
        statement = self.module(module).definitions.get(name)
        if statement is None:
            raise ValueError(
                f"{module} does not define `{name}`, which is imported from it: import it from where it is."
            )

        kept[name], methods = set(), methods_of(statement)
        for method in methods:
            if f"{name}.{method.name}" not in self.left_out:
                self._waiting.append((module, name, method))
                if method.name.startswith("__"):
                    self._mentioned.add(method.name)
        rest = [statement]
        if isinstance(statement, ast.ClassDef):
            rest = [x for x in statement.body if x not in methods]
            # an attribute may be an alias of a method
            self._mentioned |= {x.id for part in rest for x in ast.walk(part) if isinstance(x, ast.Name)}
            rest += [*statement.bases, *statement.keywords, *statement.decorator_list]
        self._follow(module, rest)

    def _follow(self, module: str, nodes: Iterable[ast.AST]) -> None:
        for node in (part for whole in nodes for part in ast.walk(whole)):
            if isinstance(node, ast.Attribute):
                self._mentioned.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self._mentioned.add(node.value)
            elif isinstance(node, ast.ImportFrom) and node.level:
                raise ValueError(
                    f"{module}, line {node.lineno}, imports inside a function: move that to the module's top."
                )
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                self._need(module, node.id)

    def _need(self, module: str, name: str) -> None:
        found = self.module(module)
        if name in found.definitions:
            self._add(module, name)
        elif name in found.relative or name in found.absolute:
            self.imported.setdefault(module, set()).add(name)
            if name in found.relative:
                other, original = found.relative[name]
                if original != name:
                    raise ValueError(f"{module} imports `{original}` as `{name}`: import it by its own name.")
                self._needs.setdefault(module, []).append(other)
                self._add(other, name)


def methods_of(statement: ast.stmt) -> list[ast.FunctionDef]:
    """Return the methods of a class; none for any other statement."""
    body = statement.body if isinstance(statement, ast.ClassDef) else ()
    return [method for method in body if isinstance(method, ast.FunctionDef)]
