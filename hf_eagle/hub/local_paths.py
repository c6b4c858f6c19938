"""Paths of this machine in the text of a card: they mean nothing to its readers, and tell who worked where."""

import os
import re


# not within an address, another path or a word
_PATH = re.compile(r"(?<![\w.:/~-])/[\w.+@-]+(?:/[\w.+@-]+)+")
# the same on every machine
_SYSTEM = {"bin", "dev", "etc", "lib", "opt", "proc", "sys", "usr", "var"}


def local_paths(text: str) -> list[str]:
    """The absolute paths in a text that begin with a folder of this machine, in their order."""
    found = [match.rstrip(".") for match in _PATH.findall(text)]
    tops = {path: path.split("/")[1] for path in found}
    return [path for path in dict.fromkeys(found) if tops[path] not in _SYSTEM and os.path.isdir(f"/{tops[path]}")]
