"""Print the lowest versions that setup.cfg allows, as constraints for pip; `make test-floor` installs these.

    python scripts/dev/floors.py > floors.txt

Needs no package, so that a new environment can run it.
"""

import re
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path


SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"
_FLOOR = re.compile(r"([\w.-]+)>=([\w.]+)")


def floors(setup: str) -> Iterator[str]:
    """Yield `name==version` for each requirement of a setup.cfg, the extra `test` included.

    Args:
        setup: the text of the file.

    Raises:
        ValueError: for a requirement that has no lowest version.
    """
    config = ConfigParser()
    config.read_string(setup)
    listed = config["options"]["install_requires"] + config["options.extras_require"]["test"]

    for line in filter(None, map(str.strip, listed.splitlines())):
        floor = _FLOOR.match(line)
        if floor is None:
            raise ValueError(f"setup.cfg requires {line} without a lowest version: write `{line}>=`, and which.")
        yield "==".join(floor.groups())


def lowest_python(setup: str) -> tuple[int, ...]:
    """The lowest version of Python that a setup.cfg allows."""
    config = ConfigParser()
    config.read_string(setup)
    return tuple(map(int, config["options"]["python_requires"].removeprefix(">=").split(".")))


def main() -> None:
    setup = SETUP.read_text(encoding="utf-8")
    print("\n".join(floors(setup)))

    lowest = ".".join(map(str, lowest_python(setup)))
    if sys.version_info[:2] != lowest_python(setup):
        print(
            f"setup.cfg allows Python {lowest}, this is another: make test-floor PYTHON=python{lowest}", file=sys.stderr
        )


if __name__ == "__main__":
    main()
