"""What of a package's source a function reaches, and how the modules of a room become one file."""

import importlib
import sys
import textwrap
import types

import pytest

from hf_eagle.hub.custom_generate import joined_rooms
from hf_eagle.hub.reachable import Module, Reachable


MODULES = {
    "low/shapes.py": '''
        """Shapes."""

        import math
        import logging
        from typing import TYPE_CHECKING

        if TYPE_CHECKING:
            from ..high.entry import start

        logger = logging.getLogger(__name__)

        # ---- sizes ----

        # in metres
        SIZE, UNUSED = 2, 3
        OTHER = 4


        class Shape:
            """A shape."""

            name = "shape"

            def __init__(self, size=SIZE):
                self.size = size

            def area(self):
                raise NotImplementedError

            # nobody asks
            @property
            def nobody(self):
                return OTHER

            def hook(self):
                return self._of_hook()

            def _of_hook(self):
                logger.info("asked")
                return "hooked"

            def trained(self):
                return missing()

            alias = _of_hook


        class Circle(Shape):
            """A circle."""

            # exactly
            def area(self):
                return math.pi * self.size**2


        def unused():
            return 1
    ''',
    "low/sums.py": """
        import logging
        from .shapes import Shape

        logger = logging.getLogger(__name__)


        def total(shapes: list[Shape]):
            logger.info("summed")
            return sum(shape.area() for shape in shapes)
    """,
    "high/entry.py": """
        from functools import partial
        from ..low.shapes import Circle, unused
        from ..low.sums import total


        def start(count):
            return partial(total, [Circle()] * count)()


        def other():
            return unused()
    """,
}


@pytest.fixture
def package(tmp_path):
    return write(tmp_path, MODULES)


def write(folder, modules):
    for name, source in modules.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(textwrap.dedent(source).lstrip())
    return folder


def reach(package, *entry, **options):
    reached = Reachable(package, **options)
    reached.add(*(entry or ("high.entry", "start")))
    return reached


def test_what_is_reached_by_name_is_kept_and_nothing_else(package):
    kept = reach(package, called=["hook"], left_out=["Shape.trained"]).kept()
    assert list(kept) == ["low.shapes", "low.sums", "high.entry"]  # what a module needs comes before it
    assert kept["low.shapes"] == {
        "Circle": {"area"},
        "Shape": {"__init__", "area", "hook", "_of_hook"},
        "SIZE": set(),
        "logger": set(),
    }
    assert set(kept["high.entry"]) == {"start"}


def test_the_modules_of_a_room_become_one_file_that_runs(package, tmp_path):
    files = joined_rooms(reach(package, called=["hook"], left_out=["Shape.trained"]))
    assert sorted(files) == ["high.py", "low.py"]
    assert files["low.py"].startswith("# Parts of hf_eagle") and "low/shapes.py, low/sums.py" in files["low.py"]
    for words in ("# in metres\nSIZE, UNUSED = 2, 3\n", '"""A circle."""', "    # exactly\n    def area"):
        assert words in files["low.py"]
    for words in ("----", "nobody", "OTHER", "def unused", "TYPE_CHECKING", "from .", "\n\n\n\n", "trained"):
        assert words not in files["low.py"], words
    assert files["low.py"].count("getLogger") == 1
    assert "\nfrom .low import Circle, total\n" in files["high.py"]

    carried = write(tmp_path / "carried", files)
    found = imported(carried, "high").start(2)
    assert found == pytest.approx(8 * 3.14159, rel=1e-4)


def imported(folder, module):
    """A module of a folder of files that import each other."""
    package = types.ModuleType(f"carried_{abs(hash(folder))}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.{module}")


REFUSED = {
    "a name with two meanings": (
        {"low/sums.py": "from .shapes import Shape\nSIZE = 9\ndef total(shapes): return SIZE, Shape\n"},
        "`SIZE` means different things in low.shapes and low.sums",
    ),
    "a library's name that is defined elsewhere": (
        {"low/sums.py": "from .shapes import Shape\nfrom sys import path as SIZE\ndef total(x): return SIZE, Shape\n"},
        "`SIZE` means different things in low.shapes and low.sums",
    ),
    "an import in a function": (
        {"low/sums.py": "def total(shapes):\n    from .shapes import SIZE\n    return SIZE\n"},
        "low.sums, line 2, imports inside a function",
    ),
    "an import under another name": (
        {"low/sums.py": "from .shapes import SIZE as S\ndef total(shapes): return S\n"},
        "low.sums imports `SIZE` as `S`",
    ),
    "an import through a third module": (
        {"low/sums.py": "from ..high.entry import unused\ndef total(shapes): return unused()\n"},
        "high.entry does not define `unused`",
    ),
    "a statement of another sort": (
        {"low/sums.py": "total = []\ntotal += [1]\n"},
        "low.sums, line 2, is neither a definition nor an import",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_source_that_cannot_be_followed_is_refused_in_a_sentence(package, case):
    modules, words = REFUSED[case]
    write(package, modules)
    with pytest.raises(ValueError, match=words):
        joined_rooms(reach(package))


@pytest.mark.parametrize("brief", [False, True])
def test_of_a_brief_source_docstrings_have_their_first_paragraph(brief):
    source = textwrap.dedent('''
        class Shape:
            """A shape,
            of any size.

            Args:
                size: in metres.
            """

            def area(self):
                """Its area."""
                text = """
                no docstring

                """
                return text

            def edge(self):
                """Its edge.

                Returns:
                    metres.
                """


        SIZE = """
        a

        b
        """
    ''')
    text = Module("low.shapes", source).text({"Shape": {"area", "edge"}, "SIZE": set()}, brief=brief)
    assert (source.strip() == text) != brief
    namespace: dict = {}
    exec(text, namespace)
    shape = namespace["Shape"]
    assert "of any size." in shape.__doc__ and shape().area().split() == ["no", "docstring"]
    assert namespace["SIZE"].split() == ["a", "b"] and shape.area.__doc__ == "Its area."
    for documented, rest in ((shape, "Args:"), (shape.edge, "Returns:")):
        assert (rest in documented.__doc__) != brief
