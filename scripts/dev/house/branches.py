"""Branches on the kind of draft: code that asks which kind it has before it decides what to do.

Read from the syntax tree, so it sees spellings and not intentions; every finding is printed for a person to judge. Left
out are a kind's own folder `drafts/<kind>/`, the two tables, `drafts/kinds.py` and `serving/kinds`, and the list of
public names in `hf_eagle/__init__.py`. The rules:

a. `==`, `!=`, `in`, `not in`, `is` or `startswith`/`endswith` with the name of a kind, of its architecture or of its
   class: a string, several of them, or a constant that holds them. `method == "tree"` is one of decoding's methods, and
   no branch. A field whose name says the kind (`draft_method`), or `draft.method` and `folder.kind`, counts beside a
   value that the file does not show.
b. Each `case` of a `match` with such a name or such a class.
c. `isinstance` and `issubclass` with a class that is defined in a kind's own folder; shared base classes lie outside.
d. `hasattr`, and `getattr` with a default, which ask a draft or its config for a field that other kinds lack. A draft
   is what is called so, annotated so, or made from one in the same file.
e. Dicts written with kinds' names as keys: tables beside the two tables.
f. Flags that say the kind (`form.eagle1`, `of_features`, `is_mla`) where a condition asks them; not of a target.

Apart from these, and not limited: tests of a capability (`mrope_section is None`, `d2t is None`, `image_embeddings`),
which every kind answers.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from house.tree import Module, Package


# as arguments, folders and servers spell them; the kinds' folders and the rows of kinds.py are added
KINDS = {"eagle", "eagle1", "eagle2", "eagle3", "mla", "dflash"}
ARCHITECTURE = re.compile(r"(?=.*(Eagle|DFlash))\w*(ForCausalLM|DraftModel)\w*")
# of a row of kinds.py, those that hold names of the kind
ROW_NAMES = {"name", "methods", "architectures"}
# fields that hold a kind wherever they are, and fields that may hold something else
KIND_FIELDS = {"draft_method", "draft_kind", "draft_attention"}
MAYBE_KIND_FIELDS = {"kind", "method"}
# what `.kind` or `.method` belongs to when it is a draft's
OWNERS = {"draft", "folder", "checkpoint"}
FLAGS = {"of_features", "latent", "has_latent_attention"}
CAPABILITIES = {"mrope_section", "d2t", "draft_ids", "tap_ids", "image_embeddings"}
# asked of configs of targets and drafts alike, by what the servers read rather than by the kind
NO_CAPABILITY = {"_name_or_path", "name_or_path", "dtype", "quantization_config", "generation_config"}
OF_A_DRAFT = re.compile(r"Draft|Eagle\w*(Config|Model)")
# a kind's own files; the second form is that of before there were folders, for comparison
OWN = re.compile(r"hf_eagle/drafts/(\w+/|(modeling|configuration)_eagle)")
TABLES = re.compile(r"hf_eagle/(drafts/kinds\.py|serving/kinds(/|\w*\.py))")
PUBLIC = "hf_eagle/__init__.py"
# knows of no draft; what is asked there is asked of a target
OF_TARGETS = "hf_eagle/targets/"


@dataclass(frozen=True, order=True)
class Branch:
    """One place that asks for the kind, by the letter of its rule; `-` for a test of a capability."""

    path: str
    line: int
    rule: str
    code: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: ({self.rule}) {self.code}"


def find_branches(package: Package, scripts: list[Module]) -> tuple[list[Branch], list[Branch]]:
    """Branches on the kind, and tests of a capability, outside the kinds' own folders and tables."""
    modules = [*package.modules.values(), *scripts]
    names = _Names.of(package)

    found = []
    for module in modules:
        if not OWN.match(module.path) and not TABLES.match(module.path) and module.path != PUBLIC:
            found += _Finder(module, package, names).branches()

    found.sort()
    return [one for one in found if one.rule != "-"], [one for one in found if one.rule == "-"]


