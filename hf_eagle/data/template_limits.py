"""Limit the time and the output size of chat templates, which are programs from unknown authors.

transformers compiles a template in a sandbox that limits a single `range`, but neither nested loops nor texts. Here the
same sandbox gets a check of the clock in each round of a loop and in each macro, and a check of the size of each text
that is written, stored or passed on. The result of a filter, method or operator is sized before it is computed. This
needs no signal and no thread, so it also works in threads and in the workers of `datasets`.
"""

import threading
import time
from functools import cache, lru_cache, wraps

from .template_sizes import FILTERS, checked_filter, checked_gathering, extent, formatted, made_by_call


SECONDS = 10.0  # limit per rendering; normal renderings take milliseconds
CHARACTERS = 2**26  # limit of a rendering, and of any intermediate text or list
ALTOGETHER = 16 * CHARACTERS  # limit of all intermediate texts of one rendering together
_SMALL = 4096  # texts of fewer characters are not counted
_POWER = 1000  # limit of the result of a power, in bits
# filters with names that no template can write
_SIZED, _CONCAT, _GATHERED = "within the limit of size", "joined within the limit of size", "made by the template"


class TemplateRefusal(ValueError):
    """A chat template refuses this conversation; the text is the template's."""


class TemplateLimit(ValueError):
    """A chat template takes too long or makes too much text, so other conversations are not tried."""


class _Clock(threading.local):
    deadline = float("inf")
    made = 0  # characters since the clock was started
    gathered = False  # whether the template has made a list, which may hold one text many times


_clock = _Clock()


def start_clock() -> None:
    """Limit the time of a rendering in this thread until `stop_clock`; `TemplateLimit` ends it."""
    _take_over()
    _clock.deadline, _clock.made, _clock.gathered = time.monotonic() + SECONDS, 0, False


def stop_clock() -> None:
    """Let renderings in this thread take any time again."""
    _clock.deadline = float("inf")


@cache
def _take_over() -> None:
    """Replace the function by which transformers compiles every template."""
    from transformers.utils import chat_template_utils  # imported late: code that only asks a server does not need it

    make = chat_template_utils._cached_compile_jinja_template
    chat_template_utils._compile_jinja_template = lru_cache(lambda template: _compiled(make("").environment, template))


def _compiled(environment, template: str):
    """Compile a template with limits, in the sandbox that transformers makes for it."""
    from jinja2 import Template
    from jinja2.runtime import Macro

    environment.tick, environment.concat, environment.finalize = _tick, _joined, _told
    filters, call, call_filter = environment.filters, environment.call, environment.call_filter
    to_json = filters["tojson"]

    filters |= {name: checked_filter(name, filters[name], _check) for name in FILTERS if name in filters}
    filters |= {name: checked_gathering(filters[name], _check) for name in ("join", "sum")}
    filters |= {name: _gathering(filters[name]) for name in ("list", "batch", "slice", "sum")}
    filters |= {_SIZED: _sized, _CONCAT: _concatenated, _GATHERED: _gathered}
    filters["tojson"] = _only_if_gathered(to_json, filters["tojson"])

    def checked_call(context, called, *given, **named):
        if not isinstance(called, Macro):
            _check(made_by_call(called, given, named))
        made = call(context, called, *given, **named)
        return _gathered(made) if isinstance(made, dict) else made

    def checked_round(*given, **named):
        """Check the clock for filters such as `map`, which are loops."""
        _tick()
        return _sized(call_filter(*given, **named))

    environment.call, environment.call_filter = checked_call, checked_round
    # nor are these operators computed at compile time: that alone could take all memory
    environment.intercepted_binops, environment.call_binop = frozenset({"*", "**", "%"}), _compute
    environment.globals.pop("lipsum", None)  # writes any number of paragraphs

    tree = _with_looks(environment.parse(template))
    return Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


