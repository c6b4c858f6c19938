"""The notebook, its cells run as plain Python with small numbers; the one that serves is run in `tests/serving`."""

import json
import os
from pathlib import Path

import pytest
from tiny_tokenizer import smollm2_folder


ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "hf_eagle" / "docs" / "target_to_served_draft.ipynb"
SMALL = {
    "NUM_ANSWERS, ANSWER_TOKENS, MAX_STEPS, NUM_PROMPTS = 64, 64, 60, 4": (
        "NUM_ANSWERS, ANSWER_TOKENS, MAX_STEPS, NUM_PROMPTS = 2, 8, 2, 1"
    )
}


def code_cells(serving: bool) -> str:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    chosen = [cell for cell in cells if ("serving" in cell["metadata"].get("tags", [])) == serving]
    return "\n\n".join("".join(cell["source"]) for cell in chosen)


def test_a_notebook_without_outputs_is_what_lies_in_the_repository():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_its_cells_run(tmp_path, monkeypatch, capfd):
    cells = code_cells(serving=False)
    for text, small in SMALL.items():
        assert text in cells
        cells = cells.replace(text, small)

    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "smollm2-135m-instruct").symlink_to(smollm2_folder().resolve())
    (tmp_path / "assets" / "prompts").symlink_to(ROOT / "assets" / "prompts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    exec(cells, {"__name__": "__main__"})
    assert "acceptance length 1." in (printed := capfd.readouterr().out) and "identical: True" in printed


@pytest.mark.parametrize("name", ["TARGET", "FOLDER", "json"])
def test_the_cell_that_serves_uses_what_the_others_define(name):
    assert f"{name}" in code_cells(serving=True) and name in code_cells(serving=False)
