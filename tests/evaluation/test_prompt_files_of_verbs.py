"""Verbs that read prompt files: parts are taken, and what cannot be read is one sentence before anything is lost."""

import json
import runpy
from pathlib import Path

import pytest
from chat_server import ChatServer
from regeneration_worker import tiny_chat_model
from template_families import family_tokenizer
from tiny_tokenizer import CHATML, tiny_tokenizer
from warm_python import warm_python

from hf_eagle.arguments.sources import TargetSourceArguments


SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PARTS = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Name a tree."}]}]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": {}}}
DEEP = "[" * 100_000 + "]" * 100_000
BAD = {
    "number": (json.dumps({"messages": [{"role": "user", "content": 7}]}), "Record 0 ", "must be text, got int"),
    "surrogate": ('{"prompt": "one \\ud800 two"}', "Line 1 ", "lone surrogate"),
    "deep": ('{"prompt": ' + DEEP + "}", "Line 1 ", "nested more than"),
}


def answered(question):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "an oak"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verbs")
    tokenizer = tiny_tokenizer(CHATML)
    tiny_chat_model(tokenizer, 2048).save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    with_tools = family_tokenizer("qwen2_5")
    tiny_chat_model(with_tools, 2048).save_pretrained(folder / "qwen2_5")
    with_tools.save_pretrained(folder / "qwen2_5")
    chats = [answered("Name a tree."), answered("Name a bird.")]
    chats.append({"messages": [PARTS["messages"][0], {"role": "assistant", "content": "an elm"}]})
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "parts.jsonl").write_text(json.dumps(PARTS) + "\n")
    for name, (text, *_) in BAD.items():
        (folder / f"{name}.jsonl").write_text(text + "\n")
    return folder


def run(folder, script, *options):
    return warm_python().run(SCRIPTS / script, *options, cwd=folder)


def regenerate(folder, prompts, output="never.jsonl", target="target"):
    how = ("--data=chats.jsonl", f"--output={output}", "--max_new_tokens=2", f"--target={target}")
    return run(folder, "regenerate_answers.py", *how, f"--held_out={prompts}")


def preview(folder, prompts):
    how = ("--target=target", "--train_data=chats.jsonl", "--output_dir=out", "--output_json=never.json")
    return run(folder, "preview_data.py", *how, f"--overlap_prompts={prompts}")


def evaluate(folder, prompts):
    return run(
        folder,
        "evaluate_draft.py",
        "--target=target",
        "--draft=none",
        f"--prompts={prompts}",
        "--output_json=never.json",
    )


def benchmark_serving(folder, prompts):
    how = ("--target=target", "--draft=none", "--output_json=never.json", "--serving_python=/bin/sh")
    return run(folder, "benchmark_serving.py", *how, f"--prompts={prompts}")


def train(folder, prompts):
    how = ("--target=target", "--train_data=chats.jsonl", "--output_dir=never", "--max_steps=1", "--acceptance_steps=1")
    return run(folder, "train_eagle.py", *how, f"--acceptance_prompts={prompts}")


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("verb", [regenerate, preview, evaluate, benchmark_serving, train])
def test_what_cannot_be_read_is_one_sentence(folder, verb, kind):
    before = set(folder.iterdir())
    done = verb(folder, f"{kind}.jsonl")
    _, place, problem = BAD[kind]
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith("error: ") and f"{kind}.jsonl" in last and place in last and problem in last
    assert set(folder.iterdir()) == before


def test_a_mixture_with_empty_conversations_is_asked_without_them(folder):
    shared = [{"conversations": []}, {"conversations": [{"from": "human", "value": "Name a tree."}]}]
    (folder / "sharegpt.json").write_text(json.dumps(shared))
    how = ("--data=sharegpt.json", "--output=shared.jsonl", "--max_new_tokens=2", "--target=target")
    assert "Record 0" in run(folder, "regenerate_answers.py", *how).stderr
    done = run(folder, "regenerate_answers.py", *how, "--skip_bad_records")
    assert done.returncode == 0 and "1 of 2 records are bad and were left out" in done.stderr, done.stderr
    (line,) = (folder / "shared.jsonl").read_text().splitlines()
    assert json.loads(line)["messages"][0]["content"] == "Name a tree."


