"""The same chat gives the same prompt in every verb that renders: the table of verbs and what chats hold.

What is right is written here by hand, a chat of each kind in the words that its template takes, and rendered by
`apply_chat_template` alone.
"""

import json

import pytest
from chat_server import ChatServer
from regeneration_worker import tiny_chat_model
from template_families import family_tokenizer

from hf_eagle import EagleTrainingArguments
from hf_eagle.answers.regeneration import regenerate_answers
from hf_eagle.answers.served_answers import regenerate_through_server
from hf_eagle.answers.written_prompts import open_user_turn
from hf_eagle.arguments.groups import DataArguments
from hf_eagle.data.overlap import HeldOut
from hf_eagle.evaluation.prompt_batches import PromptBatch
from hf_eagle.evaluation.prompts import encode_prompt, load_prompts
from hf_eagle.training.parts import conversations


ANSWER = "the answer is four"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name."}},
            "required": ["city"],
        },
    },
}


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def called(arguments, **more):
    return [{"type": "function", "function": {"name": "weather", "arguments": arguments}, **more}]


# ---- what records hold: the form -> its record, without the answer ----

ASKED, CALLED = said("user", "Weather?"), said("assistant", None, tool_calls=called({"city": "Oslo"}))
AS_TEXT = said("assistant", None, tool_calls=called('{"city": "Oslo"}'))
RECORDS = {
    "plain": {"messages": [said("user", "hello")]},
    "role names": {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "hello"},
            {"from": "gpt", "value": "there"},
            {"from": "human", "value": "and two?"},
        ]
    },
    "parts": {
        "messages": [said("user", [{"type": "text", "text": "Name a tree."}, {"type": "text", "text": "Or two."}])]
    },
    "thoughts": {"messages": [ASKED, said("assistant", "Rain.", reasoning="so it rains"), said("user", "and two?")]},
    "calls as objects": {"messages": [ASKED, CALLED, said("tool", "rain")], "tools": [TOOL]},
    "calls as text": {"messages": [ASKED, AS_TEXT, said("tool", "rain")], "tools": [TOOL]},
    "tools": {"messages": [ASKED], "tools": [TOOL]},
    "tools as text": {"messages": [ASKED], "tools": json.dumps([TOOL])},
}
CALLS = ("calls as objects", "calls as text")
# family -> a template option that it knows
OPTIONS = {
    "qwen3": {"enable_thinking": False},
    "llama3_1": {"date_string": "1 May 2031"},
    "gptoss": {"reasoning_effort": "high"},
    "qwen2_5": {"tools": [TOOL]},  # on offer in every chat
    "mistral": {"tools": [TOOL]},
    "smollm2": {},
    "deepseek_v3": {},
    "kimi_k2": {},
}
FAMILIES = tuple(OPTIONS)


# ---- what is right, by hand ----


def wanted(family: str, form: str) -> list[dict]:
    """The chat in the words that the family's template takes."""
    if form == "role names":
        return [
            said("system", "Be brief."),
            said("user", "hello"),
            said("assistant", "there"),
            said("user", "and two?"),
        ]
    if form == "parts":
        return [said("user", "Name a tree.\nOr two.")]
    if form == "thoughts":
        thoughts = {name: "so it rains" for name in ("reasoning_content", "thinking")}
        return [ASKED, said("assistant", "Rain.", **thoughts), said("user", "and two?")]
    if form not in CALLS:
        return RECORDS[form]["messages"]
    if family == "smollm2":  # its template writes no calls
        call = {"name": "weather", "arguments": {"city": "Oslo"}}
        return [ASKED, said("assistant", json.dumps(call)), said("tool", "rain")]
    arguments = '{"city": "Oslo"}' if family == "deepseek_v3" else {"city": "Oslo"}
    named = {"id": "000000000"} if family == "mistral" else {}
    answered = {"tool_call_id": "000000000"} if family == "mistral" else {}
    return [ASKED, said("assistant", "", tool_calls=called(arguments, **named)), said("tool", "rain", **answered)]


def rendered(tokenizer, messages, tools, options) -> list[int]:
    given = {"tools": tools, "add_generation_prompt": messages[-1]["role"] != "assistant", **options}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **given)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def right(family, tokenizer, options, first_turn: bool = False, answer: str | None = None) -> list[list[int]]:
    """Ids of every form: up to where the answer begins, or the first answer, or with an answer."""
    found = []
    for form, record in RECORDS.items():
        messages, tools = wanted(family, form), record.get("tools") and [TOOL]
        if first_turn:
            first = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
            messages = messages[: first[0]] if first else messages
        if answer is not None:
            messages = [*messages, said("assistant", answer)]
        found.append(rendered(tokenizer, messages, tools, options))
    return found


# ---- verbs: the file of records -> prompt ids of each ----


def evaluate(tokenizer, path, options, tmp_path):
    return [
        ids
        for prompt in load_prompts(path)
        for ids in PromptBatch.of([prompt], tokenizer, template_kwargs=options).token_ids
    ]


def benchmark_serving(tokenizer, path, options, tmp_path):
    return [encode_prompt(prompt, tokenizer, options) for prompt in load_prompts(path)]


def train(tokenizer, path, options, tmp_path):
    """Also preview and cache: the rows of the same records with an answer."""
    answered = []
    for record in map(json.loads, path.read_text().splitlines()):
        column, turn = ("conversations", {"from": "gpt", "value": ANSWER}), said("assistant", ANSWER)
        if "messages" in record:
            column = ("messages", turn)
        answered.append(record | {column[0]: [*record[column[0]], column[1]]})
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(record) + "\n" for record in answered))
    data = DataArguments(train_data=[str(chats)], max_length=100_000, **written(options, tmp_path))
    args = EagleTrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True)
    return [row["input_ids"] for row in conversations(tokenizer, data, args)[0]]


