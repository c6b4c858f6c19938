"""Define spans of answers, in characters or tokens, and select the parts of them that are supervised."""

from dataclasses import dataclass


# why an answer ended, in the spelling of OpenAI's API, TGI, TensorRT-LLM, llama.cpp, Anthropic and Gemini
ENDED = ("stop", "eos", "eos_token", "end_turn", "tool_calls", "tool_use", "function_call")
# the target did not end the answer; a stop sequence that a user chose is no end of turn
CUT = (
    *("length", "max_tokens", "limit", "stop_sequence", "content_filter", "safety", "refusal", "repetition"),
    *("pause_turn", "abort", "cancelled", "timeout", "error"),
)


@dataclass(frozen=True)
class MaskOptions:
    """Which parts of the answers are supervised.

    Args:
        last_turn_only: only the answers after the last user message that has an answer, including all tool calls.
        thoughts: reasoning, and the tags around it.
        tool_calls: tool calls; an answer without them ends with its text, and its end of turn is not supervised.
    """

    last_turn_only: bool = False
    thoughts: bool = True
    tool_calls: bool = True


@dataclass(frozen=True)
class AnswerSpan:
    """One answer is the characters `start:end` of the rendered text; without its end of turn it ends at `content_end`.
    If token ids are known, the numbers count tokens instead of characters.

    `start:thought_end` is its reasoning; its tool calls begin at `calls_start`, if it has any.
    """

    start: int
    content_end: int
    end: int
    thought_end: int = 0
    calls_start: int | None = None


def first_answer(messages: list[dict], spans: list[AnswerSpan | None], options: MaskOptions) -> int:
    """Return the index, among the answers, of the first supervised answer."""
    if not options.last_turn_only:
        return 0

    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    last = max((number for number, span in zip(answers, spans, strict=False) if span is not None), default=0)
    question = max((n for n in range(last) if messages[n]["role"] == "user"), default=-1)
    return sum(number < question for number in answers)


def supervised(spans: list, reasons: list[str] | None, first: int, options: MaskOptions) -> list[tuple[int, int]]:
    """Return the supervised parts of the answers, starting with the answer of index `first`."""
    cut = [reason in CUT for reason in reasons or []] + [False] * len(spans)
    found = []
    for span, was_cut in list(zip(spans, cut, strict=False))[first:]:
        if span is None:
            continue

        start = span.start if options.thoughts else max(span.start, span.thought_end)
        end = span.content_end if was_cut else span.end
        if not options.tool_calls and span.calls_start is not None:
            end = min(end, span.calls_start)
        if start < end:
            found.append((start, end))
    return found
