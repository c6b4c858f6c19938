"""Chat templates are programs of strangers: a rendering has a time, and what it makes a size.

transformers compiles a template in a sandbox that limits one `range`, not loops in loops, and no text. Here it is
compiled in the same sandbox, with a look at the clock in each round of a loop and in each macro, and a look at the size
of what is written, kept or handed on. No signal and no thread is needed, so it holds in threads and in the workers of
`datasets` alike.

Not limited is what one filter or method of a text does (`|replace`, `.ljust`), but by the memory that is there.
"""

import threading
import time
from functools import cache, lru_cache


SECONDS = 10.0  # of one rendering; real ones take milliseconds
CHARACTERS = 2**26  # of a rendering, and of any text or list on its way there
_POWER = 1000  # bits of one
_SIZED = "within the limit of size"  # a filter, by a name that no template can write


class TemplateRefusal(ValueError):
    """A chat template does not take this conversation; the text is what it says about it."""


class TemplateLimit(ValueError):
    """A chat template takes too long or makes too much, so no other conversation is worth a try."""


class _Clock(threading.local):
    deadline = float("inf")


_clock = _Clock()


def start_clock() -> None:
    """From here to `stop_clock`, a template that this thread renders ends with `TemplateLimit` at the latest."""
    _take_over()
    _clock.deadline = time.monotonic() + SECONDS


def stop_clock() -> None:
    """What this thread renders from here on may take any time."""
    _clock.deadline = float("inf")


@cache
def _take_over() -> None:
    """transformers, which calls one function of its own to compile every template, calls ours from now on."""
    from transformers.utils import chat_template_utils  # late, since who asks a server needs none of it

    make = chat_template_utils._cached_compile_jinja_template
    chat_template_utils._compile_jinja_template = lru_cache(lambda template: _compiled(make("").environment, template))


def _compiled(environment, template: str):
    """A template as a program with limits, in the sandbox that transformers makes for one."""
    from jinja2 import Template

    environment.tick, environment.concat, environment.filters[_SIZED] = _tick, _joined, _sized
    # these are not computed beforehand, either: that alone could take all memory
    environment.intercepted_binops, environment.call_binop = frozenset({"*", "**"}), _multiply
    environment.globals.pop("lipsum", None)  # as many paragraphs as it is asked for
    tree = _with_looks(environment.parse(template))
    return Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


def _with_looks(tree):
    """A template's syntax tree with a look at the clock in each round, and at the size of each sum that is kept."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def sized(node):
        return nodes.Filter(node, _SIZED, [], [], None, None)

    class Looks(NodeTransformer):
        def visit_Output(self, node):
            # what is written is counted when it is joined
            node.nodes = [self.inside(part) if isinstance(part, sums) else self.visit(part) for part in node.nodes]
            return node

        def visit_Add(self, node):
            return sized(self.inside(node))

        visit_Concat = visit_Add

        def inside(self, node):
            """A chain of sums is one sum."""
            for name, value in list(node.iter_fields()):
                if isinstance(value, list):
                    setattr(node, name, [self.inside(v) if isinstance(v, sums) else self.visit(v) for v in value])
                elif isinstance(value, nodes.Node):
                    setattr(node, name, self.inside(value) if isinstance(value, sums) else self.visit(value))
            return node

    sums = (nodes.Add, nodes.Concat)
    tree = Looks().visit(tree)
    # written into the program as it stands here, so that a look costs one call
    for part in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        part.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("tick()"), lineno=part.lineno))
    return tree.set_environment(tree.environment)


def _joined(pieces) -> str:
    """What a template, a macro or a block wrote, unless it is huge together."""
    pieces = list(pieces)
    if sum(map(len, pieces)) > CHARACTERS:
        raise _too_much()
    return "".join(pieces)


def _tick() -> None:
    if time.monotonic() > _clock.deadline:
        raise TemplateLimit(f"rendering takes more than {SECONDS:g} seconds, so the template may never end")


def _multiply(context, operator: str, left, right):
    """`*` or `**`, unless what comes out is huge."""
    if operator == "**":
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _POWER:
            raise _too_much()
        return left**right
    for times, repeated in ((left, right), (right, left)):
        if isinstance(times, int) and hasattr(repeated, "__len__") and times * len(repeated) > CHARACTERS:
            raise _too_much()
    return left * right


def _sized(made):
    if hasattr(made, "__len__") and len(made) > CHARACTERS:
        raise _too_much()
    return made


def _too_much() -> TemplateLimit:
    return TemplateLimit(f"rendering makes more than {CHARACTERS} characters")
