"""A disk that is full while records are read and tokenised: one sentence that says which folder is too full."""

import errno
import json

import pytest
from faulty import full_disk
from tiny_tokenizer import CHATML, tiny_tokenizer

from hf_eagle.data.caching import caching
from hf_eagle.data.conversations import build_dataset
from hf_eagle.data.packing import pack_dataset
from hf_eagle.data.records import load_records


SAID = "The cache of data sets .* cannot be written .File too large.: make room, or name a different folder in .*HF_"


@pytest.fixture
def records(tmp_path):
    """Texts that no test has read before, so that nothing of them is cached."""
    messages = [{"role": "user", "content": str(tmp_path)}, {"role": "assistant", "content": "red green"}]
    (tmp_path / "chats.jsonl").write_text(20 * (json.dumps({"messages": messages}) + "\n"))
    return tmp_path / "chats.jsonl"


def test_each_step_says_so(records):
    tokenizer = tiny_tokenizer(CHATML)
    with full_disk(500), pytest.raises(OSError, match=SAID):
        load_records(records)
    read = load_records(records)
    with full_disk(500), pytest.raises(OSError, match=SAID):
        build_dataset(read, tokenizer, 256)
    chats = build_dataset(read, tokenizer, 256)
    with full_disk(500), pytest.raises(OSError, match=SAID):
        pack_dataset(chats, 256)
    assert len(pack_dataset(chats, 256))


def test_what_a_full_disk_leads_to_is_said_as_well():
    """`datasets` writes to a file that could not be closed, if it has so few rows that only closing writes them."""
    with pytest.raises(OSError, match=SAID), caching():
        try:
            raise OSError(errno.EFBIG, "File too large")
        except OSError as problem:
            raise ValueError("I/O operation on closed file") from problem


def test_what_is_not_the_disks_is_left_as_it_is():
    with pytest.raises(FileNotFoundError), caching():
        open("/no/such/file")
