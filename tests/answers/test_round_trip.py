"""From what a target says to the rows that are trained on: its very tokens behind its very prompts, each once."""

import json
import logging
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_target import ScriptedTarget
from template_families import FAMILIES, family_tokenizer, switched_template
from tiny_tokenizer import CHATML, assistant, smollm2_folder, tiny_tokenizer, user
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_eagle.answers.answer import Answer, AnswerReader, digest
from hf_eagle.answers.regeneration import regenerate_answers
from hf_eagle.answers.written_answers import refusal
from hf_eagle.data import template_limits
from hf_eagle.data.conversations import MaskOptions, build_dataset, load_records
from hf_eagle.data.loss_mask import ConversationEncoder


HARMONY = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>four"
THOUGHT = "<think>\nhm\n</think>\n\nfour"
OPENED = "hm\n</think>\n\nfour"  # behind a prompt that opens a thought
# what a target of each family says, turn by turn; "..." at the end: it is cut there, and no end of turn follows
SAID = {
    "smollm2": [" four \n", "the answer...", "\n\nfour"],
    "llama3": ["\n four ", " the...", "four"],
    "llama3_1": [" four", "four \n\n"],
    "llama3_marked": ["four ", " four"],
    "qwen2_5": ["four\n", "  four", "is <|im_start|> it..."],
    "qwen3": [THOUGHT, "<think>\nhm, the...", "four", THOUGHT + " \n"],
    "qwen3_marked": [THOUGHT, "four"],
    "phi3": [" four", "four "],
    "mistral": [" four", "\n\nfour ", "four..."],
    "gemma3": ["four\n\n", " four..."],
    "gptoss": [HARMONY, HARMONY[:40] + "...", HARMONY[:14] + "...", HARMONY + " \n"],
    "deepseek_v3": [OPENED, "hm, the...", OPENED + "  "],
    "kimi_k2": [" four ", "four..."],
    "kimi_k2_thinking": [THOUGHT, "<think>hm...", "four"],
}

REAL = ["smollm2", "llama3", "qwen3", "phi3", "mistral", "gemma3", "gptoss", "deepseek_v3", "kimi_k2"]


def regenerated(tmp_path: Path, tokenizer, answers: list[list[int]], **options) -> tuple[list[dict], ScriptedTarget]:
    """The lines of one record with as many turns as answers, and the target that was asked."""
    target = ScriptedTarget(tokenizer, answers)
    questions = [message for n in range(len(answers)) for message in (user(f"what is {n}?"), assistant("x"))]
    path = tmp_path / "answers.jsonl"
    for old in tmp_path.glob("answers.jsonl*"):
        old.unlink()
    records = options.pop("records", [{"messages": questions}])
    regenerate_answers(target, tokenizer, records, path, batch_size=1, max_new_tokens=64, progress=False, **options)
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]], target


def tokens(tokenizer, said: str) -> list[int]:
    ids = tokenizer(said.removesuffix("..."), add_special_tokens=False)["input_ids"]
    return ids if said.endswith("...") else [*ids, tokenizer.eos_token_id]


def assert_said_is_trained_on(rows, asked: list[tuple[list[int], list[int]]]) -> None:
    """Every prompt with its answer begins a row, and in all rows together each answer's tokens are supervised once."""
    for prompt, answer in asked:
        whole = prompt + answer
        matching = [row for row in rows if row["input_ids"][: len(whole)] == whole]
        assert any(all(row["loss_mask"][len(prompt) : len(whole)]) for row in matching), (prompt, answer)
    assert sum(sum(row["loss_mask"]) for row in rows) == sum(len(answer) for _, answer in asked)


def test_a_real_target_in_nine_templates(tmp_path, caplog):
    """SmolLM2, whatever it says in them: two turns each, sampled, so that some texts are said in unusual tokens."""
    folder = smollm2_folder()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        AutoTokenizer.from_pretrained(folder),
    )
    tokenizer.chat_template = switched_template(REAL)
    records = [{"messages": [user("What is the capital of France?"), assistant("x"), user("Say it shorter.")]}]
    for family in REAL:
        path = tmp_path / f"{family}.jsonl"
        options = {"template_kwargs": {"family": family}, "temperature": 1.5, "max_new_tokens": 6, "progress": False}
        regenerate_answers(model, tokenizer, records, path, **options)
        journal = [json.loads(line) for line in Path(f"{path}.journal").read_text().split("\n")[1:-1]]
        said = [answer for row in journal for _, answer in row["answers"]]
        lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        rows = build_dataset(lines, tokenizer, template_kwargs={"family": family})
        assert len(said) == 2
        begun = {digest(ids[:n]) for ids in rows["input_ids"] for n in range(len(ids) + 1)}
        assert {answer["digest"] for answer in said} <= begun
        assert sum(map(sum, rows["loss_mask"])) == sum(len(answer["token_ids"]) for answer in said)
    assert "left out" not in caplog.text


