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
_NEEDS_NEWER = re.compile(
    r"[^\n]*needs (torch|transformers|accelerate) [\d.]+ or newer, and this is [\d.]+[^\n]*"
    # which transformers 5.17 also needs for what 5.24 does without it
    r"|[^\n]*requires the Torchvision library[^\n]*"
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Skip such tests, with the sentence as the reason: `make test-floor` runs the lowest releases. Tests of that
    sentence itself expect it, so it does not come here."""
    report = yield
    # a script that ends says why on stderr
    said = "" if call.excinfo is None else f"{call.excinfo.value}\n{report.capstderr if report.failed else ''}"
    told = _NEEDS_NEWER.search(said)
    if report.failed and told is not None:
        report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1], told[0])
    return report


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """Nothing was tokenised before: gpt-oss's template writes the date, which is an older one in what is cached."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
