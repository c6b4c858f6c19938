"""What the previews show is the text, whole and in order, with its mask."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_blocks import options_of
from tiny_files import write_chats, write_tiny_target
from tiny_tokenizer import CHATML, assistant, encode_conversation, tiny_tokenizer, user
from transformers import AutoConfig, AutoTokenizer
from warm_python import warm_python

from hf_eagle.data.preview import to_html, to_terminal, token_texts
from hf_eagle.drafts.dflash.configuration import config_for
from hf_eagle.drafts.dflash.modeling import DFlashDraftModel
from hf_eagle.drafts.kinds import kind_of_method, method_names


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


@pytest.fixture
def previewed(tmp_path, monkeypatch, capsys, caplog):
    """A tiny target with chats, and what the script prints and logs of them with some arguments."""
    write_tiny_target(tmp_path / "target")
    write_chats(tmp_path / "chats.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import preview_data

    def show(*words):
        command = ["preview_data.py", "--target", "target", "--train_data", "chats.jsonl", "--num_previews", "0"]
        monkeypatch.setattr("sys.argv", [*command, *words])
        caplog.clear()
        with caplog.at_level("INFO"):
            preview_data.main()
        return capsys.readouterr().out, caplog.text

    return show


@pytest.mark.parametrize("method", method_names())
def test_only_drafts_with_a_vocabulary_of_their_own_are_shown_its_sizes(method, previewed, tmp_path):
    printed, logged = previewed("--method", method, "--output_json", "data.json")
    own = "draft_vocab_size" not in kind_of_method(method).meaningless
    assert ("a draft vocabulary of" in printed) == ("tokens holds" in printed) == own
    assert ("coverage" in json.loads((tmp_path / "data.json").read_text())) == own
    assert " different tokens are supervised" in printed and "Training will stop here" not in printed
    assert ("The mask token of its blocks is" in logged) == (method == "dflash")


def test_a_mask_token_is_looked_for_as_training_does(previewed, tmp_path):
    """In the data to train on and in held-out data, asked for or kept from the draft to start from."""
    tokenizer = AutoTokenizer.from_pretrained("target")
    seen, held_out = (tokenizer.encode(text, add_special_tokens=False)[0] for text in ("red", "Z"))
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "green Z blue"}]
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"messages": turns}))
    refused = "\nTraining will stop here: `mask_token_id` is {}, but the data hold that token, "

    assert refused.format(seen) in previewed("--method", "dflash", "--mask_token_id", str(seen))[0]
    words = ["--method", "dflash", "--mask_token_id", str(held_out)]
    assert "Training will stop here" not in previewed(*words)[0]
    assert refused.format(held_out) in previewed(*words, "--eval_data", "held_out.jsonl")[0]

    options = options_of(mask_token_id=seen, block_size=8)
    config = config_for(AutoConfig.from_pretrained("target"), options)
    DFlashDraftModel(config).save_pretrained("draft")
    printed, _ = previewed("--method", "dflash", "--init_from", "draft")
    assert refused.format(seen) in printed and "leave out the records that hold it" in printed
    outside = previewed("--method", "dflash", "--mask_token_id", "5000")[0]
    assert "\nTraining will stop here: `mask_token_id` must be a row of the target's table" in outside


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
