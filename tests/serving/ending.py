"""What ended a run of pytest, as its last lines: `make` says no more than "Error 2".

Hooks for a conftest.py, or a plugin: `pytest -p ending`.
"""

import sys

import pytest


_ended = {"status": None, "cause": None, "during": None}


def pytest_runtest_logstart(nodeid):
    _ended["during"] = nodeid


def pytest_keyboard_interrupt(excinfo):
    place = excinfo.traceback[-1]
    _ended["cause"] = f"{excinfo.exconly()}, raised at {place.path}:{place.lineno + 1}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    _ended["status"] = exitstatus
    # what ends a run without an interrupt: errors of collection, and `session.shouldstop`
    _ended["cause"] = _ended["cause"] or session.shouldstop or session.shouldfail


@pytest.hookimpl(trylast=True)
def pytest_unconfigure():
    """Tell it last, unless all tests passed, or failures say it already."""
    status = _ended["status"]
    if status in (None, pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return
    name = pytest.ExitCode(status).name if status in list(pytest.ExitCode) else "given to pytest.exit"
    print(f"\npytest ended with status {int(status)} ({name}): {_ended['cause'] or 'see above'}", file=sys.stderr)
    if _ended["during"] is not None:
        print(f"The last test that had begun: {_ended['during']}", file=sys.stderr)
    if isinstance(_ended["cause"], str) and _ended["cause"].startswith("KeyboardInterrupt"):
        print("A KeyboardInterrupt is the signal SIGINT: Ctrl-C, or `kill -INT` by another process.", file=sys.stderr)
