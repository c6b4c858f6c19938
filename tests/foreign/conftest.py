"""The target of the drafts that tests of this room import."""

import pytest
from tiny_files import write_tiny_target

from hf_eagle import FrozenTarget


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    write_tiny_target(folder)
    return folder


@pytest.fixture(scope="module")
def target(target_folder):
    return FrozenTarget.from_pretrained(str(target_folder))


@pytest.fixture(scope="module")
def embedding(target):
    return target.embedding_weight().detach().float()
