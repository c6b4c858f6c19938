"""The lowest versions that setup.cfg allows, as `make test-floor` installs them."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
FLOORS = runpy.run_path(str(ROOT / "scripts" / "dev" / "floors.py"))
SETUP = """[options]
python_requires = >=3.10
install_requires =
    torch>=2.9
    # why
    transformers>=5.17,<6
[options.extras_require]
more =
    a-b>=1.0.1
test =
    %(more)s
    c>=2
dev =
    d
"""


def test_every_requirement_is_held_at_its_floor():
    assert list(FLOORS["floors"](SETUP)) == ["torch==2.9", "transformers==5.17", "a-b==1.0.1", "c==2"]
    assert FLOORS["lowest_python"](SETUP) == (3, 10)


@pytest.mark.parametrize("requirement", ["c", "c<3", "c==2", "c~=2.0"])
def test_a_requirement_without_a_floor_is_named(requirement):
    with pytest.raises(ValueError, match=f"setup.cfg requires {requirement} without a lowest version: write `"):
        list(FLOORS["floors"](SETUP.replace("c>=2", requirement)))


def test_our_own_floors_are_printed_without_a_package():
    command = [sys.executable, "-I", "-S", str(ROOT / "scripts" / "dev" / "floors.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    printed = done.stdout.split()
    assert "transformers==5.17" in printed and "pytest-xdist==3.8" in printed and "av==14.1" in printed
    assert ("PYTHON=python3.10" in done.stderr) == (sys.version_info[:2] != (3, 10))
