"""Find paths of this machine in a card: they mean nothing to its readers, and reveal names of users and folders."""

import os
import re


# not within an address, another path or a word
_PATH = re.compile(r"(?<![\w.:/~-])/[\w.+@-]+(?:/[\w.+@-]+)+")
# folders that exist on every machine, and reveal nothing
_SYSTEM = {"bin", "dev", "etc", "lib", "opt", "proc", "sys", "usr", "var"}


def local_paths(text: str) -> list[str]:
    """Return the absolute paths in a text that begin with a folder of this machine, in order."""
    found = [match.rstrip(".") for match in _PATH.findall(text)]
    tops = {path: path.split("/")[1] for path in found}
    return [path for path in dict.fromkeys(found) if tops[path] not in _SYSTEM and os.path.isdir(f"/{tops[path]}")]
