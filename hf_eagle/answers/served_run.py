"""Answer many records through a server at once: workers ask, one thread writes down answers and failures."""

import logging
import queue
import threading
import time
from dataclasses import dataclass, field

from tqdm.auto import tqdm

from ..data.spans import CUT
from .answer import Answer, AnswerReader, add_answer, said_answer
from .chat_client import Aborted, Broken, ChatAnswer, ChatClient, Refused, ServerError, TooLong, Unavailable
from .served_target import ServedTarget
from .turns import context, turn_seed


logger = logging.getLogger(__name__)

# a text may have `_TIMES` times as many tokens as requested, and `_LEAST` in any case
_TIMES, _LEAST = 4, 64
_CHARACTERS = 1024  # most characters in one token: the longest tokens are runs of white space

SYSTEMATIC = 10  # so many consecutive refusals, without an answer between them, are not the prompts' fault


@dataclass
class Asked:
    """The questions of all records, and the options that they share."""

    turns: list
    tools: list
    seed: int | None
    time_limit: float | None


@dataclass
class Run:
    """Workers that each take the next record and answer its turns in order; one thread writes all answers to disk."""

    asked: Asked
    answers: list[list[Answer | None]]  # per record; `None` ends one that stops early
    served: ServedTarget
    stop: threading.Event
    reader: AnswerReader | None
    clients: list[ChatClient] = field(default_factory=list)

    def __post_init__(self):
        self.turns, self.seed, self.time_limit = self.asked.turns, self.asked.seed, self.asked.time_limit

        self._waiting = iter([id for id, turns in enumerate(self.turns) if len(self.answers[id]) < len(turns)])
        self._lock = threading.Lock()  # guards the iterator
        self._events = queue.SimpleQueue()
        self._started = time.monotonic()
        self._done = sum(map(len, self.answers))  # counted before the first worker adds to them

    def start(self, clients: list[ChatClient]) -> None:
        self.clients = clients
        for client in clients:
            threading.Thread(target=self._work, args=(client,), daemon=True).start()

    def collect(self, journal, progress: bool) -> list[list]:
        """Write answers to disk as they arrive, until every worker has ended; then raise the first failure."""
        early, failure, tokens, in_a_row, working = {}, None, 0, 0, len(self.clients)
        total = sum(map(len, self.turns))
        with tqdm(total=total, initial=self._done, unit="answer", desc="regenerating", disable=not progress) as bar:
            try:
                while working:
                    events = self._next_events()
                    rows = [event for event in events if isinstance(event, dict)]
                    journal.extend(rows)
                    tokens += sum(row["tokens"] or 0 for row in rows)
                    bar.set_postfix_str(f"{tokens / (time.monotonic() - self._started):.0f} tokens/s", refresh=False)
                    bar.update(len(rows))
                    working -= sum(event is None for event in events)

                    # a record that ends early, an answer, or the error that ended a worker
                    for event in events:
                        if isinstance(event, tuple):
                            early[event[0]] = event[1]
                            in_a_row += not isinstance(event[1], TooLong)
                        elif isinstance(event, dict):
                            in_a_row = 0
                        elif event is not None:
                            failure = failure or event

                    if in_a_row >= SYSTEMATIC and failure is None:
                        failure = ServerError(
                            f"{in_a_row} prompts failed in a row, for instance that of record {first_of(early)}."
                        )
                    if failure is not None:
                        self._abort()
            except BaseException:
                self._abort()
                raise

        if failure is not None:
            raise failure
        if early and not any(answer for found in self.answers for answer in found):
            raise ServerError(f"No prompt was answered; record {first_of(early)}.")
        _log_early(early)
        return self.answers

    def _next_events(self) -> list:
        """Return all waiting events, so that one write takes them all; none if none comes within half a second."""
        events = []
        try:
            events.append(self._events.get(timeout=0.5))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def _abort(self) -> None:
        self.stop.set()
        for client in self.clients:
            client.abort()

    def _work(self, client: ChatClient) -> None:
        asked = False
        try:
            while (id := self._next_record()) is not None:
                while len(self.answers[id]) < len(self.turns[id]) and self.answers[id][-1:] != [None]:
                    late = self.time_limit is not None and time.monotonic() - self._started > self.time_limit
                    if self.stop.is_set() or (asked and late):
                        return
                    asked = True
                    self._answer(client, id)
        except Aborted:
            pass
        except BaseException as problem:  # the collecting thread raises it
            self._events.put(problem)
        finally:
            client.close()
            self._events.put(None)

    def _next_record(self) -> int | None:
        with self._lock:
            return next(self._waiting, None)

    def _answer(self, client: ChatClient, id: int) -> None:
        turn = len(self.answers[id])
        seed = None if self.seed is None else turn_seed(self.seed, id, turn)
        try:
            messages = context(self.turns[id], self.answers[id])
            told = client.chat(self.served.body(messages, seed, self.asked.tools[id]))
            answer = self._read(told, self.answers[id][-1] if turn else None)
        except (Refused, Unavailable) as problem:
            if not self.served.fails_alone(problem, client):
                raise
            self.answers[id].append(None)
            self._events.put((id, problem))
            return

        add_answer(self.answers[id], answer, self.turns[id])
        self._events.put({"id": id, "turn": turn, "tokens": told.completion_tokens, "answer": answer.as_row()})

    def _read(self, told: ChatAnswer, before: Answer | None) -> Answer:
        """Return the answer, read from its tokens if reported; raise `Broken` if it cannot be the target's."""
        most = self.served.fields["max_tokens"]
        problem = _too_long(told.text, most, self.reader)
        if problem is None and self.reader is not None and not told.token_ids:
            problem = self.reader.ends_within(told.text)
        if problem is not None:
            raise Broken(f"the server sends {problem}")

        if not told.token_ids:
            return Answer({"content": told.text}, told.finish_reason)

        said = told.token_ids
        if len(said) > most:
            raise Broken(f"the server reports {len(said)} tokens of an answer that may have {most} (`max_new_tokens`)")

        message = {"content": told.text}
        if self.reader is not None:
            unknown = self.reader.unknown_id([*told.prompt_ids, *said])
            if unknown is not None:
                raise Broken(f"the server reports the token id {unknown}, which the target's tokenizer does not have")

            # an answer that was not cut includes the token that ended it
            ended = told.finish_reason not in CUT and said[-1] in self.reader.special_ids
            message = self.reader.message(told.prompt_ids, said[:-1] if ended else said)
        return said_answer(message, told.finish_reason, told.prompt_ids, said, before)


