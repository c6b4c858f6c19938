import re
import signal

import pytest
import torch


# tiny models: more threads only wait for each other
torch.set_num_threads(1)

# a shell has what it starts in the background ignore Ctrl-C; tests that send one must not depend on that
signal.signal(signal.SIGINT, signal.default_int_handler)

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # the server's environment has none
    pass
else:
    # on a busy machine examples are slow to make, which says nothing about the code
    settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy")


# what is said where a release is too old for what a test asks
_NEEDS_NEWER = re.compile(r"[^\n]*needs (torch|transformers) [\d.]+ or newer, and this is [\d.]+[^\n]*")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Skip such tests, with the sentence as the reason: `make test-floor` runs the lowest releases. Tests of that
    sentence itself expect it, so it does not come here."""
    report = yield
    told = None if call.excinfo is None else _NEEDS_NEWER.search(str(call.excinfo.value))
    if report.failed and told is not None:
        report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1], told[0])
    return report