def test_every_family_has_answers_here():
    assert set(SAID) == set(FAMILIES)


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_said_is_what_is_trained_on(tmp_path, family, caplog):
    tokenizer = family_tokenizer(family)
    answers = [tokens(tokenizer, said) for said in SAID[family]]
    lines, target = regenerated(tmp_path, tokenizer, answers)
    assert len(target.asked) == len(answers) and "left out" not in caplog.text
    assert_said_is_trained_on(build_dataset(load_records(tmp_path / "answers.jsonl"), tokenizer), target.asked)
    for options in (MaskOptions(thoughts=False), MaskOptions(tool_calls=False), MaskOptions(last_turn_only=True)):
        part, whole = build_dataset(lines, tokenizer, options=options), build_dataset(lines, tokenizer)
        assert all(row["input_ids"] in whole["input_ids"] for row in part)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(family=st.sampled_from(sorted(FAMILIES)), data=st.data())
def test_any_tokens_survive(tmp_path, family, data):
    """Whatever tokens a target strings together, special ones too."""
    tokenizer = family_tokenizer(family)
    ids = st.integers(0, len(tokenizer) - 1).filter(lambda token: token != tokenizer.eos_token_id)
    answers = data.draw(st.lists(st.lists(ids, min_size=1, max_size=12), min_size=1, max_size=3))
    ended = data.draw(st.lists(st.booleans(), min_size=len(answers), max_size=len(answers)))
    answers = [[*answer, tokenizer.eos_token_id] if end else answer for answer, end in zip(answers, ended, strict=True)]
    try:
        lines, target = regenerated(tmp_path, tokenizer, answers)
    except ValueError as problem:  # the first answer has no text
        first = answers[0][: answers[0].index(tokenizer.eos_token_id)] if ended[0] else answers[0]
        assert "None of the 1 records has an answer: 1 answers are empty" in str(problem)
        assert not tokenizer.decode(first, skip_special_tokens=True).strip() or "<" in tokenizer.decode(first)
        return
    given = max(len(line["finish_reason"]) for line in lines)
    assert given == len(target.asked) or given == len(target.asked) - 1  # the last one may have no text
    assert_said_is_trained_on(build_dataset(lines, tokenizer), target.asked[:given])


@pytest.mark.parametrize(
    ("family", "said", "message"),
    [
        ("gptoss", HARMONY, {"reasoning_content": "hm", "content": "four"}),
        ("gptoss", HARMONY[:40], {"reasoning_content": "hm", "content": ""}),
        ("deepseek_v3", OPENED, {"reasoning_content": "hm", "content": "four"}),
        ("deepseek_v3", "hm", {"reasoning_content": "hm", "content": ""}),
        ("qwen3", THOUGHT, {"reasoning_content": "hm", "content": "four"}),
        ("qwen3", " four ", {"content": " four "}),
        ("kimi_k2_thinking", THOUGHT, {"reasoning_content": "hm", "content": "four"}),
        ("smollm2", THOUGHT, {"content": THOUGHT}),  # its template knows no thoughts
    ],
)
def test_thoughts_are_read_apart(tmp_path, family, said, message):
    tokenizer = family_tokenizer(family)
    lines, _ = regenerated(tmp_path, tokenizer, [tokens(tokenizer, said)])
    assert lines[0]["messages"][1] == {"role": "assistant", **message}


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("qwen2_5", '<tool_call>\n{"name": "look", "arguments": {"at": "four"}}\n</tool_call>'),
        ("qwen3", 'THOUGHT<tool_call>\n{"name": "look", "arguments": {"at": "four"}}\n</tool_call>'),
        ("mistral", '[TOOL_CALLS][{"name": "look", "arguments": {"at": "four"}, "id": "000000000"}]'),
        (
            "deepseek_v3",
            "OPENED<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n"
            '{"at": "four"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        ),
        (
            "kimi_k2",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
            '{"at": "four"}<|tool_call_end|><|tool_calls_section_end|>',
        ),
        (
            "gptoss",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.look "
            '<|constrain|>json<|message|>{"at": "four"}<|call|>',
        ),
    ],
)
def test_calls_end_their_records(tmp_path, family, said, caplog):
    """They are read as calls, their tokens are trained on, and nobody goes on without the tool's answer."""
    caplog.set_level(logging.INFO)
    tokenizer = family_tokenizer(family)
    said = said.replace("THOUGHT", "<think>\nhm\n</think>\n\n").replace("OPENED", "hm\n</think>\n\n")
    tools = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}]
    records = [{"messages": [user("look at four"), assistant("x"), user("and?")], "tools": tools}]
    lines, target = regenerated(tmp_path, tokenizer, [tokens(tokenizer, said)], records=records)
    (line,) = lines
    (call,) = line["messages"][-1]["tool_calls"]
    assert call["function"] == {"name": "look", "arguments": {"at": "four"}} and line["tools"] == tools
    assert "1 records end where the target calls a tool" in caplog.text
    rows = build_dataset(lines, tokenizer)
    assert_said_is_trained_on(rows, target.asked)
    without = build_dataset(
        lines + [{"messages": [user("a"), assistant("b")]}], tokenizer, options=MaskOptions(tool_calls=False)
    )
    assert sum(map(sum, without["loss_mask"])) < sum(map(sum, rows["loss_mask"]))


