"""What the previews show is the text, whole and in order, with its mask."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_files import write_tiny_target
from tiny_tokenizer import CHATML, assistant, encode_conversation, tiny_tokenizer, user
from warm_python import warm_python

from hf_eagle.data.preview import to_html, to_terminal, token_texts


ROOT = Path(__file__).resolve().parents[2]
CHAT = [user("<b>é 😀</b> & the cat\n\n"), assistant("😀é\n<script>x</script>")]


@pytest.fixture(scope="module")
def encoded():
    tokenizer = tiny_tokenizer(CHATML)
    return tokenizer, encode_conversation(CHAT, tokenizer)


def test_pieces_are_the_text(encoded):
    tokenizer, row = encoded
    pieces = token_texts(tokenizer, **{"ids": row["input_ids"], "mask": row["loss_mask"]})
    assert "".join(text for text, *_ in pieces) == tokenizer.decode(row["input_ids"])
    assert "".join(text for text, supervised, _ in pieces if supervised) == f"{CHAT[1]['content']}<|im_end|>"
    assert [token for *_, ids in pieces for token in ids] == row["input_ids"]


def test_terminal(encoded):
    tokenizer, row = encoded
    shown = to_terminal(tokenizer, row["input_ids"], row["loss_mask"])
    assert re.sub(r"\x1b\[[\d;]*m", "", shown) == tokenizer.decode(row["input_ids"])
    green = "".join(re.findall(r"\x1b\[30;\d+m(.*?)\x1b\[0m", shown))
    assert green == f"{CHAT[1]['content']}<|im_end|>".replace("\n", "")
    assert len(to_terminal(tokenizer, row["input_ids"] * 500, row["loss_mask"] * 500)) < 60_000


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.texts, self.kind, self.tags = {"s": "", "u": ""}, None, set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.kind = dict(attributes)["class"] if tag == "span" else None

    def handle_endtag(self, tag):
        self.kind = None

    def handle_data(self, data):
        if self.kind:
            self.texts[self.kind] += data


def test_page_is_escaped_and_whole(encoded):
    tokenizer, row = encoded
    page = Page()
    page.feed(to_html(tokenizer, [row], "a <b> title"))
    assert page.texts["s"] == f"{CHAT[1]['content']}<|im_end|>"
    assert page.texts["u"].startswith("<|im_start|>user\n<b>é 😀</b> & the cat\n\n<|im_end|>")
    assert not {"script", "b"} & page.tags and "http" not in to_html(tokenizer, [row], "t")


def test_script(tmp_path):
    write_tiny_target(tmp_path / "target")
    chats = [{"prompt": "who are you", "completion": f"the cat {n % 3}"} for n in range(9)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (tmp_path / "prompts.txt").write_text("Who are you?\nwhat is two and two?\n")

    def run(*args):
        command = [ROOT / "scripts/preview_data.py", "--target", "target", "--train_data", "chats.jsonl"]
        return warm_python().run(*command, *args, cwd=tmp_path)

    done = run("--html", "masks.html", "--output_json", "data.json", "--overlap_prompts", "prompts.txt")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "data.json").read_text())
    assert (found["conversations"], found["duplicates"]) == (9, 6)
    assert found["overlap"]["prompts.txt"] == {"prompts": 2, "prompts_found": 1, "conversations_found": 9}
    assert list(found["coverage"].values()) == [1.0]
    assert "9 conversations, " in done.stdout and "6 conversations repeat an earlier one" in done.stdout
    assert done.stdout.count("=== conversation") == 3 and "\x1b[30;42m" in done.stdout
    assert (tmp_path / "masks.html").read_text().count("<h2>") == 9
    assert "Training will stop here" not in done.stdout

    # as training says it
    done = run("--num_previews", "0", "--draft_vocab_size", "40")
    assert "\nTraining will stop here: `draft_vocab_size` is 40 but the supervised tokens hold only " in done.stdout
    done = run("--num_previews", "0", "--draft_vocab_size", "40", "--fill_vocabulary")
    assert "Training will stop here" not in done.stdout

    # as the installed command runs it
    done = warm_python().run(
        "-m", "hf_eagle", "preview", "--target", "target", "--train_data", "chats.jsonl", cwd=tmp_path
    )
    assert done.returncode == 0 and "9 conversations, " in done.stdout, done.stderr


def test_what_cannot_be_shown_is_refused_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import preview_data

    command = ["preview_data.py", "--target", "nowhere", "--train_data", "chats.jsonl"]
    (tmp_path / "chats.jsonl").write_text("{}")
    monkeypatch.setattr("sys.argv", [*command, "--html", "nowhere/at/masks.html"])
    with pytest.raises(ValueError, match="`html` nowhere/at/masks.html: there is no folder .*nowhere: make it first,"):
        preview_data.main()
    monkeypatch.setattr("sys.argv", [*command, "--streaming"])
    with pytest.raises(ValueError, match="`streaming` never has all data at once"):
        preview_data.main()
