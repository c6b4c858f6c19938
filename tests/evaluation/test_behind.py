"""Questions behind text: only the amount of text differs, and it is that of other prompts."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from hf_eagle.evaluation.behind import prompts_behind
from hf_eagle.evaluation.prompts import Prompt, encode_prompt, load_prompts


SCRIPT = str(Path(__file__).parents[2] / "scripts" / "write_prompts.py")
TEXTS = [" ".join(f"w{20 + (7 * n + k) % 40}" for k in range(6)) for n in range(30)]
QUESTIONS = [
    Prompt([{"role": "user", "content": "w11 w12"}], "a", 81, ("w13",)),
    Prompt([{"role": "system", "content": "w14"}, {"role": "user", "content": "w15"}], None, "q"),
]


def test_lengths_differ_by_what_is_asked_and_the_question_stays_last(tokenizer, tmp_path):
    lengths = [0, 8, 32, 100]
    records = prompts_behind(QUESTIONS, TEXTS, lengths, tokenizer)
    assert [(r["id"], r["category"]) for r in records[:4]] == [(f"81 behind {n}", f"behind {n}") for n in lengths]
    assert records == prompts_behind(QUESTIONS, TEXTS, lengths, tokenizer)
    assert records != prompts_behind(QUESTIONS, TEXTS, lengths, tokenizer, seed=1)

    path = tmp_path / "behind.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    prompts = load_prompts(path)
    for question, first in ((QUESTIONS[0], 0), (QUESTIONS[1], 4)):
        ids = [encode_prompt(prompt, tokenizer) for prompt in prompts[first : first + 4]]
        assert ids[0] == encode_prompt(question, tokenizer)
        assert [len(one) - len(ids[0]) for one in ids] == lengths
        contents = [prompt.messages[-1]["content"] for prompt in prompts[first : first + 4]]
        assert all(longer.endswith(shorter) for shorter, longer in zip(contents, contents[1:], strict=False))
        assert prompts[first].messages[:-1] == question.messages[:-1]
    # each question stands behind texts of its own
    assert records[3]["messages"][0]["content"] != records[7]["messages"][1]["content"].replace("w15", "w11 w12")


def test_what_cannot_be_written_is_refused(tokenizer):
    with pytest.raises(ValueError, match="`texts` hold .* tokens, but `behind` asks for 1,000,000"):
        prompts_behind(QUESTIONS, TEXTS, [1_000_000], tokenizer)
    with pytest.raises(ValueError, match="Prompt 3 has no user's message"):
        prompts_behind([Prompt([{"role": "system", "content": "w14"}], None, 3)], TEXTS, [8], tokenizer)
    shown = Prompt([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], None, 4)
    with pytest.raises(ValueError, match="Prompt 4 holds media"):
        prompts_behind([shown], TEXTS, [8], tokenizer)


@pytest.fixture
def folder(tmp_path, tokenizer, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "target")
    (tmp_path / "target" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "questions.jsonl").write_text('{"question_id": 81, "turns": ["w11 w12", "w13"]}\n{"prompt": "w15"}\n')
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"prompt": text, "answer": "w16"}) for text in TEXTS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, **changes):
    given = {"target": "target", "behind": "none,32", "questions": "questions.jsonl", "texts": "train.jsonl"}
    given |= {"output": "behind.jsonl"} | changes
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *options])
    runpy.run_path(SCRIPT, run_name="__main__")


def test_the_script_needs_no_server(folder, monkeypatch, capsys):
    for _ in range(2):  # its own output may be replaced
        run(monkeypatch)
        assert "4 prompts: 2 questions behind 0, 32 tokens of text" in capsys.readouterr().out
    assert [prompt.category for prompt in load_prompts("behind.jsonl")] == ["behind 0", "behind 32"] * 2
    run(monkeypatch, num_prompts=1, output="one.jsonl")
    assert len(load_prompts("one.jsonl")) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"behind": None}, "`server_url` is missing"),
        ({"texts": None}, "`texts` is missing"),
        ({"questions": "no.jsonl"}, "`questions` no.jsonl does not exist"),
        ({"texts": "no.jsonl"}, "`texts` no.jsonl does not exist"),
        ({"output": "train.jsonl"}, "`output`"),
        ({"output": "mine.jsonl"}, "`output`"),
        ({"behind": "32,8"}, "`behind` must be ascending numbers of tokens"),
    ],
)
def test_what_cannot_be_asked_is_refused(folder, monkeypatch, capsys, changes, message):
    (folder / "mine.jsonl").write_text('{"prompt": "w15"}\n')
    with pytest.raises(SystemExit):
        run(monkeypatch, **changes)
    assert message in capsys.readouterr().err
    assert (folder / "mine.jsonl").read_text() == '{"prompt": "w15"}\n'