@dataclass(frozen=True)
class _Names:
    """Names of kinds, and of the classes that only one of them has."""

    kinds: frozenset[str]
    classes: frozenset[str]

    @classmethod
    def of(cls, package: Package) -> "_Names":
        kinds, classes = set(KINDS), set()
        for module in package.modules.values():
            if OWN.match(module.path):
                classes |= {node.name for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)}
                if module.is_package:
                    kinds.add(module.path.split("/")[2])
            elif TABLES.match(module.path):
                kinds |= _rows(module.tree)
        return cls(frozenset(kinds), frozenset(classes))

    def name_a_kind(self, words: set[str]) -> bool:
        return any(word in self.kinds or word in self.classes or ARCHITECTURE.fullmatch(word) for word in words)


def _rows(tree: ast.AST) -> set[str]:
    """Names in a table of kinds: keys of its outermost dicts, and what a row says of its own names."""
    values = [node.value for node in ast.iter_child_nodes(tree) if isinstance(node, (ast.Assign, ast.AnnAssign))]
    values = [value for value in values if isinstance(value, ast.Dict)]
    values += [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in ROW_NAMES]
    return set().union(*map(_plain_strings, values))


class _Finder:
    """Looks for the branches of one file."""

    def __init__(self, module: Module, package: Package, names: _Names):
        self.module, self.names = module, names
        self.constants = _constants(module, package)
        self.flags = FLAGS | names.kinds | {f"is_{kind}" for kind in names.kinds}
        self.drafts = _names_of_drafts(module.tree)

    def branches(self) -> Iterator[Branch]:
        lines = self.module.text.splitlines()
        for rule, node in self._found():
            yield Branch(self.module.path, node.lineno, rule, lines[node.lineno - 1].strip())

    def _found(self) -> Iterator[tuple[str, ast.AST]]:
        rules: tuple[tuple[str, Callable[[ast.AST], bool]], ...] = (
            ("a", self._compares),
            ("b", self._matches),
            ("c", self._asks_class),
            ("d", self._asks_field),
            ("e", self._is_table),
            ("-", self._asks_capability),
        )
        for node in ast.walk(self.module.tree):
            rule = next((letter for letter, holds in rules if holds(node)), None)
            if rule is not None:
                yield rule, node
            yield from (("f", condition) for condition in _conditions(node) if self._is_flag(condition))

    # ---- rules ----

    def _compares(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            asks = node.func.attr in ("startswith", "endswith")
            return asks and any(self.names.name_a_kind(self._strings(word)) for word in node.args)
        if not isinstance(node, ast.Compare):
            return False

        sides = [node.left, *node.comparators]
        if any(isinstance(side, ast.Constant) and side.value is None for side in sides):
            return False
        if any(self.names.name_a_kind(self._strings(side) | self._classes(side)) for side in sides):
            return True

        # beside a value that is not known here, the field itself must say that it is a draft's
        unknown = any(not self._strings(side) for side in sides if not self._holds_kind(side))
        both = all(self._holds_kind(side) for side in sides)
        return any(self._holds_kind(side) for side in sides) and (unknown or both)

    def _matches(self, node: ast.AST) -> bool:
        if not isinstance(node, ast.match_case):
            return False
        words = {word for part in ast.walk(node.pattern) for word in self._strings(part) | self._classes(part)}
        # a `case` has no line of its own
        node.lineno = node.pattern.lineno
        return self.names.name_a_kind(words)

    def _asks_class(self, node: ast.AST) -> bool:
        called = isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("isinstance", "issubclass")
        return called and len(node.args) == 2 and bool(self._classes(node.args[1]))

    def _asks_field(self, node: ast.AST) -> bool:
        if not isinstance(node, ast.Call) or len(node.args) < 2 or not self._is_draft(node.args[0]):
            return False
        called = (getattr(node.func, "id", None), len(node.args))
        name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
        return called in (("hasattr", 2), ("getattr", 3)) and name is not None and name not in NO_CAPABILITY

    def _is_table(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "dict":
            return self.names.name_a_kind({word.arg for word in node.keywords if word.arg})
        return isinstance(node, ast.Dict) and any(
            key and self.names.name_a_kind(self._strings(key)) for key in node.keys
        )

    def _asks_capability(self, node: ast.AST) -> bool:
        if not isinstance(node, ast.Compare) or not isinstance(node.ops[0], (ast.Is, ast.IsNot, ast.Eq, ast.NotEq)):
            return False
        asked, value = _last_name(node.left), node.comparators[0]
        return asked in CAPABILITIES and isinstance(value, ast.Constant) and not self._is_target(node.left)

    def _is_flag(self, node: ast.AST) -> bool:
        asked = [node.func, *node.args] if isinstance(node, ast.Call) else [node]
        return _last_name(asked[0]) in self.flags and not any(map(self._is_target, asked))

    # ---- what an expression is ----

    def _strings(self, node: ast.AST) -> set[str]:
        """The strings that an expression holds, as far as the file shows."""
        if isinstance(node, ast.Name):
            return self.constants.get(node.id, set())
        return _plain_strings(node)

    def _classes(self, node: ast.AST) -> set[str]:
        """The classes of one kind that an expression names."""
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return set().union(*map(self._classes, node.elts))
        if isinstance(node, ast.BinOp):
            return self._classes(node.left) | self._classes(node.right)
        if isinstance(node, ast.MatchClass):
            return self._classes(node.cls)
        return {_last_name(node)} & self.names.classes

    def _holds_kind(self, node: ast.AST) -> bool:
        name = _last_name(node)
        owner = _last_name(node.value) if isinstance(node, (ast.Attribute, ast.Subscript)) else None
        return name in KIND_FIELDS or (name in MAYBE_KIND_FIELDS and owner in OWNERS)

    def _is_draft(self, node: ast.AST) -> bool:
        """A draft or its config: by its name, its annotation, or what it was made from."""
        return any(name in self.drafts or "draft" in name for name in _chain(node))

    def _is_target(self, node: ast.AST) -> bool:
        """What is asked of a target is no question for the kind of draft."""
        return self.module.path.startswith(OF_TARGETS) or any("target" in name for name in _chain(node))


# ---- syntax ----


def _chain(node: ast.AST) -> list[str]:
    """`self.draft.config` -> `["self", "draft", "config"]`, calls left out; empty for other expressions."""
    if isinstance(node, ast.Call):
        return _chain(node.func)
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [*_chain(node.value), node.attr]
    return []


def _last_name(node: ast.AST) -> str:
    """Of `a.b.name`, `a["name"]` and `a.get("name")` the name; empty for other expressions."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
        return _last_name(ast.Subscript(node.func.value, node.args[0]))
    if isinstance(node, ast.Subscript):
        return str(node.slice.value) if isinstance(node.slice, ast.Constant) else ""
    return (_chain(node) or [getattr(node, "attr", "")])[-1]


def _plain_strings(node: ast.AST) -> set[str]:
    """Of a string, or a tuple, list, set or dict of them."""
    if isinstance(node, (ast.Constant, ast.MatchValue)):
        return {node.value} if isinstance(node.value, str) else set() if node.value is None else _plain_of(node.value)
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return set().union(*map(_plain_strings, node.elts))
    if isinstance(node, ast.Dict):
        return set().union(*(_plain_strings(key) for key in node.keys if key is not None))
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("set", "frozenset", "tuple", "list"):
        return set().union(*map(_plain_strings, node.args))
    return set()


def _plain_of(value: object) -> set[str]:
    return _plain_strings(value) if isinstance(value, ast.AST) else set()


def _conditions(node: ast.AST) -> list[ast.AST]:
    """The expressions that a node takes as true or false."""
    if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
        return [node.test]
    if isinstance(node, ast.BoolOp):
        return node.values
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return [node.operand]
    return node.ifs if isinstance(node, ast.comprehension) else []


def _constants(module: Module, package: Package) -> dict[str, set[str]]:
    """Strings behind the names that a file sets, or imports from a module of the package, at its top level."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                source = next(iter(package.targets(module, ast.ImportFrom(node.module, [alias], node.level))), "")
                if source in package.modules and source != module.name:
                    found[alias.asname or alias.name] = _assigned(package.modules[source]).get(alias.name, set())
    return found | _assigned(module)


@cache
def _assigned(module: Module) -> dict[str, set[str]]:
    """Strings behind the names that a file sets at its top level."""
    found = {}
    for node in module.tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                found[target.id] = _plain_strings(node.value)
    return found


def _names_of_drafts(tree: ast.AST) -> set[str]:
    """Names that stand for a draft or its config in a file: annotated so, or made from one."""
    found = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.arg)
            and node.annotation is not None
            and OF_A_DRAFT.search(ast.unparse(node.annotation))
        ):
            found.add(node.arg)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if any("draft" in name for name in _chain(node.value)):
                found.add(node.targets[0].id)
    return found
