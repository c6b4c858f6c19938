"""What measures a GPU, with tiny shapes: whole on a CPU, its parts on a pretended device, and parts that end badly."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from warm_python import warm_python
from workers import run_worker


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "dev" / "measure_gpu.py"
sys.path.append(str(SCRIPT.parent))

import measure_gpu  # noqa: E402
from measuring_gpu import parts, report  # noqa: E402
from measuring_gpu.sizes import REAL  # noqa: E402


ON_THE_DEVICE = ("kernels", "draft", "step", "memory", "host", "profile", "decoding")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    done = warm_python().run(SCRIPT, "--tiny", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, out


def test_everything_runs_and_is_written(whole):
    printed, out = whole
    found = json.loads((out / "measured.json").read_text())
    assert list(found["parts"]) == list(measure_gpu.PARTS)
    assert {name: part["error"] for name, part in found["parts"].items() if part["error"]} == {}
    assert all(part["rows"] for part in found["parts"].values())

    table = (out / "table.md").read_text()
    rows = sum(len(part["rows"]) for part in found["parts"].values())
    assert len(table.splitlines()) == 4 + rows and table in printed  # machine, empty line, head of the table
    assert (out / "measured.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_is_what_it_says(whole):
    found = json.loads((whole[1] / "measured.json").read_text())["parts"]
    rows = {name: {row["what"]: row for row in part["rows"]} for name, part in found.items()}

    assert all(row["distance"] < 0.02 for row in rows["kernels"].values())
    # every word that the target says is one that the draft can say
    assert [row["in_vocabulary_share"] for row in rows["step"].values()] == [1.0]
    assert all(row["farthest_from_cpu"] == 0 for row in rows["training"].values())  # this is the CPU
    assert len(rows["profile"]) == 10
    assert rows["tests"]["all"]["passed"] > 0 and rows["tests"]["all"]["failed"] == 0


def test_its_parts_run_on_an_accelerator(tmp_path):
    """Pretended here: tensors that lie elsewhere than the device's are found without a GPU."""
    run_worker(tmp_path, worker="pretended_measuring_worker.py", parts=ON_THE_DEVICE)
    found = json.loads((tmp_path / "results.json").read_text())
    assert all(row["distance"] < 0.02 for row in found["kernels"])
    assert found["step"][0]["in_vocabulary_share"] == 1.0
    assert all(len(found[name]) >= 1 for name in ON_THE_DEVICE)


# ---- parts that end badly ----


def rows_then(end):
    def part(sizes, device):
        yield {"what": "first", "seen": 1}
        end()

    return part


def fail():
    raise RuntimeError("CUDA error: device-side assert\nand more")


ENDS = {
    "an error": (fail, 60, "RuntimeError: CUDA error: device-side assert"),
    "a crash": (lambda: os._exit(7), 60, "ended with exit status 7"),
    "no end": (lambda: time.sleep(600), 1.5, "stopped after 2 s"),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_a_part_has_found_before_it_ended_is_kept(end, tmp_path, monkeypatch):
    ends, limit, error = ENDS[end]
    monkeypatch.setitem(parts.PARTS, "bad", rows_then(ends))
    found = parts.run_part("bad", True, limit, tmp_path / "bad.log")
    assert (found.rows, found.error) == ([{"what": "first", "seen": 1}], error)
    assert "| bad | failed |" in report.table({"what": "machine"}, {"bad": found})


def test_without_a_gpu_it_says_so(tmp_path):
    done = warm_python().run(SCRIPT, "--part", "draft", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith("PyTorch finds no GPU here: run this where it finds one, or give --tiny.\n")


def test_all_parts_together_end_within_five_minutes():
    assert sum(measure_gpu.PARTS.values()) <= 300 - 15  # to start
    assert list(measure_gpu.PARTS) == [name for name in parts.PARTS if name != "machine"]


def test_real_shapes_are_those_of_the_models():
    assert list(REAL.drafts) == ["llama3-8b", "qwen3-8b", "qwen3-30b-a3b", "kimi-mla"]
    assert REAL.batches == ((1, 2048), (4, 2048), (1, 8192), (1, 32768))
    assert all(shapes.draft_vocab_size == 32000 for shapes in REAL.drafts.values())