def test_a_prompt_of_parts_is_held_out_of_what_is_answered(folder):
    """Also where it is asked in parts."""
    done = regenerate(folder, "parts.jsonl", output="answers.jsonl")
    assert done.returncode == 0, done.stderr
    written = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [record["messages"][0]["content"] for record in written] == ["Name a bird."]


def test_a_prompt_of_parts_is_looked_for_in_data(folder):
    done = run(
        folder, "preview_data.py", "--target=target", "--train_data=chats.jsonl", "--output_dir=out",
        "--output_json=found.json", "--overlap_prompts=parts.jsonl",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    overlap = json.loads((folder / "found.json").read_text())["overlap"]["parts.jsonl"]
    assert (overlap["prompts_found"], overlap["conversations_found"]) == (1, 2)


@pytest.mark.parametrize("given", ["record", "argument"])
def test_regenerated_records_keep_the_tools_that_were_on_offer(folder, given):
    """Those of the record, and those of the argument `tools`, which training then finds in the record."""
    record = answered("Weather in Oslo?") | ({"tools": [TOOL]} if given == "record" else {})
    (folder / f"{given}.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "tools.json").write_text(json.dumps([TOOL["function"]]))
    options = ["--target=qwen2_5", f"--data={given}.jsonl", f"--output=of_{given}.jsonl", "--max_new_tokens=4"]
    done = run(folder, "regenerate_answers.py", *options, *(["--tools=tools.json"] if given == "argument" else []))
    assert done.returncode == 0, done.stderr
    (written,) = map(json.loads, (folder / f"of_{given}.jsonl").read_text().splitlines())
    tokenizer, asked = family_tokenizer("qwen2_5"), written["messages"][:1]
    prompt = tokenizer.apply_chat_template(asked, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert written["tools"] == [TOOL]
    assert written["prompt_tokens"] == [len(tokenizer(prompt, add_special_tokens=False)["input_ids"])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP, "`token_ids` cannot be read as JSON: ids.json is nested more than"),
        ("[0, 1", "`token_ids` cannot be read as JSON: ids.json is not JSON"),
        ('["a"]', "`token_ids` ids.json must hold a list of token ids"),
        ("\udcff", "`token_ids` cannot be read as JSON: ids.json is not UTF-8"),
        (None, "`token_ids` ids.json does not exist: correct the path"),
    ],
)
def test_token_ids_that_cannot_be_read(folder, content, message):
    (folder / "ids.json").unlink(missing_ok=True)
    if content is not None:
        (folder / "ids.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    done = run(folder, "prune_draft.py", "none", "--output_dir=pruned", "--token_ids=ids.json")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: ") and message in last and "Traceback" not in done.stderr


def test_prompts_that_the_target_writes_are_asked_for_with_options(folder):
    """What the server is asked to go on with is the template's opening, tools included."""
    bodies = []

    def write(body):
        bodies.append(body)
        return f"What is {len(bodies)}?", "stop"

    (folder / "offered.json").write_text(json.dumps([TOOL]))
    with ChatServer(model="qwen2_5", write=write) as server:
        options = ["--target=qwen2_5", f"--server_url={server.url}", "--output=written.jsonl", "--num_prompts=2"]
        done = run(folder, "write_prompts.py", *options, "--max_new_tokens=8", "--tools=offered.json")
    assert done.returncode == 0, done.stderr
    tokenizer, asked = family_tokenizer("qwen2_5"), [{"role": "user", "content": "hello"}]
    prompt = tokenizer.apply_chat_template(asked, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert len(bodies) == 2 and all(prompt.startswith(body["prompt"] + "hello") for body in bodies)


def test_a_benchmarked_server_loads_the_same_target():
    served = runpy.run_path(str(SCRIPTS / "benchmark_serving.py"))["served_target"]
    assert served("some/model", TargetSourceArguments()) == {"model": "some/model"}
    source = TargetSourceArguments(target_revision="v2", trust_remote_code=True)
    revisions = {"revision": "v2", "tokenizer_revision": "v2"}
    assert served("some/model", source) == {"model": "some/model", "trust_remote_code": True, **revisions}


def test_a_benchmarked_gguf_target_is_its_file(tmp_path):
    served = runpy.run_path(str(SCRIPTS / "benchmark_serving.py"))["served_target"]
    (tmp_path / "x.gguf").touch()
    found = served(str(tmp_path), TargetSourceArguments(gguf_file="x.gguf"))
    assert found == {"model": str(tmp_path / "x.gguf"), "tokenizer": str(tmp_path)}
