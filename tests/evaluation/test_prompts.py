"""Prompt files of every form, and one clear sentence for every file that is not one."""

import gzip
import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hf_eagle.evaluation.prompts import Prompt, encode_prompt, load_prompts


TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} end {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def user(content):
    return [{"role": "user", "content": content}]


def test_mt_bench_has_category_id_and_a_turn_to_follow_up_with(tmp_path):
    records = [
        {"question_id": 81, "category": "writing", "turns": ["Compose a post.", "Rewrite it."]},
        {"question_id": 101, "category": "reasoning", "turns": ["Who is first?"], "reference": ["You"]},
    ]
    assert load_prompts(write(tmp_path / "question.jsonl", records)) == [
        Prompt(user("Compose a post."), "writing", 81, ("Rewrite it.",)),
        Prompt(user("Who is first?"), "reasoning", 101),
    ]


def test_a_follow_up_stands_behind_the_answer():
    prompt = Prompt(user("one"), "c", 1, ("two", "three")).answered("first").answered("second")
    said = [message["content"] for message in prompt.messages]
    assert said == ["one", "first", "two", "second", "three"] and prompt.follow_ups == ()
    assert [m["role"] for m in prompt.messages] == ["user", "assistant"] * 2 + ["user"]


def test_share_gpt_is_read_like_messages(tmp_path):
    turns = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]
    path = write(tmp_path / "share.json", [{"id": "x", "conversations": turns + [{"from": "human", "value": "three"}]}])
    dialogue = [*user("one"), {"role": "assistant", "content": "two"}, *user("three")]
    assert load_prompts(path) == [Prompt(dialogue, None, "x")]
    write(path, [{"conversations": [{"from": "dog", "value": "one"}]}])
    with pytest.raises(ValueError, match="Record 0 of the prompt file .* cannot be read: .*unknown role 'dog'"):
        load_prompts(path)


def test_messages_end_before_the_answer(tmp_path):
    dialogue = [
        {"role": "system", "content": "Be brief."},
        *user("one"),
        {"role": "assistant", "content": "two"},
        *user("three"),
    ]
    answered = [*dialogue, {"role": "assistant", "content": "four"}]
    prompts = load_prompts(write(tmp_path / "chat.jsonl", [{"messages": dialogue}, {"messages": answered, "id": "b"}]))
    assert prompts == [Prompt(dialogue, None, 0), Prompt(dialogue, None, "b")]


def test_human_eval_plain_and_compressed(tmp_path):
    records = [{"task_id": f"HumanEval/{i}", "prompt": f"def f{i}():\n", "entry_point": "f"} for i in range(3)]
    plain = write(tmp_path / "HumanEval.jsonl", records)
    packed = tmp_path / "HumanEval.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert load_prompts(packed) == load_prompts(plain)
    assert load_prompts(packed, limit=2) == [
        Prompt(user("def f0():\n"), None, "HumanEval/0"),
        Prompt(user("def f1():\n"), None, "HumanEval/1"),
    ]


