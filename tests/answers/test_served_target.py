"""Is it the target that a server serves, and does it make the target's prompts?"""

import pytest
from chat_server import ChatServer
from tiny_tokenizer import CHATML, LLAMA3, tiny_tokenizer, user

from hf_eagle.answers.chat_client import ChatClient, ServerError
from hf_eagle.answers.served_target import ServedTarget


FIELDS = {"max_tokens": 12, "temperature": 0.0}
TURNS = [[[user(f"question {n}")], [user("and?")]][: 1 + n % 2] for n in range(9)]


def find(server, target="target", server_model=None, **fields):
    return ServedTarget.find(ChatClient(server.url, retries=0), target, server_model, FIELDS | fields)


def ids(tokenizer, messages):
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_the_target_is_found_by_its_name_or_its_folder(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with ChatServer(model="short", root=str(tmp_path / "folder")) as server:
        for target in ("short", str(tmp_path / "folder"), "folder", "./folder/"):
            assert find(server, target).model == "short"
        with pytest.raises(ServerError, match=r"serves short \(.*folder\), not `target` other/model; start it with"):
            find(server, "other/model")
        assert find(server, "other/model", server_model="short").model == "short"
        with pytest.raises(ServerError, match="not `server_model` long;"):
            find(server, server_model="long")
        with pytest.raises(ServerError, match="`max_new_tokens` is 512, but the server .* 512 tokens altogether"):
            find(server, "short", max_tokens=512)


def test_fields_that_the_server_does_not_know_are_left_out(caplog):
    def strict(number, body):
        return (400, "Unrecognized request argument supplied: top_k") if "top_k" in body else None

    with ChatServer() as server:
        assert find(server).body([user("x")], 5) == {
            "model": "target",
            "messages": [user("x")],
            "seed": 5,
            "top_k": -1,
            "repetition_penalty": 1.0,
            "return_token_ids": True,
            **FIELDS,
        }
    with ChatServer(fault=strict) as server:
        assert find(server).body([user("x")]) == {"model": "target", "messages": [user("x")], **FIELDS}
    assert "Asked without top_k, repetition_penalty, return_token_ids, since the server at" in caplog.text
    with ChatServer(fault=lambda *_: (400, "no template")) as server:
        with pytest.raises(ServerError, match="A chat of one word cannot be answered: .*no template"):
            find(server)


@pytest.mark.parametrize("tells", ["prompt_ids", "count"])
def test_prompts_are_compared(tells):
    """Token by token where the server tells them, by their number otherwise; also behind an answer."""
    ours, other = tiny_tokenizer(CHATML), tiny_tokenizer(LLAMA3)
    asked = []

    def server_of(tokenizer):
        def tell(messages):
            asked.append(len(messages))
            found = ids(tokenizer, messages)
            return found if tells == "prompt_ids" else len(found)

        return ChatServer(**{tells: tell})

    with server_of(ours) as server:
        find(server).check_prompts(ours, TURNS)
    assert asked.count(1) >= 1 and asked.count(3) >= 1
    message = "at token 0 it reads '.*start_header" if tells == "prompt_ids" else r"it has \d+ tokens, not the \d+ of"
    with server_of(other) as server:
        with pytest.raises(ServerError, match=f"makes another prompt of a chat than `target`'s .*{message}"):
            find(server).check_prompts(ours, TURNS)


def test_prompts_with_images_are_not_compared():
    with ChatServer(prompt_ids=lambda messages: [0]) as server:
        find(server).check_prompts(tiny_tokenizer(CHATML), [[[user([{"type": "image_url"}])]]])