def written(options, tmp_path) -> dict[str, str]:
    """Template options as they are given on a command line."""
    found = {"chat_template_kwargs": json.dumps({k: v for k, v in options.items() if k != "tools"})}
    if "tools" in options:
        (tmp_path / "tools.json").write_text(json.dumps(options["tools"]))
        found["tools"] = str(tmp_path / "tools.json")
    return found


def regenerate(tokenizer, path, options, tmp_path):
    """In process: what the model is given."""
    model, seen = tiny_chat_model(tokenizer, max_position_embeddings=4096), []
    generate = model.generate

    def recording(input_ids, attention_mask, **more):
        seen.extend(ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True))
        return generate(input_ids=input_ids, attention_mask=attention_mask, **more)

    model.generate = recording
    records = [json.loads(line) for line in path.read_text().splitlines()]
    how = {"max_new_tokens": 1, "progress": False, "template_kwargs": options}
    regenerate_answers(model, tokenizer, first_turns(records), tmp_path / "answers.jsonl", **how)
    return seen


def ask_server(tokenizer, path, options, tmp_path):
    """What a server makes of the requests: it hands the fields of each to the template, arguments as objects."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    with ChatServer() as server:
        how = {"max_new_tokens": 1, "progress": False, "concurrency": 1, "template_kwargs": options}
        regenerate_through_server(
            first_turns(records), tmp_path / "served.jsonl", server_url=server.url, target="target", **how
        )
    asked = [body for body in server.chats if body["messages"] != [said("user", "Hi")]]
    return [
        rendered(tokenizer, body["messages"], body.get("tools"), body.get("chat_template_kwargs") or {})
        for body in asked
    ]


def first_turns(records) -> list[dict]:
    """Only the first user's turn is answered: what follows would stand behind answers of the model's own."""
    found = []
    for record in records:
        column = next(name for name in ("messages", "conversations") if name in record)
        said_by = [turn.get("role") or turn.get("from") for turn in record[column]]
        end = 1 + min(n for n, role in enumerate(said_by) if role in ("user", "human"))
        found.append(record | {column: record[column][:end]})
    return found


PROMPTS = {"evaluate": evaluate, "benchmark-serving": benchmark_serving}
ANSWERS = {"regenerate": regenerate, "regenerate through a server": ask_server}


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS.values()))
    return path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("verb", PROMPTS)
def test_prompts_of_files(verb, family, records, tmp_path):
    tokenizer = family_tokenizer(family)
    for options in ({}, OPTIONS[family]):
        found = PROMPTS[verb](tokenizer, records, options, tmp_path)
        assert dict(zip(RECORDS, found, strict=True)) == dict(
            zip(RECORDS, right(family, tokenizer, options), strict=True)
        )


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_training_are_the_same_chats_with_an_answer(family, records, tmp_path):
    """They begin with the prompt, where the template itself writes an answered question as it asks it."""
    tokenizer = family_tokenizer(family)
    for options in ({}, OPTIONS[family]):
        rows = train(tokenizer, records, options, tmp_path)
        prompts = right(family, tokenizer, options)
        assert rows == right(family, tokenizer, options, answer=ANSWER)
        begun = {form: row[: len(p)] == p for form, row, p in zip(RECORDS, rows, prompts, strict=True)}
        # Mistral's puts what the system says before the last question; DeepSeek's opens a thought in prompts alone
        assert all(begun.values()) or family in ("mistral", "deepseek_v3"), begun


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("verb", ANSWERS)
def test_prompts_that_the_target_answers(verb, family, records, tmp_path):
    tokenizer = family_tokenizer(family)
    for number, options in enumerate(({}, OPTIONS[family])):
        (tmp_path / str(number)).mkdir()
        found = ANSWERS[verb](tokenizer, records, options, tmp_path / str(number))
        expected = right(family, tokenizer, options, first_turn=True)
        assert sorted(found) == sorted(expected)  # they are answered in the order of their lengths


@pytest.mark.parametrize("family", FAMILIES)
def test_a_user_turn_that_the_target_writes_itself(family):
    """It is opened by the text in front of what users say elsewhere, options included."""
    tokenizer = family_tokenizer(family)
    for options in ({}, OPTIONS[family]):
        opening, _ = open_user_turn(tokenizer, template_kwargs=options)
        prompt = tokenizer.decode(rendered(tokenizer, [said("user", "hello")], None, options))
        assert prompt.startswith(opening + "hello")


def test_options_change_what_is_rendered():
    """Else the table above would prove nothing of them."""
    for family, options in OPTIONS.items():
        tokenizer = family_tokenizer(family)
        different = right(family, tokenizer, options) != right(family, tokenizer, {})
        assert different == bool(options), family


def test_held_out_prompts_are_found_by_what_they_ask(records):
    """Whatever form the prompt has, its text is looked for."""
    held_out = HeldOut([text for prompt in load_prompts(records) for text in prompt.asked])
    last = ["hello", "and two?", "Name a tree.\nOr two.", "and two?", "rain", "rain", "Weather?", "Weather?"]
    for number, text in enumerate(last):
        assert number in held_out.found_in([text])
    assert not held_out.found_in(["something else"])
