"""The README's Python examples, run one after the other, as they stand but for how much they train and decode."""

import json
import re
from pathlib import Path

import torch
from tiny_tokenizer import smollm2_folder


ROOT = Path(__file__).resolve().parents[1]


def test_the_python_examples_run(tmp_path, monkeypatch, capsys):
    training, decoding = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert max(len(example.strip().splitlines()) for example in (training, decoding)) <= 15
    for long, short in (("max_steps=20", "max_steps=2"), ('"max_new_tokens": 64', '"max_new_tokens": 8')):
        assert long in training + decoding
        training, decoding = training.replace(long, short), decoding.replace(long, short)
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
    exec(training, {})
    assert (tmp_path / "outputs" / "my-draft" / "model.safetensors").stat().st_size > 1_000_000
    capsys.readouterr()
    exec(decoding, {})
    assert "Who are you?" in capsys.readouterr().out
