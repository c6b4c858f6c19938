"""A vLLM that serves the draft: its counters on the same prompts, against ours."""

import json
import re
from collections.abc import Iterator
from http.client import HTTPException

from ..door.connection import Address, Connection, ReplyTooLarge, read_key
from ..evaluation.prompts import Prompt
from .case import Case, Tried
from .findings import Finding
from .of_draft import shares


_TIMEOUT = 600.0  # seconds that one answer may take
_COUNTER = re.compile(r"^vllm:spec_decode_num_(drafts|accepted_tokens_per_pos)(?:_total)?(?:\{(.*)\})? ([\d.eE+]+)$")
_NEAR = 0.5  # a change explains a server if its shares lie nearer to the server's than this part of ours
_DIFFERENT = 0.02  # share of the acceptance length that a server may differ by: precision decides ties


class Server:
    """A vLLM server, one request at a time.

    Args:
        url: its address.
        key: its key, if it wants one.

    Raises:
        ValueError: for an address or a key that cannot be used.
    """

    def __init__(self, url: str, key: str | None = None):
        address = Address.read(url)
        self.url = address.shown
        self._connection = Connection(address, read_key(key), _TIMEOUT)

    def counters(self) -> dict[str, list[float]]:
        """Rounds, and accepted tokens by position, since the server started.

        Raises:
            ValueError: if it shows none: it runs without a draft, or is no vLLM.
        """
        found: dict[str, dict[int, float]] = {"drafts": {}, "accepted_tokens_per_pos": {}}
        for line in self._ask("GET", "/metrics").splitlines():
            if (counter := _COUNTER.match(line)) is not None:
                name, labels, value = counter.groups()
                position = re.search(r'position="(\d+)"', labels or "")
                place = int(position[1]) if position else 0
                found[name][place] = found[name].get(place, 0.0) + float(value)  # summed over engines

        if not all(found.values()):
            raise ValueError(
                f"`server_url` {self.url} shows no counters of drafted tokens in its /metrics: start vLLM with "
                "`--speculative-config`, and without `--disable-log-stats`."
            )
        return {name: [values[place] for place in sorted(values)] for name, values in found.items()}

    def model(self) -> str:
        """The name of the first model that it serves."""
        return str(self._field("/v1/models", self._ask("GET", "/v1/models"), "data", 0, "id"))

    def answer(self, model: str, token_ids: list[int], max_new_tokens: int) -> str:
        """The greedy answer to a prompt of these tokens."""
        asked = {"model": model, "prompt": token_ids, "max_tokens": max_new_tokens, "temperature": 0.0}
        reply = self._ask("POST", "/v1/completions", asked)
        return str(self._field("/v1/completions", reply, "choices", 0, "text"))

    def tokens_of(self, model: str, prompt: Prompt, template_kwargs: dict) -> list[int]:
        """The tokens that it renders a chat to, which tells of another template."""
        options = {name: x for name, x in template_kwargs.items() if name != "tools"}
        asked = {"model": model, "messages": prompt.messages, "add_generation_prompt": True}
        asked["chat_template_kwargs"] = options
        if tools := prompt.tools or template_kwargs.get("tools"):
            asked["tools"] = tools
        return self._field("/tokenize", self._ask("POST", "/tokenize", asked), "tokens")

    def _field(self, path: str, reply: str, *keys: str | int):
        """A field of a reply."""
        try:
            found = json.loads(reply)
            for key in keys:
                found = found[key]
            return found
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"`server_url` {self.url} answers {path} as no vLLM does: name a vLLM.") from None

    def _ask(self, method: str, path: str, asked: dict | None = None) -> str:
        payload = None if asked is None else json.dumps(asked).encode()
        try:
            reply = self._connection.send(method, path, payload)
        except (OSError, HTTPException, ReplyTooLarge) as problem:
            raise ValueError(f"`server_url` {self.url} does not answer {path} ({problem}): is it running?") from None
        text = reply.content.decode(errors="replace")
        if reply.status != 200:
            said = self._connection.hide(text[:200])
            raise ValueError(f"`server_url` {self.url} refuses {path} with status {reply.status}: {said}")
        return text


def check_server(case: Case, server: Server) -> None:
    """`ValueError` if the server drafts another number of tokens than is measured here."""
    there = len(server.counters()["accepted_tokens_per_pos"])
    if there != case.depth:
        raise ValueError(
            f"`num_speculative_tokens` is {case.depth}, but the server at {server.url} drafts {there} tokens: give "
            f"{there}."
        )


def try_server(case: Case, server: Server) -> Iterator[Tried]:
    """The server's counters on the same prompts; if they are lower, which change of the draft explains them.

    Nobody else may ask the server meanwhile.
    """
    model = server.model()
    kwargs = case.sample.template_kwargs or {}
    rendered = [server.tokens_of(model, run.prompt, kwargs) == run.prompt_token_ids for run in case.base.runs]
    before, answers = server.counters(), []
    for run in case.base.runs:
        answers.append(server.answer(model, run.prompt_token_ids, case.sample.settings.max_new_tokens))
    after = server.counters()

    drafts = after["drafts"][0] - before["drafts"][0]
    accepted = [now - then for now, then in zip(*(x["accepted_tokens_per_pos"] for x in (after, before)), strict=True)]
    if not drafts:
        raise ValueError(f"The server at {server.url} drafted nothing: is its draft loaded?")

    length, there = 1 + sum(accepted) / drafts, [count / drafts for count in accepted]
    tokenizer = case.sample.tokenizer
    ours = [tokenizer.decode(run.token_ids, skip_special_tokens=True) for run in case.base.runs]
    same = sum(one.strip() == other.strip() for one, other in zip(ours, answers, strict=True)) / len(ours)
    evidence = f"the server counts an acceptance length of {length:.3f}, and gives {same:.0%} of our answers"
    evidence += "".join(f"; it accepts as the draft does {told}" for told in _explained(case, there))
    if same < 0.5:
        evidence += "; so its target, its dtype or its context is another one"

    if not all(rendered):
        evidence += f"; it renders {len(rendered) - sum(rendered)} of {len(rendered)} prompts to other tokens, so its "
        evidence += "chat template or its options differ"

    gain = case.length - length
    details = {"shares": there, "same_answers": same, "drafts": drafts, "rendered_alike": all(rendered)}
    seen = gain > _DIFFERENT * case.length or not all(rendered)
    yield Tried(Finding("server", evidence, "hf_eagle", case.length, gain, seen=seen, details=details))


def _explained(case: Case, there: list[float]) -> list[str]:
    """The change of the draft that accepts as the server does, if one is much nearer to it than the draft itself."""

    def distance(found: list[float]) -> float:
        return sum(abs(one - other) for one, other in zip(found, there, strict=True))

    own = distance(shares(case.base))
    changed = [x.finding for x in case.tried if x.finding.details and "shares" in x.finding.details]
    nearest = min(changed, key=lambda finding: distance(finding.details["shares"]), default=None)
    if nearest is None or distance(nearest.details["shares"]) > _NEAR * own:
        return []
    return [f"with {nearest.change}"]