def test_thoughts_and_calls_of_said_tokens_can_be_left_out(tmp_path):
    for family, said in (("qwen3", THOUGHT), ("gptoss", HARMONY), ("deepseek_v3", OPENED)):
        tokenizer = family_tokenizer(family)
        lines, _ = regenerated(tmp_path, tokenizer, [tokens(tokenizer, said)])
        (row,) = build_dataset(lines, tokenizer, options=MaskOptions(thoughts=False))
        kept = [token for token, taken in zip(row["input_ids"], row["loss_mask"], strict=True) if taken]
        text = tokenizer.decode(kept)
        assert "hm" not in text and text.endswith("four" + tokenizer.eos_token)


def test_template_options_and_tools_are_those_of_training(tmp_path):
    tokenizer = family_tokenizer("qwen3")
    options = {"enable_thinking": False}
    lines, target = regenerated(tmp_path, tokenizer, [tokens(tokenizer, "four")], template_kwargs=options)
    assert tokenizer.decode(target.asked[0][0]).endswith("<think>\n\n</think>\n\n")
    assert_said_is_trained_on(build_dataset(lines, tokenizer, template_kwargs=options), target.asked)
    with pytest.raises(ValueError, match="Record 0 .*had 2\\d when it was answered; render with the same `chat_temp"):
        build_dataset(lines, tokenizer)


def test_records_that_are_not_what_was_said_are_refused(tmp_path):
    tokenizer = family_tokenizer("smollm2")
    lines, _ = regenerated(tmp_path, tokenizer, [tokens(tokenizer, "four"), tokens(tokenizer, "the answer")])
    (line,) = lines
    edited = [line["messages"][0], assistant("five"), *line["messages"][2:]]
    far = [[len(tokenizer) + 5], line["answer_token_ids"][1]]
    for change, message in (
        ({"messages": edited}, "answer 0 read 'four', but its text is 'five'; leave out the column"),
        ({"answer_token_ids": far}, "of answer 0 are no tokens of this target"),
        ({"answer_token_ids": line["answer_token_ids"][:1], "prompt_tokens": [3]}, "has 1 entries for 2 answers"),
        ({"prompt_tokens": None}, "`prompt_tokens` must hold, per answer"),
        ({"answer_token_ids": [["a"], None]}, "must hold a list of token ids, or null, per answer"),
        ({"answer_token_ids": "[1"}, "`answer_token_ids` is no JSON"),
        ({"answer_token_ids": 3}, "must be a list with one entry per answer"),
        (
            {"prompt_tokens": [1, line["prompt_tokens"][1]]},
            "its answer 0 is not rendered in the tokens that were generated",
        ),
    ):
        with pytest.raises(ValueError, match=f"Record 0.*{message}"):
            build_dataset([line | change], tokenizer)
    as_json = line | {name: json.dumps(line[name]) for name in ("answer_token_ids", "prompt_tokens")}
    assert build_dataset([as_json], tokenizer)[0] == build_dataset([line], tokenizer)[0]


def test_an_answer_without_ids_is_read_but_not_supervised(tmp_path):
    tokenizer = family_tokenizer("smollm2")
    (line,), target = regenerated(tmp_path, tokenizer, [tokens(tokenizer, "four"), tokens(tokenizer, "the answer")])
    line["answer_token_ids"][0] = line["prompt_tokens"][0] = None
    (row,) = build_dataset([line], tokenizer)
    prompt, answer = target.asked[1]
    assert row["input_ids"] == prompt + answer and row["loss_mask"] == [0] * len(prompt) + [1] * len(answer)


def test_texts_are_compared_where_there_are_no_tokens():
    """As of a server that tells none: white space at the ends aside, the template must write what was said."""
    for family, content, reason in (
        ("llama3", "\n four ", None),
        ("mistral", " four", None),
        ("qwen3", THOUGHT, None),
        ("deepseek_v3", OPENED, "of the answer .* the chat template makes"),
        ("gptoss", "analysishmassistantfinalfour", "the chat template makes '<.channel.>final"),
    ):
        encoder = ConversationEncoder(family_tokenizer(family))
        record = {"id": 0, "messages": [user("a"), assistant(content)]}
        found = refusal(encoder, record, Answer({"content": content}, "stop"))
        assert found is None if reason is None else re.search(reason, found), (family, found)


