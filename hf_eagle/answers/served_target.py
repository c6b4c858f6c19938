"""Check that the model behind a server is the intended target, and that it reads chats as the target does."""

import json
import logging
from dataclasses import dataclass

from ..data.picture_forms import addressed
from ..data.rendering import ChatRenderer, TemplateRefusal
from ..door.names import same_model
from .answer import Answer
from .chat_client import ChatClient, Refused, ServerError, Unavailable
from .replies import ServedModel
from .turns import context


logger = logging.getLogger(__name__)

_CHECKED = 4  # records whose prompts are compared
# A server reads fields that a request leaves out from the model's generation_config.json; these undo its settings.
# Only vLLM, SGLang and servers built on them know these fields; only vLLM reports token ids.
_NEUTRAL = {"top_k": -1, "repetition_penalty": 1.0, "return_token_ids": True}


@dataclass
class ServedTarget:
    """A target behind a server: its name there, the fields of every request, and whether token ids are reported."""

    client: ChatClient
    model: str
    fields: dict
    tells_ids: bool = False

    @classmethod
    def find(cls, client: ChatClient, target: str, server_model: str | None, fields: dict) -> "ServedTarget":
        """Find the target on the server and ask it for one token.

        Args:
            target: folder or Hub id, compared with the models that `/v1/models` lists.
            server_model: the server's name for the target; if given, `target` is not compared.
            fields: sampling and length, as fields of a chat completion request.

        Raises a `ServerError` if the server runs a different model or does not answer.
        """
        model = _listed(client, target, server_model)
        length = model.max_model_len
        if length is not None and fields["max_tokens"] >= length:
            raise ServerError(
                f"`max_new_tokens` is {fields['max_tokens']}, but the server at {client.url} reads and writes {length} "
                "tokens altogether; lower it, or start the server with a longer context."
            )

        refusal = None
        for served in (cls(client, model.id, fields | _NEUTRAL), cls(client, model.id, fields)):
            try:
                served.tells_ids = client.chat(served.greeting()).token_ids is not None
            except Refused as problem:
                refusal = refusal or problem
                continue
            if refusal is not None:
                logger.warning("Asked without %s, since %s.", ", ".join(_NEUTRAL), refusal)
            return served
        raise ServerError(f"A chat of one word cannot be answered: {refusal}.")

    def body(self, messages: list[dict], seed: int | None = None, tools: list[dict] | None = None) -> dict:
        """Return a chat completion request. The target sees `tools`; the server leaves its tool calls in the text."""
        body = {"model": self.model, "messages": [sent_message(message) for message in messages], **self.fields}
        body |= {"tools": tools, "tool_choice": "none"} if tools else {}
        return body if seed is None else {**body, "seed": seed}

    def greeting(self) -> dict:
        """Return the shortest request, which probes whether the server works."""
        return self.body([{"role": "user", "content": "Hi"}]) | {"max_tokens": 1}

    def is_there(self, client: ChatClient) -> bool:
        """Whether the server answers a probe request at the first attempt."""
        try:
            client.chat(self.greeting(), retries=0)
            return True
        except ServerError:
            return False

    def fails_alone(self, problem: ServerError, client: ChatClient) -> bool:
        """Whether this prompt alone is at fault: it is refused, or it fails while a probe request is answered."""
        if isinstance(problem, Unavailable):
            return not problem.busy and self.is_there(client)
        return isinstance(problem, Refused)

    def check_prompts(
        self,
        tokenizer,
        turns: list[list[list[dict]]],
        tools: list | None = None,
        template_kwargs: dict | None = None,
    ) -> None:
        """Raise a `ServerError` if the server renders or tokenizes some of these chats differently from the tokenizer.

        Prompts are compared token by token if the server reports them (vLLM), else by their number of tokens. Chats
        with images are left out: only the server has their processor.
        """
        renderer = ChatRenderer(tokenizer, template_kwargs)
        texts = [
            (chat, offered)
            for chat, offered in zip(turns, tools or [None] * len(turns), strict=True)
            if all(isinstance(message["content"], str) for turn in chat for message in turn)
        ]

        for chat, offered in texts[:: max(1, -(-len(texts) // _CHECKED))]:
            messages = context(chat[:2], [Answer({"content": "Yes."}, "stop")] * (len(chat) > 1))
            try:
                rendered = renderer.prompt(messages, offered)
            except TemplateRefusal:
                continue  # the server will refuse it too
            self._check_prompt(tokenizer, self.body(messages, tools=offered), rendered)

    def _check_prompt(self, tokenizer, body: dict, rendered: str) -> None:
        """Raises a `ServerError` if the server makes other tokens of a request than those of the rendered text."""
        expected = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        found, number = self.client.prompt_ids(body), None
        if found is None:
            try:
                told = self.client.chat(body | {"max_tokens": 1})
            except Refused:
                return
            found, number = told.prompt_ids, told.prompt_tokens

        if found is not None and found != expected:
            raise self._other_prompt(_around_difference(tokenizer, found, expected))
        if found is None and number is not None and number != len(expected):
            raise self._other_prompt(f"it has {number} tokens, not the {len(expected)} of {rendered[:200]!r}")

    def _other_prompt(self, difference: str) -> ServerError:
        return ServerError(
            f"The server at {self.client.url} makes another prompt of a chat than `target`'s tokenizer and template: "
            f"{difference}. Start it with the target's own files, or with `--chat-template`."
        )


def sent_message(message: dict) -> dict:
    """Return a message as OpenAI's API takes it: media by address, arguments of tool calls as JSON text, and
    reasoning also by vLLM's name."""
    if isinstance(message.get("content"), list):
        message = message | {"content": addressed(message["content"])}
    if message.get("reasoning_content"):
        message = message | {"reasoning": message["reasoning_content"]}
    if not message.get("tool_calls"):
        return message

    calls = []
    for number, call in enumerate(message["tool_calls"]):
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({"id": f"call_{number}", **call, "function": call["function"] | {"arguments": arguments}})
    return message | {"tool_calls": calls}


def _listed(client: ChatClient, target: str, server_model: str | None) -> ServedModel:
    """Return the target's entry in the server's list."""
    models = client.models()
    for model in models:
        if server_model is None and (same_model(target, model.id) or same_model(target, model.root)):
            return model
        if model.id == server_model:
            return model

    listed = ", ".join(model.id + (f" ({model.root})" if model.root else "") for model in models)
    wanted = f"`target` {target}" if server_model is None else f"`server_model` {server_model}"
    raise ServerError(
        f"The server at {client.url} serves {client.printable(listed) or 'nothing'}, not {wanted}; start it with the "
        "target, or name in `server_model` which of these is the same model."
    )


def _around_difference(tokenizer, found: list[int], expected: list[int]) -> str:
    place = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
    place = min(len(found), len(expected)) if place is None else place

    here = slice(max(0, place - 4), place + 8)
    highest = max(tokenizer.get_vocab().values())
    unknown = next((id for id in found[here] if id > highest), None)
    if unknown is not None:
        return f"at token {place} it reads the id {unknown}, which the tokenizer does not have"
    return f"at token {place} it reads {tokenizer.decode(found[here])!r}, not {tokenizer.decode(expected[here])!r}"
