"""A server that runs another draft than the folder's is found out by its counters; one that runs it is not."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from planted import rotate
from taught_drafts import ANSWER, EOS, target_and_tokenizer, taught, word_prompts

from hf_eagle.decoding import speculative_generate
from hf_eagle.diagnosis.case import Case
from hf_eagle.diagnosis.diagnose import diagnose
from hf_eagle.diagnosis.of_server import Server, check_server
from hf_eagle.diagnosis.sample import Sample
from hf_eagle.drafts.probe import Probe
from hf_eagle.evaluation.measurement import DecodingSettings


SETTINGS = DecodingSettings(num_speculative_tokens=3, max_new_tokens=ANSWER, batch_size=4)


@pytest.fixture(scope="module")
def models():
    target, tokenizer = target_and_tokenizer()
    return target, tokenizer, taught(target, tokenizer, word_prompts())


def case_of(models, only=("rope_base",)):
    target, tokenizer, draft = models
    return Case(draft, Sample(target, tokenizer, word_prompts(), SETTINGS), frozenset(only))


@contextmanager
def serving(target, tokenizer, draft, rendered=None, depth=3, broken=None):
    """A server of vLLM's form that decodes with a draft; yields its address.

    Args:
        rendered: the tokens of every chat, instead of the template's.
        broken: what `/metrics` says instead of counters.
    """
    counts = [0] * (depth + 1)  # rounds, and accepted tokens by position

    def metrics():
        lines = [
            "# HELP vllm:spec_decode_num_drafts_total Rounds",
            f'vllm:spec_decode_num_drafts_total{{engine="0"}} {counts[0]}.0',
        ]
        name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        lines += [f'{name}{{engine="0",position="{place}"}} {float(n)}' for place, n in enumerate(counts[1:])]
        return "\n".join(lines)

    def complete(asked):
        ids, most = torch.tensor([asked["prompt"]]), asked["max_tokens"]
        how = {"num_speculative_tokens": depth, "max_new_tokens": most, "eos_token_ids": [EOS]}
        out = speculative_generate(target, draft, ids, **how)
        for place, count in enumerate([out.drafts[0], *out.accepted_per_position[0]]):
            counts[place] += count
        return {"choices": [{"text": tokenizer.decode(out.answers[0], skip_special_tokens=True)}]}

    def tokenize(asked):
        text = tokenizer.apply_chat_template(asked["messages"], tokenize=False, add_generation_prompt=True)
        return {"tokens": rendered or tokenizer(text)["input_ids"]}

    class Handler(BaseHTTPRequestHandler):
        def _say(self, text):
            self.send_response(200)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self):
            if self.path == "/metrics":
                return self._say(metrics() if broken is None else broken)
            return self._say(json.dumps({"data": [{"id": "served"}]}))

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._say(json.dumps(complete(asked) if self.path == "/v1/completions" else tokenize(asked)))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Server(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_runs_the_same_draft(models):
    with serving(*models) as server:
        found = diagnose(case_of(models), server=server, confirm=False)
    assert found.causes == []
    told = next(one for one in found.tried if one.cause == "server")
    assert told.gain == pytest.approx(0) and "100% of our answers" in told.evidence


def test_a_server_that_rotates_otherwise_is_explained(models):
    target, tokenizer, draft = models
    wrong = Probe("rope_base", "", rotate(rope_theta=500_000.0)).changed(draft)
    with serving(target, tokenizer, wrong) as server:
        found = diagnose(case_of(models), server=server, confirm=False)
    assert [one.cause for one in found.causes] == ["server"]
    assert "accepts as the draft does with a RoPE base of 500,000" in found.causes[0].evidence
    (there,) = case_of(models).sample.replayed([wrong])
    (here,) = case_of(models).sample.replayed([draft])
    assert found.causes[0].gain == pytest.approx(here.acceptance_length() - there.acceptance_length())


def test_a_server_with_another_template_says_so(models):
    with serving(*models, rendered=[1, 2, 3]) as server:
        found = diagnose(case_of(models), server=server, confirm=False)
    assert [one.cause for one in found.causes] == ["server"]
    assert "6 of 6 prompts to other tokens" in found.causes[0].evidence


def test_a_server_that_drafts_another_number_of_tokens(models):
    with serving(*models, depth=2) as server:
        with pytest.raises(ValueError, match="`num_speculative_tokens` is 3, but the server at .* drafts 2 tokens"):
            check_server(case_of(models), server)


@pytest.mark.parametrize("said", ["", "vllm:num_requests_running 0.0\n", "<html>"])
def test_a_server_without_counters(models, said):
    with serving(*models, broken=said) as server:
        with pytest.raises(ValueError, match="`server_url` .* shows no counters of drafted tokens"):
            server.counters()


def test_no_server():
    with pytest.raises(ValueError, match="`server_url` http://127.0.0.1:9 does not answer /metrics"):
        Server("http://127.0.0.1:9").counters()
