"""What the releases that run these tests can do: `make test-floor` runs the lowest that setup.cfg allows."""

from importlib.metadata import version

import pytest
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def is_older(package: str, release: str) -> bool:
    """Whether the installed package comes before this release; pre-releases of it do not."""
    return Version(version(package)).release < Version(release).release


def skip_before(package: str, release: str) -> None:
    """Skip a test of what older releases cannot do."""
    if is_older(package, release):
        pytest.skip(f"{package} {version(package)} comes before {release}")


def skip_unknown(model_type: str) -> None:
    """Skip a test of a type of model that came with a later transformers."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {version('transformers')} has no {model_type}")