def _too_long(text: str, most: int, reader: AnswerReader | None) -> str | None:
    """Describe the problem of a text of far more than `most` tokens; `None` if it may have at most `most`."""
    if len(text) > _CHARACTERS * most:  # also spares the tokenizer megabytes of text
        return f"{len(text):,} characters, of an answer that may have {most} tokens (`max_new_tokens`)"

    # a text may be tokenized differently than it was generated, but not into several times as many tokens
    tokens = 0 if reader is None else len(reader.tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokens > max(_TIMES * most, _LEAST):
        return f"a text of {tokens:,} tokens, of an answer that may have {most} (`max_new_tokens`)"
    return None


def first_of(early: dict[int, ServerError]) -> str:
    """Return the first record that ended early, and why; records that are too long come last."""
    id = min((id for id, problem in early.items() if not isinstance(problem, TooLong)), default=min(early))
    return f"{id}: {early[id]}"


def _log_early(early: dict[int, ServerError]) -> None:
    """Log how many records end early, and why."""
    too_long = [id for id, problem in early.items() if isinstance(problem, TooLong)]
    broken = {id: problem for id, problem in early.items() if isinstance(problem, Broken)}
    failed = {id: problem for id, problem in early.items() if id not in broken and not isinstance(problem, TooLong)}

    # asking these again would not help
    if too_long:
        logger.warning(
            "%d records end early: with `max_new_tokens` their prompts exceed the server's context length.",
            len(too_long),
        )

    # the next call may get an answer to these
    if broken:
        logger.warning(
            "%d records end early, since an answer to them cannot be trained on; the next call asks for them again. "
            "First, record %s",
            len(broken),
            first_of(broken),
        )
    if failed:
        logger.warning(
            "%d records end early, since the server fails on them; the next call asks for them again. First, record %s",
            len(failed),
            first_of(failed),
        )
