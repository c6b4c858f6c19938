"""The cell of the notebook that serves, run as plain Python against a real vLLM."""

import json
import sys

import harness


NOTEBOOK = harness.ROOT / "hf_eagle" / "docs" / "target_to_served_draft.ipynb"


def test_the_cell_that_serves(measured_draft, tmp_path, capsys):
    draft, _, _ = measured_draft("eagle3")
    (tmp_path / "draft").symlink_to(draft)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    (cell,) = ["".join(cell["source"]) for cell in cells if "serving" in cell["metadata"].get("tags", [])]
    assert '".venv-serving/bin/python"' in cell
    cell = cell.replace('".venv-serving/bin/python"', repr(sys.executable))

    exec(cell, {"json": json, "TARGET": str(harness.TARGET), "FOLDER": tmp_path})
    answer, *counters = capsys.readouterr().out.splitlines()
    counted = {line.split("{")[0]: float(line.split()[-1]) for line in counters if line.startswith("vllm:spec_decode")}
    assert answer and counted["vllm:spec_decode_num_accepted_tokens_total"] > 0
