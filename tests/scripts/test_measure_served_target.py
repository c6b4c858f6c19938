"""A served target beside one in the process: what is read, and whose CPU time counts."""

import json
import subprocess
import sys

import pytest
from tiny_files import write_tiny_target

from scripts.dev.measure_served_target import MeasuringArguments, batches_of, cpu_seconds


SPIN = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ntime.sleep(60)"


def test_each_batch_is_other_text(tmp_path):
    write_tiny_target(tmp_path / "target")
    chat = [{"role": "user", "content": "red green stone"}, {"role": "assistant", "content": "bird fish the cat"}]
    (tmp_path / "chats.jsonl").write_text(20 * (json.dumps({"messages": chat}) + "\n"))
    sizes = {"length": 4, "rows": 2, "batches": 2, "rounds": 3}
    args = MeasuringArguments(str(tmp_path / "target"), str(tmp_path / "chats.jsonl"), sys.executable, **sizes)

    assert batches_of(args).shape == (2 * 3 + 1, 2, 4)
    args.length = 4000
    with pytest.raises(ValueError, match="`data` .* holds .* tokens, but 7 batches of 8,000 are read: give more chats"):
        batches_of(args)


def test_the_time_of_a_child_counts():
    before = cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert cpu_seconds() - before > 0.45
        child.kill()
