"""The target's own answers through an OpenAI-compatible server: many records at once, each one's turns in order."""

import logging
import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from ..data.loss_mask import ConversationEncoder
from .answer import Answer, AnswerReader, add_answer, said_answer
from .chat_client import Aborted, ChatAnswer, ChatClient, Refused, ServerError, TooLong, Unavailable
from .served_target import ServedTarget
from .turns import check_arguments, context, open_journal, read_offers, read_turns, turn_seed
from .written_answers import write_answered


logger = logging.getLogger(__name__)

_SYSTEMATIC = 10  # refusals in a row, with no answer between them, that are no longer the prompts' fault


def regenerate_through_server(
    records,
    output_path: str | Path,
    *,
    server_url: str,
    target: str,
    server_model: str | None = None,
    tokenizer=None,
    api_key: str | None = None,
    max_new_tokens: int = 128,
    concurrency: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    retries: int = 12,
    request_timeout: float = 600.0,
    time_limit: float | None = None,
    progress: bool = True,
    template_kwargs: dict | None = None,
) -> Path:
    """Answers every user turn of `records` through a server that runs the target; the file is `regenerate_answers`'.

    `concurrency` records are under way at the same time. Each answer goes to `<output_path>.journal` as it comes, and a
    run that was killed asks for the missing ones only. Messages are sent as they are, content parts with images too.

    A server that tells token ids (vLLM) may split thoughts and calls off its answers: these are read from the ids. Of
    another one the texts are compared with the rows of training, and a line of the log says so.

    An error that may pass is retried (see `ChatClient`). A prompt that does not fit the server's context, that it
    refuses, or that it fails on although it answers a greeting, ends its record there; it is counted in a warning and
    asked again by the next call. The run stops when the server stays away or refuses everything.

    Args:
        records (`datasets.Dataset` or list of dict): chat records of any form that `to_messages` reads.
        output_path (`str` or `Path`): written whole or not at all.
        server_url (`str`): such as `http://localhost:8000`.
        target (`str`): folder or Hub id; the server must serve it.
        server_model (`str`, *optional*): the name the server gives it, where that cannot be told from `target`.
        tokenizer (*optional*): the target's; if given, the server must make the same prompts of some of the records,
            and every conversation is compared with the row that training will make of it.
        api_key (`str`, *optional*): sent as a bearer token.
        max_new_tokens (`int`, *optional*, defaults to 128): length of an answer at most.
        concurrency (`int`, *optional*, defaults to 64): requests under way together.
        temperature (`float`, *optional*, defaults to 0.0): 0 is greedy.
        top_p (`float`, *optional*, defaults to 1.0): nucleus, when sampling.
        seed (`int`, *optional*, defaults to 0): of the sampling; each turn of each record has its own, made from it.
        retries (`int`, *optional*, defaults to 12): attempts after the first one, over two to three minutes.
        request_timeout (`float`, *optional*, defaults to 600.0): seconds that an answer may take.
        time_limit (`float`, *optional*): in seconds; no request starts later, though each worker makes one. The file
            then holds the records answered so far, and another call goes on.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.
        template_kwargs (`dict`, *optional*): what else the chat template is given, as for `regenerate_answers`.

    Returns the path. Raises a `ValueError` as `regenerate_answers` does, and a `ServerError` (one too) when the server
    serves something else, makes other prompts, or does not answer.
    """
    counts = {"max_new_tokens": max_new_tokens, "concurrency": concurrency}
    check_arguments(counts, temperature, top_p, time_limit)
    if retries < 0:
        raise ValueError(f"`retries` must be 0 or more, got {retries}.")
    if request_timeout <= 0:
        raise ValueError(f"`request_timeout` must be above 0 seconds, got {request_timeout}.")
    output_path = Path(output_path)
    turns, tools = read_turns(records, content_parts=True), read_offers(records, template_kwargs)
    options = {name: value for name, value in (template_kwargs or {}).items() if name != "tools"}
    encoder = None if tokenizer is None else ConversationEncoder(tokenizer, None, template_kwargs)
    stop = threading.Event()

    def client() -> ChatClient:
        return ChatClient(server_url, api_key, request_timeout, retries, stop)

    sampling = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {"temperature": 0.0}
    fields = {"max_tokens": max_new_tokens, **sampling, **({"chat_template_kwargs": options} if options else {})}
    served = ServedTarget.find(client(), target, server_model, fields)
    if tokenizer is not None:
        served.check_prompts(tokenizer, turns, tools, template_kwargs)
    served.client.close()
    _tell_comparison(served, tokenizer)

    settings = {
        "target": str(target),
        "answered_by": "server",
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    # an empty dict of options and no tools ask what `None` does: then the question is the turns alone
    asked_with = [options, tools] if options or any(tools) else None
    reader = None if tokenizer is None else AnswerReader(tokenizer, template_kwargs)
    with open_journal(output_path, turns, settings, asked_with) as journal:
        asked = _Asked(turns, tools, seed if temperature > 0 else None, time_limit)
        run = _Run(asked, _known(turns, journal), served, stop, reader)
        run.start([client() for _ in range(min(concurrency, len(turns)))])
        answers = run.collect(journal, progress)
    write_answered(output_path, turns, answers, tools, encoder)
    return output_path


def _tell_comparison(served: ServedTarget, tokenizer) -> None:
    """Logs by what answers are compared with the rows of training, where it is not their tokens."""
    if tokenizer is None:
        logger.info("Without a tokenizer answers are not compared with what will be trained on.")
    elif not served.tells_ids:
        logger.info(
            "The server at %s tells no token ids: answers are compared as text with what will be trained on.",
            served.client.url,
        )


@dataclass
class _Asked:
    """What every record is asked, and how."""

    turns: list
    tools: list
    seed: int | None
    time_limit: float | None


@dataclass
class _Run:
    """Workers that each take the next record and answer its turns in order; one thread writes down what they say."""

    asked: _Asked
    answers: list[list[Answer | None]]  # per record, `None` at the end of one that ends early
    served: ServedTarget
    stop: threading.Event
    reader: AnswerReader | None
    clients: list[ChatClient] = field(default_factory=list)

    def __post_init__(self):
        self.turns, self.seed, self.time_limit = self.asked.turns, self.asked.seed, self.asked.time_limit
        self._waiting = iter([id for id, turns in enumerate(self.turns) if len(self.answers[id]) < len(turns)])
        self._lock = threading.Lock()  # of the iterator
        self._events = queue.SimpleQueue()
        self._started = time.monotonic()

    def start(self, clients: list[ChatClient]) -> None:
        self.clients = clients
        for client in clients:
            threading.Thread(target=self._work, args=(client,), daemon=True).start()

    def collect(self, journal, progress: bool) -> list[list]:
        """Writes answers down as they come, until every worker has ended; then the first failure is raised."""
        done = sum(len(found) for found in self.answers)
        total = sum(map(len, self.turns))
        early, failure, tokens, in_a_row, working = {}, None, 0, 0, len(self.clients)
        with tqdm(total=total, initial=done, unit="answer", desc="regenerating", disable=not progress) as bar:
            try:
                while working:
                    events = self._next_events()
                    rows = [event for event in events if isinstance(event, dict)]
                    journal.extend(rows)
                    tokens += sum(row["tokens"] or 0 for row in rows)
                    bar.set_postfix_str(f"{tokens / (time.monotonic() - self._started):.0f} tokens/s", refresh=False)
                    bar.update(len(rows))
                    working -= sum(event is None for event in events)

                    # a record that ends early, an answer, or what broke a worker
                    for event in events:
                        if isinstance(event, tuple):
                            early[event[0]] = event[1]
                            in_a_row += not isinstance(event[1], TooLong)
                        elif isinstance(event, dict):
                            in_a_row = 0
                        elif event is not None:
                            failure = failure or event

                    if in_a_row >= _SYSTEMATIC and failure is None:
                        failure = ServerError(f"{in_a_row} prompts in a row fail; of record {_first(early)}.")
                    if failure is not None:
                        self._abort()
            except BaseException:
                self._abort()
                raise

        if failure is not None:
            raise failure
        if early and not any(answer for found in self.answers for answer in found):
            raise ServerError(f"No prompt was answered; record {_first(early)}.")
        _warn(early)
        return self.answers

    def _next_events(self) -> list:
        """All that are there, which reach the disk together; none if none comes within a moment."""
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
        except (Refused, Unavailable) as problem:
            # a server that is there for others fails on this prompt
            if isinstance(problem, Unavailable) and (problem.busy or not self.served.is_there(client)):
                raise
            self.answers[id].append(None)
            self._events.put((id, problem))
            return
        answer = self._read(told, self.answers[id][-1] if turn else None)
        add_answer(self.answers[id], answer, self.turns[id])
        self._events.put({"id": id, "turn": turn, "tokens": told.completion_tokens, "answer": answer.as_row()})

    def _read(self, told: ChatAnswer, before: Answer | None) -> Answer:
        """What was said, from its tokens where they are told."""
        if not told.token_ids:
            return Answer({"content": told.text}, told.finish_reason)
        said = told.token_ids
        message = {"content": told.text}
        if self.reader is not None:
            # an answer that was not cut has the token that ended it
            ended = told.finish_reason != "length" and said[-1] in self.reader.special_ids
            message = self.reader.message(told.prompt_ids, said[:-1] if ended else said)
        return said_answer(message, told.finish_reason, told.prompt_ids, said, before)


def _known(turns: list, journal) -> list[list]:
    """The answers of earlier runs."""
    answers = [[] for _ in turns]
    for row in journal.rows:
        found = answers[row["id"]]
        if row["turn"] != len(found):
            raise ValueError(f"{journal.path} holds turn {row['turn']} of record {row['id']} out of order; delete it.")
        add_answer(found, Answer(**row["answer"]), turns[row["id"]])
    return answers


def _first(early: dict[int, ServerError]) -> str:
    id = min((id for id, problem in early.items() if not isinstance(problem, TooLong)), default=min(early))
    return f"{id}: {early[id]}"


def _warn(early: dict[int, ServerError]) -> None:
    too_long = [id for id, problem in early.items() if isinstance(problem, TooLong)]
    if too_long:
        logger.warning(
            "%d records end early: with `max_new_tokens` their prompts exceed the server's context length.",
            len(too_long),
        )
    if len(early) > len(too_long):
        logger.warning(
            "%d records end early, since the server fails on them; the same call asks them again. First, record %s",
            len(early) - len(too_long),
            _first(early),
        )
