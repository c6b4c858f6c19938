"""The README's Python example, run as it stands."""

import json
import re
from pathlib import Path

import torch
from tiny_tokenizer import smollm2_folder


ROOT = Path(__file__).resolve().parents[1]


def test_the_python_example_runs(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(example.strip().splitlines()) <= 15
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "smollm2-135m-instruct").symlink_to(smollm2_folder().resolve())
    chats = tmp_path / "outputs" / "quickstart-data" / "answers.jsonl"
    chats.parent.mkdir(parents=True)
    with chats.open("w") as file:
        for number in range(8):
            user = {"role": "user", "content": f"Say {number}."}
            file.write(
                json.dumps({"messages": [user, {"role": "assistant", "content": f"Here it is: {number}"}]}) + "\n"
            )
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(example, {})
    assert (tmp_path / "outputs" / "my-draft" / "model.safetensors").stat().st_size > 1_000_000