def test_json_list_prompt_as_messages_and_separators_inside_strings(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt": user("one")}, {"prompt": "two\u2028three"}], ensure_ascii=False))
    assert load_prompts(path) == [Prompt(user("one"), None, 0), Prompt(user("two\u2028three"), None, 1)]
    one_a_line = tmp_path / "lines.json"
    one_a_line.write_text('{"prompt": "one"}\n\n{"prompt": "two\u2028three"}\n', encoding="utf-8")
    assert [prompt.messages for prompt in load_prompts(one_a_line)] == [user("one"), user("two\u2028three")]


def test_plain_text_is_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffWhat is an eagle?\r\n\n  Wie geht es? \n".encode())
    assert load_prompts(path) == [Prompt(user("What is an eagle?"), None, 0), Prompt(user("Wie geht es?"), None, 1)]


BAD = [
    (
        "a.jsonl",
        b'{"prompt": "x"}\n{oops\n',
        r"A prompt file cannot be read: Line 2 of .*a\.jsonl is not JSON: Expecting",
    ),
    ("a.json", b'[{"prompt": "x"},', r"A prompt file cannot be read: .*a\.json is not JSON: "),
    ("a.jsonl", b"\n \n", r"The prompt file '.*a\.jsonl' holds no prompt\."),
    ("a.txt", b"", r"The prompt file '.*a\.txt' holds no prompt\."),
    ("a.csv", b"prompt\nx\n", r"`path` is '.*a\.csv'; a prompt file ends in \.jsonl, \.json or \.txt"),
    ("a.jsonl.gz", b"not gzip", r"A prompt file cannot be read: .*a\.jsonl\.gz cannot be read: Not a gzipped file"),
    ("a.txt", b"\xff\xfe\x00", r"cannot be read as UTF-8 text: "),
    ("a.jsonl", b'"x"\n', r"A prompt file cannot be read: Line 1 of .*a\.jsonl must be an object .*, got str\."),
    ("a.jsonl", b'{"prompt": "x"}\nnull\n', r"A prompt file cannot be read: Line 2 of .*, got null\."),
    ("a.jsonl", b'{"prompt": "x"}\n{"text": "x", "id": 1}\n', r"Record 1 .* has the keys \['id', 'text'\], none"),
    ("a.jsonl", b'{"turns": []}\n', r"Record 0 .* has no readable prompt"),
    ("a.jsonl", b'{"turns": "x"}\n', r"Record 0 .* has no readable prompt"),
    ("a.jsonl", b'{"turns": ["x", " "]}\n', r"Record 0 .* has no readable prompt"),
    ("a.jsonl", b'{"prompt": " "}\n', r"Record 0 .* has no readable prompt"),
    ("a.jsonl", b'{"messages": [{"from": "dog", "value": "x"}]}\n', r"Record 0 .* the unknown role 'dog'"),
    ("a.jsonl", b'{"messages": []}\n', r"Record 0 .* cannot be read: the conversation is empty"),
    ("a.jsonl", b'{"messages": [{"role": "assistant", "content": "x"}]}\n', r"no message asks for an answer"),
]


@pytest.mark.parametrize("name, content, message", BAD, ids=range(len(BAD)))
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / name)


def test_missing_file_and_bad_limit(tmp_path):
    with pytest.raises(ValueError, match=r"The prompt file '.*none\.jsonl' does not exist\."):
        load_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="`limit` must be at least 1, but is 0"):
        load_prompts(tmp_path / "none.jsonl", limit=0)


def make_tokenizer(template):
    words = ["[UNK]", "user", "assistant", "end", "hello", "<s>"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", chat_template=template)


def test_rendered_by_the_chat_template_up_to_the_answer():
    assert encode_prompt(Prompt(user("hello"), None, 0), make_tokenizer(TEMPLATE)) == [1, 4, 3, 2]


def test_tokenizer_without_template_and_template_that_refuses():
    prompt = Prompt([{"role": "system", "content": "hello"}, *user("hello")], None, 7)
    with pytest.raises(ValueError, match="`tokenizer` has no chat template"):
        encode_prompt(prompt, make_tokenizer(None))
    refusing = make_tokenizer("{{ raise_exception('no system message, please') }}")
    with pytest.raises(ValueError, match="refuses prompt 7: no system message, please"):
        encode_prompt(prompt, refusing)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".json.gz"])
def test_a_file_is_read_to_the_limit(tmp_path, suffix):
    """Whatever stands behind the last prompt that is asked for does not matter: here it is no text, and cut."""
    texts = [f"How many trees has forest {number}?" for number in range(100_000)]
    content = {
        ".txt": "\n".join(texts),
        ".jsonl": "\n".join(json.dumps({"prompt": text}) for text in texts),
        ".json": json.dumps([{"prompt": text} for text in texts]),
    }[suffix.removesuffix(".gz")].encode() + b"\xff"
    path = tmp_path / f"prompts{suffix}"
    path.write_bytes(gzip.compress(content, 1)[:-100] if suffix.endswith(".gz") else content)

    assert [prompt.asked for prompt in load_prompts(path, limit=3)] == [[text] for text in texts[:3]]
    with pytest.raises(ValueError, match="cannot be read"):
        load_prompts(path)
