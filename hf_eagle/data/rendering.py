"""Render messages as text, with tool calls and reasoning in the form that the chat template takes.

Every stage uses this: training, regeneration, prompt files, measured acceptance, benchmarks of servers.
"""

import json

from .template_limits import TemplateLimit, TemplateRefusal, start_clock, stop_clock


_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# arguments of `apply_chat_template` that set what is returned, or that each stage sets itself
_RESERVED = (
    *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "processor_kwargs"),
)
_PROBE = {"type": "function", "function": {"name": "name", "arguments": {"key": "value"}}}
PROBED_CALL = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [_PROBE]}]


def check_template_kwargs(template_kwargs: dict, name: str = "template_kwargs") -> None:
    """Raise a `ValueError` for a template option that is the name of an argument of `apply_chat_template`.

    Args:
        template_kwargs: extra keyword arguments for a chat template.
        name: name of the argument that holds them, for the error.
    """
    wrong = next((option for option in _RESERVED if option in template_kwargs), None)
    if wrong is not None:
        raise ValueError(
            f"`{name}` holds {wrong!r}, which no chat template sees, since it says how templates are applied: leave "
            "it out."
        )


class ChatRenderer:
    """Render conversations by a tokenizer's chat template.

    Reasoning is passed under every name that the template mentions. Arguments of tool calls are objects, or strings if
    the template refuses objects; ids of calls become nine digits if it requires that (Mistral). For a template that
    writes no tool calls, they become JSON in the answer's text.

    Args:
        tokenizer: a tokenizer with a chat template.
        template_kwargs: extra keyword arguments for the template, such as `{"enable_thinking": False}`. `tools` are
            offered in every conversation without its own.

    Raises a `ValueError` if the tokenizer has no chat template, or for an option that no template sees, and a
    `TemplateLimit` if the template never ends.
    """

    def __init__(self, tokenizer, template_kwargs: dict | None = None):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "`target`'s `tokenizer` has no chat template; take an instruction-tuned target, or set "
                "`tokenizer.chat_template`."
            )

        self.tokenizer = tokenizer
        self.template = tokenizer.get_chat_template()
        self.template_kwargs = dict(template_kwargs or {})
        check_template_kwargs(self.template_kwargs)

        self.thought_names = [name for name in _THOUGHTS if name in self.template]
        self.arguments_as_text, self.short_ids, self.writes_calls = False, False, True
        self._probe_calls()

    def render(self, messages: list[dict], tools: list[dict] | None = None, **kwargs) -> str:
        """Return the text of `apply_chat_template(..., tokenize=False)`.

        Raises:
            TemplateRefusal: if the template raises an error, with its text.
            TemplateLimit: if it takes too long or makes too much.
        """
        options = {**self.template_kwargs, **kwargs}
        options["tools"] = tools or options.get("tools")

        try:
            start_clock()
            return self.tokenizer.apply_chat_template(self._prepared(messages), tokenize=False, **options)
        except TemplateLimit:
            raise
        except Exception as problem:  # jinja's errors, and whatever a template itself raises
            raise TemplateRefusal(_reason(problem)) from problem
        finally:
            stop_clock()

    def prompt(self, messages: list[dict], tools: list[dict] | None = None) -> str:
        """Return a conversation up to the header that opens the next answer; raise as `render`, and if it is empty."""
        text = self.render(messages, tools, add_generation_prompt=True)
        if not text:
            raise TemplateRefusal("it makes an empty prompt of the conversation")
        return text

    def fold_calls(self, messages: list[dict]) -> list[dict]:
        """Put tool calls as JSON into the answers' texts, if the template writes none; else change nothing."""
        if self.writes_calls or not any(message.get("tool_calls") for message in messages):
            return messages

        folded = []
        for message in messages:
            if message.get("tool_calls"):
                texts = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
                content = "\n".join([message["content"], *texts] if message["content"] else texts)
                message = {k: v for k, v in message.items() if k != "tool_calls"} | {"content": content}
            folded.append(message)
        return folded

    def _probe_calls(self) -> None:
        for self.arguments_as_text, self.short_ids in ((False, False), (True, False), (False, True), (True, True)):
            try:
                text = self.render(PROBED_CALL)
            except TemplateRefusal:
                continue
            except TemplateLimit as problem:
                raise TemplateLimit(f"The chat template of `target`'s tokenizer cannot be used: {problem}.") from None
            self.writes_calls = "value" in text and "name" in text
            return

        # for a chat with calls, the template will raise its error
        self.arguments_as_text, self.short_ids, self.writes_calls = False, False, "tool_calls" in self.template

    def _prepared(self, messages: list[dict]) -> list[dict]:
        ids: dict[str, str] = {}  # ids of calls, in order
        prepared = []
        for message in self.fold_calls(messages):
            if "reasoning_content" in message:
                thoughts = message["reasoning_content"]
                message = {k: v for k, v in message.items() if k != "reasoning_content"}
                message |= dict.fromkeys(self.thought_names, thoughts)

            if message.get("tool_calls"):
                message = self._with_calls(message, ids)
            elif self.short_ids and message["role"] == "tool":
                answered = message.get("tool_call_id") or next(iter(ids), "")
                message = message | {"tool_call_id": ids.pop(answered, "0" * 9)}

            prepared.append(message)
        return prepared

    def _with_calls(self, message: dict, ids: dict[str, str]) -> dict:
        calls = []
        for call in message["tool_calls"]:
            function = call["function"]
            if self.arguments_as_text:
                text = json.dumps(function["arguments"], ensure_ascii=False)
                function = function | {"arguments": text}
            call = call | {"function": function}

            if self.short_ids:
                short = f"{len(ids):09d}"
                ids[call.get("id", short)] = short
                call["id"] = short
            calls.append(call)
        return message | {"tool_calls": calls}


def _reason(problem: Exception) -> str:
    """Return the text with which a template refuses a conversation, or else its error with the error's type."""
    text = " ".join(str(problem).split())[:300]
    kind = type(problem).__name__
    return text if isinstance(problem, ValueError) or _of_jinja(problem) and text else f"{kind}: {text}".rstrip(": ")


def _of_jinja(problem: Exception) -> bool:
    return type(problem).__module__.startswith("jinja2")
