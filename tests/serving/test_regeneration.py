"""Answers through a real vLLM server are the target's own: what the same command answers in its own process, and token
by token what training makes of them, whatever the chat template does with answers.
"""

import json

import harness
import pytest
from template_families import switched_template
from transformers import AutoTokenizer

from hf_eagle.answers.answer import Answer, digest
from hf_eagle.data.loss_mask import ConversationEncoder
from hf_eagle.data.messages import read_record
from hf_eagle.data.said import read_said
from hf_eagle.serving.vllm_server import vllm_server


QUESTIONS = [
    "What is the capital of France? Answer in one short sentence.",
    "Give me five tips for somebody who wants to buy a bicycle.",
    "Write a short story about a tiger.",
    "Who wrote Romeo and Juliet?",
    "Name three primary colours.",
    "Explain photosynthesis in one sentence.",
]


@pytest.fixture(scope="module")
def url(shared):
    options = {"dtype": "float32", "max_num_seqs": 8, "max_model_len": 1024, "enforce_eager": True}
    with vllm_server(harness.TARGET, shared / "api_server.log", **options) as url:
        yield url


def regenerate(folder, name, prompts, **options):
    data = folder / f"{name}-prompts.jsonl"
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in prompts))
    output = folder / f"{name}.jsonl"
    values = {"target": harness.TARGET, "data": data, "output": output, "max_new_tokens": 48} | options
    printed = harness.call(harness.project(), "scripts/regenerate_answers.py", *harness.options(values))
    return [json.loads(line) for line in output.read_text().splitlines()], printed


def user(content):
    return {"role": "user", "content": content}


def test_greedy_answers_are_those_of_the_target_in_process(url, tmp_path):
    prompts = [[user(question)] for question in QUESTIONS]
    prompts += [[{"role": "system", "content": "You are a pirate."}, user("Hello!")]]
    prompts += [[user(a), {"role": "assistant", "content": "?"}, user("Say it shorter.")] for a in QUESTIONS[:3]]
    served, _ = regenerate(tmp_path, "served", prompts, server_url=url, concurrency=8)
    in_process, _ = regenerate(tmp_path, "in_process", prompts, dtype="float32", batch_size=5)
    assert served == in_process
    # a record whose later prompt does not repeat an answer token by token has a line for each, with the answer once
    said = [
        reason
        for row in served
        for reason, ids in zip(row["finish_reason"], row["answer_token_ids"], strict=True)
        if ids is not None
    ]
    assert len(said) == 13 and set(said) == {"stop", "length"}
    assert all(len(row["answer_token_ids"]) == len(row["finish_reason"]) for row in served)


FAMILIES = ["smollm2", "llama3", "qwen3", "phi3", "mistral", "gemma3", "gptoss", "deepseek_v3", "kimi_k2"]


@pytest.fixture(scope="module")
def switched(tmp_path_factory):
    """The target with one template for nine families, of which the option `family` takes one."""
    folder = tmp_path_factory.mktemp("switched") / "target"
    folder.mkdir()
    for file in harness.TARGET.iterdir():
        if "chat_template" not in file.name:
            (folder / file.name).symlink_to(file.resolve())
    (folder / "chat_template.jinja").write_text(switched_template(FAMILIES), encoding="utf-8")
    return folder


def test_what_the_server_says_is_what_is_trained_on(switched, shared, tmp_path):
    """In nine templates, sampled, over two turns: the prompt's and the answer's ids of each turn begin a row."""
    tokenizer = AutoTokenizer.from_pretrained(switched)
    prompts = [
        [user(question), {"role": "assistant", "content": "?"}, user("Say it shorter.")] for question in QUESTIONS
    ]
    options = {"dtype": "float32", "max_num_seqs": 8, "max_model_len": 1024, "enforce_eager": True}
    # contents as texts: of nine templates at once vLLM cannot tell which form they take
    options["chat_template_content_format"] = "string"
    with vllm_server(switched, shared / "switched_server.log", **options) as url:
        for family in FAMILIES:
            chosen = {"family": family}
            lines, printed = regenerate(
                tmp_path,
                family,
                prompts,
                target=switched,
                server_url=url,
                temperature=1.2,
                max_new_tokens=16,
                chat_template_kwargs=json.dumps(chosen),
            )
            assert "left out" not in printed and "reports no token ids" not in printed
            encoder = ConversationEncoder(tokenizer, None, chosen)
            rows = [
                encoder.encode([read_record(line, 0)[0]], said=[read_said(line, "the record")])[0] for line in lines
            ]
            journal = (tmp_path / f"{family}.jsonl.journal").read_text().split("\n")[1:-1]
            journal = [json.loads(row) for row in journal]
            # an empty answer is none: it ends its record, and is not written
            empty = [row for row in journal if Answer(**row["answer"]).is_empty]
            said = [row["answer"] for row in journal if row not in empty]
            begun = {digest(ids[:length]) for ids, _ in rows for length in range(len(ids) + 1)}
            assert len(journal) == 2 * len(QUESTIONS) - sum(row["turn"] == 0 for row in empty) and len(empty) <= 3
            assert {answer["digest"] for answer in said} <= begun
            assert sum(sum(mask) for _, mask in rows) == sum(len(answer["token_ids"]) for answer in said)


def test_content_parts_go_through(url, tmp_path):
    parts = [{"type": "text", "text": QUESTIONS[0]}]
    rows, _ = regenerate(tmp_path, "parts", [[user(parts)], [user(QUESTIONS[0])]], server_url=url)
    assert rows[0]["messages"][0]["content"] == QUESTIONS[0]  # as training joins them
    assert rows[0]["messages"][1] == rows[1]["messages"][1]


def test_too_long_prompts_end_their_records(url, tmp_path):
    prompts = [[user(QUESTIONS[0])], [user("again and " * 1000)], [user("and " * 1010)]]
    rows, printed = regenerate(tmp_path, "long", prompts, server_url=url)
    assert [row["finish_reason"] for row in rows] == [["stop"]]  # what has no answer is counted, and not written
    assert "2 records end early: with `max_new_tokens` their prompts exceed the server's context length." in printed


def test_sampled_answers_follow_their_seed(url, tmp_path):
    prompts = [[user(question)] for question in QUESTIONS]
    sampling = {"server_url": url, "temperature": 1.0, "max_new_tokens": 16}
    first, again, other = (
        [row["messages"] for row in regenerate(tmp_path, name, prompts, seed=seed, **sampling)[0]]
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again != other


def test_another_target_is_refused(url, tmp_path):
    with pytest.raises(AssertionError, match="error: The server at .* serves .*smollm2-135m-instruct.*, not `target`"):
        regenerate(tmp_path, "other", [[user("Hi")]], server_url=url, target=make_other(tmp_path))


def make_other(folder):
    """The tokenizer of the target in another folder: another model for all one can know."""
    other = folder / "other-target"
    other.mkdir()
    for file in harness.TARGET.iterdir():
        if file.suffix in (".json", ".jinja", ".txt"):
            (other / file.name).write_bytes(file.read_bytes())
    return other
