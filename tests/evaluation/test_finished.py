"""A measurement that is interrupted anywhere ends as one that was not."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chain_models import VOCAB, make_draft, make_target
from tiny_tokenizer import word_tokenizer

from hf_eagle.door.journal import Journal
from hf_eagle.evaluation import acceptance
from hf_eagle.evaluation.acceptance import DecodingSettings, decode_prompts, sweep_speculative_tokens
from hf_eagle.evaluation.finished import Finished, draft_fingerprint
from hf_eagle.evaluation.prompt_batches import PromptBatch, check_rendering
from hf_eagle.evaluation.prompts import Prompt
from hf_eagle.evaluation.summary import summarize


SCRIPT = str(Path(__file__).parents[2] / "scripts" / "evaluate_draft.py")
PROMPTS = [
    Prompt([{"role": "user", "content": f"w{10 + n} w{30 - n}"}], "abc"[n % 3], n, ("w20 w21",) * (n % 2))
    for n in range(5)
]
TREE = {"method": "tree", "depth": 3, "top_k": 3, "total_tokens": 9}
WAYS = {
    "greedy": {},
    "in batches": {"batch_size": 2},
    "two turns": {"turns": 2, "batch_size": 2},
    "drawn": {"temperature": 1.0, "seed": 3},
    "a drawn tree of two turns": {**TREE, "temperature": 1.0, "turns": 2, "batch_size": 3},
}


def with_first_rows(path: Path, number: int, torn: bytes = b"") -> Path:
    """The journal as a kill leaves it behind so many batches."""
    lines = path.read_bytes().splitlines(keepends=True)
    left = path.with_name(f"{path.name}-{number}")
    left.write_bytes(b"".join(lines[: 1 + number]) + torn)
    return left


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_behind_any_batch_it_ends_as_without(pair, tokenizer, tmp_path, monkeypatch, way):
    settings = DecodingSettings(max_new_tokens=8, **WAYS[way])

    def decoded(journal):
        return decode_prompts(*pair, tokenizer, PROMPTS, settings, progress=False, finished=Finished(journal))

    with Journal(tmp_path / "journal", {}) as journal:
        whole = decoded(journal)
    alone = decode_prompts(*pair, tokenizer, PROMPTS, settings, progress=False)
    assert whole.runs == alone.runs and len(journal.rows) > 1

    calls = []
    generate = acceptance.speculative_generate
    monkeypatch.setattr(acceptance, "speculative_generate", lambda *a, **k: calls.append(1) or generate(*a, **k))
    for number in range(1 + len(journal.rows)):
        del calls[:]
        with Journal(with_first_rows(tmp_path / "journal", number, b'{"part": "ma'), {}) as again:
            found = decoded(again)
        assert found.runs == whole.runs and found.rounds == whole.rounds
        missing = len(journal.rows) - number
        assert len(calls) == missing + (missing > 0)  # and a first one that no clock sees, unless nothing is missing
        # what is summed: every batch's seconds, in the run that decoded it
        assert again.rows[:number] == journal.rows[:number] and len(again.rows) == len(journal.rows)
        taken = [row["decoded"] for row in again.rows]
        assert found.seconds == sum(one["variants"][0]["seconds"] for one in taken)
        assert found.target_only_seconds == sum(one["alone"]["seconds"] for one in taken)
    names = [name for name in summarize(whole) if "second" not in name]
    assert {name: summarize(found)[name] for name in names} == {name: summarize(whole)[name] for name in names}
    assert summarize(found) == summarize(whole)  # nothing was decoded: the same seconds, too


def test_a_sweep_goes_on_behind_the_measurement(pair, tokenizer, tmp_path):
    """Both keep their batches in one journal."""
    settings = DecodingSettings(max_new_tokens=8, batch_size=2)

    def measured(path):
        with Journal(path, {}) as journal:
            main = decode_prompts(*pair, tokenizer, PROMPTS, settings, progress=False, finished=Finished(journal))
            how = {"progress": False, "finished": Finished(journal, "sweep")}
            return (
                summarize(main),
                sweep_speculative_tokens(*pair, tokenizer, PROMPTS, [1, 3], settings, **how),
                journal,
            )

    result, sweep, journal = measured(tmp_path / "journal")
    assert len(journal.rows) == 6
    for number in range(7):
        again = measured(with_first_rows(tmp_path / "journal", number))
        for found, whole in [(again[0], result), *zip(again[1], sweep, strict=True)]:
            counts = [name for name in whole if "second" not in name]
            assert [found[name] for name in counts] == [whole[name] for name in counts]
    assert again[:2] == (result, sweep)


def test_what_later_turns_make_is_refused_before_a_token_is_decoded(pair, tokenizer, monkeypatch):
    tokenizer = word_tokenizer(VOCAB, 9)
    tokenizer.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + tokenizer.chat_template
    )
    monkeypatch.setattr(acceptance, "speculative_generate", lambda *_, **__: pytest.fail("tokens were decoded"))
    assert check_rendering(PROMPTS, tokenizer)
    for refused in (
        lambda: check_rendering(PROMPTS, tokenizer, turns=2),
        lambda: decode_prompts(*pair, tokenizer, PROMPTS, DecodingSettings(turns=2), progress=False),
    ):
        with pytest.raises(ValueError, match="refuses prompt 1: one turn only"):
            refused()


@pytest.mark.parametrize(
    "other",
    [
        lambda p: replace(p, messages=[{"role": "user", "content": "w11"}]),
        lambda p: replace(p, category="z"),
        lambda p: replace(p, id="z"),
        lambda p: replace(p, follow_ups=("w22",)),
        lambda p: replace(p, tools=[{"type": "function"}]),
    ],
)
def test_prompts_are_known_by_all_that_they_hold(tokenizer, other):
    digest = check_rendering(PROMPTS, tokenizer)
    assert digest == check_rendering(list(PROMPTS), tokenizer)
    assert digest != check_rendering([*PROMPTS[:-1], other(PROMPTS[-1])], tokenizer)
    assert digest != check_rendering(PROMPTS[:-1], tokenizer) and digest != check_rendering(PROMPTS[::-1], tokenizer)


def test_a_draft_is_known_by_its_weights_and_not_by_what_it_is_lent(pair):
    target, draft = pair
    known = draft_fingerprint(draft)
    embeddings = draft.embed_tokens.weight.data
    draft.embed_tokens.weight.data = torch.zeros_like(embeddings)
    assert draft_fingerprint(draft) == known
    draft.embed_tokens.weight.data = embeddings
    for weight in (p for name, p in draft.named_parameters() if name not in draft.lent_tensors):
        with torch.no_grad():
            weight.view(-1)[-1] += 1
            assert draft_fingerprint(draft) != known
            weight.view(-1)[-1] -= 1
    other = make_draft(target, draft_vocab_size=40, tap_ids=[0, 1, 3])
    assert draft_fingerprint(other) != known


class TestScript:
    @pytest.fixture
    def folder(self, tmp_path, pair, tokenizer, monkeypatch):
        pair[0].model.save_pretrained(tmp_path / "target")
        tokenizer.save_pretrained(tmp_path / "target")
        pair[1].save_pretrained(tmp_path / "draft")
        (tmp_path / "prompts.jsonl").write_text(
            "".join(json.dumps({"messages": p.messages, "category": p.category, "id": p.id}) + "\n" for p in PROMPTS)
        )
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def run(self, monkeypatch, output: str, **changes):
        given = {"target": "target", "draft": "draft", "prompts": "prompts.jsonl", "output_json": output}
        given |= {"device": "cpu", "max_new_tokens": 8, "sweep_tokens": "1..2", "output_tokens": output + ".tokens"}
        options = [f"--{name}={value}" for name, value in (given | changes).items() if value is not None]
        monkeypatch.setattr(sys, "argv", [SCRIPT, *options])
        runpy.run_path(SCRIPT, run_name="__main__")

    def interrupt_behind(self, monkeypatch, number: int):
        """Ctrl-C after so many batches."""
        keep = Finished.keep

        def kept(finished, *row):
            if len(finished.journal.rows) == number:
                raise KeyboardInterrupt
            keep(finished, *row)

        monkeypatch.setattr(Finished, "keep", kept)
        with pytest.raises(SystemExit):
            self.run(monkeypatch, "result.json")
        monkeypatch.setattr(Finished, "keep", keep)
        assert not Path("result.json").exists()
        assert len(Path("result.json.journal").read_text().splitlines()) == 1 + number

    def test_the_same_command_goes_on(self, folder, monkeypatch, capsys):
        self.run(monkeypatch, "whole.json")
        self.interrupt_behind(monkeypatch, 2)
        self.interrupt_behind(monkeypatch, 7)  # in the sweep
        capsys.readouterr()
        self.run(monkeypatch, "result.json")
        assert "continuing after the 7 batches in result.json.journal" in capsys.readouterr().out
        found, whole = (json.loads(Path(name).read_text()) for name in ("result.json", "whole.json"))
        speeds = [f"{who}_per_second" for who in ("tokens", "target_only_tokens")]
        speeds += [f"{who}_seconds_per_round" for who in ("draft", "target")]
        for result in (found, *found["sweep"], whole, *whole["sweep"]):
            assert all(result.pop(name) > 0 for name in speeds)
        for result in (found, whole):
            assert result.pop("speedup") > 0 and result.pop("speedup_interval")[0] > 0
            # timed anew, which takes a moment
            assert all(entry["tokens_per_second"] > 0 for entry in result.pop("modelled_speeds"))
        assert found == whole
        assert Path("result.json.tokens").read_bytes() == Path("whole.json.tokens").read_bytes()
        assert not list(folder.glob("*.journal"))
        self.run(monkeypatch, "result.json", max_new_tokens=4)  # a finished one is measured again, as always

    def test_other_settings_are_refused_and_lose_nothing(self, folder, monkeypatch, capsys):
        self.interrupt_behind(monkeypatch, 2)
        left = Path("result.json.journal").read_bytes()
        pair_of_other_taps = make_draft(make_target(), draft_vocab_size=40, tap_ids=[0, 1, 3])
        pair_of_other_taps.save_pretrained("other")
        Path("fewer.jsonl").write_text(Path("prompts.jsonl").read_text().replace("w10", "w11"))
        for changes, name in (
            ({"num_prompts": 4}, "prompts"),
            ({"prompts": "fewer.jsonl"}, "prompts"),
            ({"draft": "other"}, "draft_weights"),
            ({"dtype": "bfloat16"}, "dtype"),
            ({"max_new_tokens": 9}, "max_new_tokens"),
            ({"num_speculative_tokens": 2}, "num_speculative_tokens"),
            ({"temperature": 0.5}, "temperature"),
            ({"batch_size": 2}, "batch_size"),
            ({"turns": 2}, "turns"),
            ({"sweep_tokens": None}, "sweep_tokens"),
            ({"compare_to_target": False}, "compare_to_target"),
            ({"chat_template_kwargs": '{"enable_thinking": false}'}, "template_kwargs"),
        ):
            with pytest.raises(SystemExit):
                self.run(monkeypatch, "result.json", **changes)
            said = capsys.readouterr().err
            assert f"`{name}`" in said and "go on with the same" in said, (changes, said)
            assert Path("result.json.journal").read_bytes() == left
        # how a folder is named, and what a default is, are no other settings
        self.run(monkeypatch, "result.json", draft=folder / "draft", num_speculative_tokens=3)

    @pytest.mark.parametrize("sweep", [None, "1..2"])
    def test_each_prompt_is_tried_out_once_and_then_rendered_where_it_is_decoded(self, folder, monkeypatch, sweep):
        asked, of = [], PromptBatch.of

        def counted(prompts, *args, **kwargs):
            asked.extend(prompts)
            return of(prompts, *args, **kwargs)

        monkeypatch.setattr(PromptBatch, "of", counted)
        self.run(monkeypatch, "result.json", sweep_tokens=sweep, batch_size=2)
        times = 2 if sweep else 1  # both begin with one prompt that no clock sees
        assert len(asked) == len(PROMPTS) + times * (len(PROMPTS) + 1)

    @pytest.mark.parametrize("line", ['{"turns": [7]}', '{"messages": [{"role": "user", "content": 5}]}'])
    def test_prompts_are_read_and_rendered_before_the_models_are(self, folder, monkeypatch, capsys, line):
        monkeypatch.setattr("hf_eagle.load_draft", lambda *_, **__: pytest.fail("the draft was loaded"))
        with Path("prompts.jsonl").open("a") as file:
            file.write(line)
        with pytest.raises(SystemExit):
            self.run(monkeypatch, "result.json")
        assert "Record 5 of the prompt file" in capsys.readouterr().err
        tokenizer = word_tokenizer(VOCAB, 9)
        tokenizer.chat_template = "{{ raise_exception('refused') }}"
        tokenizer.save_pretrained("target")
        with pytest.raises(SystemExit):
            self.run(monkeypatch, "result.json", num_prompts=2)
        assert "refuses prompt 0: refused" in capsys.readouterr().err

    def test_categories_of_any_type_are_drawn(self, folder, monkeypatch):
        categories = ["all", "$x^{$", "$_", 7, None, {"a": [1]}, [True], "\u6570\n"]
        lines = [{"messages": PROMPTS[0].messages, "category": category} for category in categories]
        Path("prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.run(monkeypatch, "result.json", sweep_tokens=None)
        known = json.loads(Path("result.json").read_text())["acceptance_length_by_category"]
        assert set(known) == {"all", "$x^{$", "$_", "7", '{"a": [1]}', "[true]", "\u6570\n"}
        assert Path("result.png").stat().st_size > 5000
