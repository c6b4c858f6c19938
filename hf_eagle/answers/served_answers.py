"""Get the target's answers from an OpenAI-compatible server: many records at once, the turns of each in order."""

import logging
import threading
from pathlib import Path

from ..data.loss_mask import ConversationEncoder
from ..door.journal import Journal
from ..door.json_files import check_fields
from .answer import START_OVER, Answer, AnswerReader, add_answer, read_answer
from .chat_client import ChatClient
from .served_run import Asked, Run
from .served_target import ServedTarget
from .turns import check_arguments, open_journal, read_ids, read_offers, read_turns
from .written_answers import write_answered


logger = logging.getLogger(__name__)

_JOURNAL_ROW = {"id": int, "turn": int, "answer": dict}


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
    """Answer the user turns of `records` through a server that runs the target, and write them to a file.

    The file has the format of `regenerate_answers`. At most `concurrency` records are in progress at a time. Each
    answer is appended to `<output_path>.journal` as it arrives, so after an interruption the same call requests only
    the missing ones. Messages are sent unchanged, with their images and videos; only local files become data URLs.

    A server that reports token ids (vLLM) may return reasoning and tool calls apart from the answer's text: they are
    read from the ids. Given a tokenizer, every conversation is compared with the row that training makes of it, and
    left out if the two differ. They are compared by token ids if the server reports them, else as text, which is
    logged.

    Transient errors are retried (see `ChatClient`). A record ends early at a prompt that exceeds the server's context,
    that the server refuses, or that it fails on while it still answers a one-word chat. A warning counts such records;
    the same call asks for those again that may succeed. The run stops if the server cannot be reached or refuses every
    prompt.

    Args:
        records (`datasets.Dataset` or list of dict): chat records of any form that `to_messages` reads.
        output_path (`str` or `Path`): written completely or not at all.
        server_url (`str`): such as `http://localhost:8000`.
        target (`str`): folder or Hub id of the target, which the server must run.
        server_model (`str`, *optional*): the server's name for the target, if it differs from `target`.
        tokenizer (*optional*): the target's. If given, the server's prompts of a few records are checked against it,
            and every conversation is compared with the row that training makes of it.
        api_key (`str`, *optional*): sent as a bearer token.
        max_new_tokens (`int`, *optional*, defaults to 128): largest number of tokens in an answer.
        concurrency (`int`, *optional*, defaults to 64): largest number of requests in flight.
        temperature (`float`, *optional*, defaults to 0.0): 0 is greedy.
        top_p (`float`, *optional*, defaults to 1.0): threshold of nucleus sampling; unused if greedy.
        seed (`int`, *optional*, defaults to 0): each turn of each record is sampled with a seed made from this one.
        retries (`int`, *optional*, defaults to 12): attempts after the first one; 12 take two to three minutes.
        request_timeout (`float`, *optional*, defaults to 600.0): longest time of one request, in seconds.
        time_limit (`float`, *optional*): seconds after which no request starts, though each worker sends at least one.
            The file then holds the records answered so far, and the same call continues.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.
        template_kwargs (`dict`, *optional*): further arguments of the chat template, as for `regenerate_answers`.
        media_root (`str`, *optional*): folder that relative paths of media start from; by
            default the folder of the file that a record was read from.

    Returns the path. Raises a `ValueError` as `regenerate_answers` does, and its subclass `ServerError` if the server
    runs a different model, makes different prompts, or does not answer.
    """
    counts = {"max_new_tokens": max_new_tokens, "concurrency": concurrency}
    check_arguments(counts, temperature, top_p, seed, time_limit)
    stop = threading.Event()

    def new_client() -> ChatClient:
        return ChatClient(server_url, api_key, request_timeout, retries, stop)

    # made first, since it checks the form of address and key, and reading the records may take long
    first = new_client()
    turns, tools = read_turns(records, True, media_root), read_offers(records, template_kwargs)
    encoder = None if tokenizer is None else ConversationEncoder(tokenizer, None, template_kwargs)

    options = {name: value for name, value in (template_kwargs or {}).items() if name != "tools"}
    sampling = {"temperature": temperature, "top_p": top_p}
    served = ServedTarget.find(first, target, server_model, _shared_fields(max_new_tokens, sampling, options))
    if tokenizer is not None:
        served.check_prompts(tokenizer, turns, tools, template_kwargs)
    first.close()  # each worker gets its own
    _log_comparison(served, tokenizer)

    # a journal that was begun with other settings or questions is refused
    settings = {"target": str(target), "answered_by": "server", "max_new_tokens": max_new_tokens}
    settings |= sampling | {"seed": seed}
    # `None` without options and tools, so that `{}` and `None` as `template_kwargs` continue the same journal
    asked_with = [options, tools] if options or any(tools) else None
    reader = None if tokenizer is None else AnswerReader(tokenizer, template_kwargs)
    with open_journal(Path(output_path), turns, settings, asked_with) as journal:
        asked = Asked(turns, tools, seed if temperature > 0 else None, time_limit)
        run = Run(asked, _answers_in(journal, turns), served, stop, reader)
        run.start([new_client() for _ in range(min(concurrency, len(turns)))])
        answers = run.collect(journal, progress)

    write_answered(Path(output_path), turns, answers, tools, encoder, read_ids(records))
    return Path(output_path)


def _shared_fields(max_new_tokens: int, sampling: dict, options: dict) -> dict:
    """Return the fields that all requests share."""
    # greedy decoding has no use for `top_p`
    sampling = sampling if sampling["temperature"] > 0 else {"temperature": 0.0}
    return {"max_tokens": max_new_tokens, **sampling, **({"chat_template_kwargs": options} if options else {})}


def _log_comparison(served: ServedTarget, tokenizer) -> None:
    """Log it if answers are not compared with the rows of training, or only as text."""
    if tokenizer is None:
        logger.info("No tokenizer was given, so answers are not compared with the rows that training makes of them.")
    elif not served.tells_ids:
        logger.info(
            "The server at %s reports no token ids, so answers are compared with the rows of training as text.",
            served.client.url,
        )


def _answers_in(journal: Journal, turns: list) -> list[list[Answer | None]]:
    """Return the answers of earlier runs, per record; raise `ValueError` for a row that belongs to no open turn."""
    answers: list[list[Answer | None]] = [[] for _ in turns]
    for row in journal.rows:
        check_fields(row, _JOURNAL_ROW, journal.path, START_OVER)
        id, turn = row["id"], row["turn"]
        if not 0 <= id < len(turns):
            raise ValueError(f"{journal.path} answers record {id}, but there are {len(turns)} records: {START_OVER}.")
        if answers[id][-1:] == [None]:  # older versions of hf_eagle asked on after an empty answer
            continue

        if turn != len(answers[id]) or turn >= len(turns[id]):
            raise ValueError(f"{journal.path} holds turn {turn} of record {id} out of order: {START_OVER}.")
        add_answer(answers[id], read_answer(row, journal.path), turns[id])
    return answers