def test_all_refused_is_an_error_and_some_are_counted(tmp_path, caplog, monkeypatch):
    """A date in a prompt that changes between answer and check stands for every stage that renders otherwise."""
    tokenizer = tiny_tokenizer()
    answers = [tokens(tokenizer, "four"), tokens(tokenizer, "four")]
    records = [{"messages": [user("a")]}, {"messages": [user("b")]}]
    plain = ConversationEncoder.token_ids

    def other(self, messages, tools=None, **kwargs):
        ids = plain(self, messages, tools, **kwargs)
        return [ids[0] + 1, *ids[1:]] if messages[0]["content"] in others else ids

    monkeypatch.setattr(ConversationEncoder, "token_ids", other)
    others = {"b"}
    lines, _ = regenerated(tmp_path, tokenizer, answers, records=records)
    assert [line["id"] for line in lines] == [0]
    assert (
        "1 records are left out" in caplog.text
        and "record 1: its prompt is rendered to different tokens" in caplog.text
    )
    others = {"a", "b"}
    with pytest.raises(
        ValueError, match="None of the 2 answered records can be trained on exactly as answered. Record 0: "
    ):
        regenerated(tmp_path, tokenizer, answers, records=records)


def test_records_that_the_template_refuses_end_and_are_counted(tmp_path, caplog):
    """At any turn; the others are answered, and the next call begins where this one ended."""
    picky = family_tokenizer("gemma3")  # which wants user and assistant in turn
    refused, late = [user("a"), user("b")], [user("a"), assistant("x"), user("b"), user("c")]
    records = [{"messages": messages} for messages in ([user("a")], refused, late, [user("d")])]
    answers = [tokens(picky, "four")] * 3
    lines, target = regenerated(tmp_path, picky, answers, records=records)
    assert len(target.asked) == 3
    assert [(line["id"], len(line["finish_reason"])) for line in lines] == [(0, 1), (2, 1), (3, 1)]
    assert "2 records end early, since the chat template refuses them. First, record 1: " in caplog.text
    assert "Conversation roles must alternate" in caplog.text

    again = ScriptedTarget(picky, [])
    arguments = {"batch_size": 1, "max_new_tokens": 64, "progress": False}
    path = regenerate_answers(again, picky, records, tmp_path / "answers.jsonl", **arguments)
    assert again.asked == [] and [json.loads(line) for line in path.read_text().splitlines()] == lines


def test_a_template_that_refuses_everything_ends_the_run_before_the_first_answer(tmp_path):
    picky = family_tokenizer("gemma3")
    records = [{"messages": [user("a"), user("b")]}] * 12
    message = "The chat template of `target`'s tokenizer refuses record 0, as all of the first 10: .*must alternate"
    with pytest.raises(ValueError, match=message):
        regenerated(tmp_path, picky, [], records=records)
    assert not list(tmp_path.iterdir())


def test_an_empty_prompt_is_refused_with_its_record(tmp_path):
    empty = tiny_tokenizer("{% if messages[0].content != 'a' %}{{ messages[0].content }}{% endif %}")
    with pytest.raises(ValueError, match="refuses record 0: it makes an empty prompt"):
        regenerated(tmp_path, empty, [], records=[{"messages": [user("a")]}])
    assert not list(tmp_path.iterdir())


def test_a_template_that_never_ends_is_named_with_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    endless = tiny_tokenizer(CHATML + "{% if messages[0].content == 'for ever' %}" + loop + "{% endif %}")
    records = [{"messages": [user("for ever")]}]
    with pytest.raises(ValueError, match="Record 0 .*`target`'s tokenizer: rendering takes more than 0.1 seconds"):
        regenerated(tmp_path, endless, [], records=records)


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "f", "arguments": {"x": "\\ud800"}}',
        '{"name": "f", "arguments": ' + "[" * 5000 + "]" * 5000 + "}",
    ],
    ids=["half a character", "nested deeply"],
)
def test_a_call_that_no_file_takes_is_text(tmp_path, call):
    """The target may say anything; its answer is written all the same."""
    reader = AnswerReader(family_tokenizer("qwen3"))
    said = reader.tokenizer(f"<tool_call>\n{call}\n</tool_call>", add_special_tokens=False)["input_ids"]
    message = reader.message([], said)
    assert "tool_calls" not in message and "arguments" in message["content"]
    json.dumps(message, ensure_ascii=False).encode()