def _with_looks(tree):
    """Add checks to a template's syntax tree: of the clock in each loop round, and of the size of each stored sum."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def sized(node):
        return nodes.Filter(node, _SIZED, [], [], None, None)

    class Looks(NodeTransformer):
        def visit_Output(self, node):
            # written texts are sized when they are joined
            node.nodes = [self.inside(part) if isinstance(part, sums) else self.visit(part) for part in node.nodes]
            return node

        def visit_Add(self, node):
            return sized(self.inside(node))

        def visit_Concat(self, node):
            return nodes.Filter(nodes.List(list(map(self.visit, node.nodes))), _CONCAT, [], [], None, None)

        def visit_List(self, node):
            values = (nodes.Name, nodes.Call, nodes.Filter, nodes.Getattr, nodes.Getitem)
            constant = getattr(node, "ctx", "load") != "load" or not any(node.find_all(values))
            self.generic_visit(node)
            return node if constant else nodes.Filter(node, _GATHERED, [], [], None, None)

        visit_Tuple = visit_Dict = visit_List

        def inside(self, node):
            """Treat a chain of sums as one sum."""
            for name, value in list(node.iter_fields()):
                if isinstance(value, nodes.Node):
                    setattr(node, name, self.inside(value) if isinstance(value, sums) else self.visit(value))
            return node

    sums = nodes.Add
    tree = Looks().visit(tree)

    # inserted into the program as it stands, so that a check costs one call
    for part in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        part.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("tick()"), lineno=part.lineno))
    return tree.set_environment(tree.environment)


def _joined(pieces) -> str:
    """Join the texts that a template, macro or block wrote, unless the result is too large."""
    pieces = list(pieces)
    _check(sum(map(len, pieces)))
    return "".join(pieces)


def _tick() -> None:
    if time.monotonic() > _clock.deadline:
        raise TemplateLimit(f"rendering takes more than {SECONDS:g} seconds, so the template may never end")


def _compute(context, operator: str, left, right):
    """Compute `*`, `**` or `%`, unless the result is too large."""
    if operator == "%":
        if isinstance(left, (str, bytes)):
            _check(formatted(left, right.values() if isinstance(right, dict) else _as_tuple(right)))
        return left % right

    if operator == "**":
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _POWER:
            raise _too_much()
        return left**right

    for times, repeated in ((left, right), (right, left)):
        if isinstance(times, int) and hasattr(repeated, "__len__"):
            _check(times * len(repeated))
            _clock.gathered = True
    return left * right


def _as_tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _concatenated(parts: list) -> str:
    """Compute `~`, unless the result is too large."""
    _check(sum([len(part) if type(part) is str else extent(part) for part in parts]))
    return "".join(map(str, parts))


def _told(value):
    """Return a value that the template writes as text, unless it is too large."""
    if type(value) is str:
        return value
    if isinstance(value, (list, tuple, dict)):
        _check(extent(value))
    return value


def _sized(made):
    if hasattr(made, "__len__"):
        _check(len(made))
        if not isinstance(made, str):
            _clock.gathered = True
    return made


def _gathered(made):
    _clock.gathered = True
    return made


def _gathering(run):
    """Wrap a filter that makes a list. A list without repeated items is as harmless as the template's input."""

    @wraps(run)
    def gathering(*given, **named):
        made = run(*given, **named)
        once = isinstance(made, list) and len({*map(id, made)}) == len(made)
        return made if once else _gathered(made)

    return gathering


def _only_if_gathered(run, checked):
    """Wrap `tojson`, whose check costs as much as `tojson`: skip the check unless the template has made a list."""

    @wraps(run)
    def to_json(*given, **named):
        wide = named.get("indent") not in (None, 1, 2, 4)
        return (checked if _clock.gathered or wide or len(given) > 1 else run)(*given, **named)

    return to_json


def _check(size: int) -> None:
    """Raise `TemplateLimit` for a text or list that is too large, or if all of them together are."""
    if size > _SMALL:
        _clock.made += size
        if size > CHARACTERS or (_clock.made > ALTOGETHER and _clock.deadline != float("inf")):
            raise _too_much()


def _too_much() -> TemplateLimit:
    return TemplateLimit(f"rendering makes more than {CHARACTERS} characters")
