"""What a verb's log shows of others."""

import importlib.util
import io
import logging
import re
import sys
from pathlib import Path

import pytest

from hf_eagle.door.logs import show_log


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def untouched():
    """Levels as they are when a verb begins."""
    names = ("httpx", "httpx2", "hf_eagle")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.NOTSET)
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_clients_of_the_hub_show_warnings_alone_and_we_show_lines(untouched, caplog):
    show_log()
    with caplog.at_level(logging.INFO):
        for client in ("httpx", "httpx2"):
            logging.getLogger(client).info("HTTP Request: GET http://127.0.0.1")
            logging.getLogger(client).warning("%s is in trouble", client)
        logging.getLogger("hf_eagle.data").info("read")
    assert caplog.messages == ["httpx is in trouble", "httpx2 is in trouble", "read"]


def test_the_installed_client_is_among_them():
    text = (ROOT / "hf_eagle" / "door" / "logs.py").read_text()
    for client in ("httpx", "httpx2"):
        assert importlib.util.find_spec(client) is None or f'"{client}"' in text


def test_every_verb_that_shows_lines_shows_them_so():
    """A verb that shows warnings alone has no such lines to leave out."""
    for path in (ROOT / "scripts").glob("*.py"):
        assert not re.search(r"basicConfig\(level=logging\.INFO", path.read_text()), path.name


def test_no_line_shows_a_secret(monkeypatch):
    """Not even in the traceback that a line may carry."""
    shown, root = io.StringIO(), logging.getLogger()
    monkeypatch.setenv("MY_API_KEY", "sk-123456789")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(sys, "stderr", shown)
    level = root.level
    try:
        show_log()
        try:
            raise ValueError("sent sk-123456789")
        except ValueError as problem:
            logging.getLogger("hf_eagle.hub").warning("A push failed: %s", problem, exc_info=True)
    finally:
        root.setLevel(level)
    assert shown.getvalue().startswith("A push failed: sent ***\n") and "sk-123456789" not in shown.getvalue()
