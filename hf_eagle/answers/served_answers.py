"""Get the target's answers from an OpenAI-compatible server: many records at once, the turns of each in order."""

import logging
import threading
from pathlib import Path

from ..data.loss_mask import ConversationEncoder
from ..door.json_files import check_fields
from .answer import Answer, AnswerReader, add_answer
from .chat_client import ChatClient
from .served_run import Asked, Run
from .served_target import ServedTarget
from .turns import check_arguments, open_journal, read_ids, read_offers, read_turns
from .written_answers import write_answered


logger = logging.getLogger(__name__)

_ROW = {"id": int, "turn": int, "answer": {"message": dict, "finish_reason": str}}  # of a journal


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
    media_root: str | None = None,
) -> Path:
    """Answer the user turns of `records` through a server that runs the target; writes `regenerate_answers`' format.

    `concurrency` records are in progress at a time. Each answer goes to `<output_path>.journal` as it comes, and a run
    that was killed asks only for the missing ones. Messages are sent as they are, including images and videos; local
    files are sent as data URLs.

    A server that reports token ids (vLLM) may split thoughts and calls off its answers: these are read from the ids.
    For other servers the texts are compared with the rows of training, and the log says so.

    An error that may pass is retried (see `ChatClient`). A record ends at a prompt that does not fit the server's
    context, that it refuses, or that it fails on although it answers a greeting; a warning counts these, and the next
    call asks them again. The run stops if the server stays away or refuses everything.

    Args:
        records (`datasets.Dataset` or list of dict): chat records of any form that `to_messages` reads.
        output_path (`str` or `Path`): written completely or not at all.
        server_url (`str`): such as `http://localhost:8000`.
        target (`str`): folder or Hub id; the server must serve it.
        server_model (`str`, *optional*): the server's name for the target, if that cannot be found by `target`.
        tokenizer (*optional*): the target's; if given, the server must make the same prompts for some of the records,
            and every conversation is compared with the row that training will make of it.
        api_key (`str`, *optional*): sent as a bearer token.
        max_new_tokens (`int`, *optional*, defaults to 128): greatest length of an answer.
        concurrency (`int`, *optional*, defaults to 64): requests in flight together.
        temperature (`float`, *optional*, defaults to 0.0): 0 is greedy.
        top_p (`float`, *optional*, defaults to 1.0): nucleus, when sampling.
        seed (`int`, *optional*, defaults to 0): of the sampling; each turn of each record has its own, made from it.
        retries (`int`, *optional*, defaults to 12): attempts after the first one, over two to three minutes.
        request_timeout (`float`, *optional*, defaults to 600.0): seconds that an answer may take.
        time_limit (`float`, *optional*): in seconds; no request starts later, but each worker sends at least one. The
            file then holds the records answered so far, and another call continues.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.
        template_kwargs (`dict`, *optional*): further arguments of the chat template, as for `regenerate_answers`.
        media_root (`str`, *optional*): where relative paths of media start; by default the folder of a record's file.

    Returns the path. Raises a `ValueError` as `regenerate_answers` does, and a `ServerError` (one too) if the server
    serves something else, makes other prompts, or does not answer.
    """
    counts = {"max_new_tokens": max_new_tokens, "concurrency": concurrency}
    check_arguments(counts, temperature, top_p, seed, time_limit)
    stop = threading.Event()

    def client() -> ChatClient:
        return ChatClient(server_url, api_key, request_timeout, retries, stop)

    # checks address and key before the records are read
    first = client()
    turns, tools = read_turns(records, True, media_root), read_offers(records, template_kwargs)
    encoder = None if tokenizer is None else ConversationEncoder(tokenizer, None, template_kwargs)

    options = {name: value for name, value in (template_kwargs or {}).items() if name != "tools"}
    sampling = {"temperature": temperature, "top_p": top_p}
    served = ServedTarget.find(first, target, server_model, _fields(max_new_tokens, sampling, options))
    if tokenizer is not None:
        served.check_prompts(tokenizer, turns, tools, template_kwargs)
    first.close()
    _tell_comparison(served, tokenizer)

    settings = {"target": str(target), "answered_by": "server", "max_new_tokens": max_new_tokens}
    settings |= sampling | {"seed": seed}
    # an empty dict of options without tools asks the same as `None`: then the question is the turns alone
    asked_with = [options, tools] if options or any(tools) else None
    reader = None if tokenizer is None else AnswerReader(tokenizer, template_kwargs)
    with open_journal(Path(output_path), turns, settings, asked_with) as journal:
        asked = Asked(turns, tools, seed if temperature > 0 else None, time_limit)
        run = Run(asked, _known(turns, journal), served, stop, reader)
        run.start([client() for _ in range(min(concurrency, len(turns)))])
        answers = run.collect(journal, progress)

    write_answered(Path(output_path), turns, answers, tools, encoder, read_ids(records))
    return Path(output_path)


def _fields(max_new_tokens: int, sampling: dict, options: dict) -> dict:
    """What every request carries besides its messages."""
    sampling = sampling if sampling["temperature"] > 0 else {"temperature": 0.0}
    return {"max_tokens": max_new_tokens, **sampling, **({"chat_template_kwargs": options} if options else {})}


def _tell_comparison(served: ServedTarget, tokenizer) -> None:
    """Log how answers are compared with the rows of training, if not by their tokens."""
    if tokenizer is None:
        logger.info("Without a tokenizer answers are not compared with what will be trained on.")
    elif not served.tells_ids:
        logger.info(
            "The server at %s tells no token ids: answers are compared as text with what will be trained on.",
            served.client.url,
        )


def _known(turns: list, journal) -> list[list]:
    """The answers of earlier runs, from the journal."""
    answers = [[] for _ in turns]
    for row in journal.rows:
        check_fields(row, _ROW, journal.path, "delete it to begin anew")
        found = answers[row["id"]] if 0 <= row["id"] < len(answers) else []
        if found[-1:] == [None]:  # an earlier version continued after an empty answer
            continue

        if row["turn"] != len(found):
            raise ValueError(f"{journal.path} holds turn {row['turn']} of record {row['id']} out of order; delete it.")
        add_answer(found, Answer(**row["answer"]), turns[row["id"]])
    return answers
