"""Let the target write prompts itself, so that no data set is needed. It continues where its chat template opens the
user's turn, and writes prompts like those it was tuned on (Magpie, https://arxiv.org/abs/2406.08464).
"""

import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from ..data.rendering import ChatRenderer
from ..door.journal import Journal, journal_beside
from ..door.json_files import check_fields
from ..door.writing import write_atomically
from .answer import START_OVER
from .chat_client import ChatClient, ServerError
from .served_run import SYSTEMATIC
from .served_target import ServedTarget
from .turns import check_arguments, turn_seed


logger = logging.getLogger(__name__)

_ROW = {"id": int, "text": str, "finish_reason": str}  # of a journal
_MARK = "USERSTURN"  # stands for the user's text in a rendered template


def write_prompts(
    output_path: str | Path,
    *,
    server_url: str,
    target: str,
    tokenizer,
    num_prompts: int,
    template_kwargs: dict | None = None,
    system_prompts: list[str] | None = None,
    server_model: str | None = None,
    api_key: str | None = None,
    max_new_tokens: int = 256,
    concurrency: int = 64,
    temperature: float = 1.0,
    top_p: float = 0.95,
    seed: int = 0,
    retries: int = 12,
    request_timeout: float = 600.0,
    progress: bool = True,
) -> Path:
    """Sample user prompts from the target itself; the file's lines are `{"messages": [a user message]}`.

    Prompts are left out if they were not finished within `max_new_tokens`, contain a special token, or repeat an
    earlier prompt; the log counts these, and those that the server fails on. Each prompt goes to
    `<output_path>.journal` as it arrives, so the next call asks only for the missing prompts.

    Args:
        output_path (`str` or `Path`): file to write, completely or not at all.
        server_url (`str`): address of a server with OpenAI's completion API (vLLM, SGLang) that runs the target.
        target (`str`): folder or Hub id of the target, which must be the model behind `server_url`.
        tokenizer: the target's tokenizer, with its chat template.
        num_prompts (`int`): prompts to ask for; a few per cent are left out.
        template_kwargs (`dict`, *optional*): extra keyword arguments for the template; every chat offers its `tools`.
        system_prompts (`list[str]`, *optional*): system messages to use in turn, which steer the topics; they are not
            written. By default, the system message that the template adds to a chat without one, if any.
        server_model (`str`, *optional*): the server's name for the target, if it cannot be derived from `target`.
        api_key (`str`, *optional*): sent as a bearer token.
        max_new_tokens (`int`, *optional*, defaults to 256): maximum number of tokens in a prompt.
        concurrency (`int`, *optional*, defaults to 64): maximum number of requests in flight.
        temperature (`float`, *optional*, defaults to 1.0): above 0, or all prompts would be the same.
        top_p (`float`, *optional*, defaults to 0.95): nucleus-sampling threshold.
        seed (`int`, *optional*, defaults to 0): base seed; each prompt derives its own seed from it.
        retries (`int`, *optional*, defaults to 12): maximum number of retries; 12 take two to three minutes.
        request_timeout (`float`, *optional*, defaults to 600.0): timeout of one request, in seconds.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns the path. Raises a `ValueError` for an argument out of range, for a template that cannot be opened at the
    user's turn, or if no prompt is left. Raises a `ServerError` (also a `ValueError`) as `regenerate_through_server`.
    """
    counts = {"num_prompts": num_prompts, "max_new_tokens": max_new_tokens, "concurrency": concurrency}
    check_arguments(counts, temperature, top_p, seed)
    if temperature == 0:
        raise ValueError("`temperature` must be above 0: a greedy target writes one prompt again and again.")

    output_path, stop = Path(output_path), threading.Event()

    def client() -> ChatClient:
        return ChatClient(server_url, api_key, request_timeout, retries, stop)

    first = client()
    openings = [open_user_turn(tokenizer, system, template_kwargs) for system in system_prompts or [None]]
    sampling = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    writer = _Writer(ServedTarget.find(first, target, server_model, sampling), openings, seed, client)
    first.close()

    settings = {"target": str(target), "openings": openings, "num_prompts": num_prompts, "seed": seed, **sampling}
    with journal_beside(output_path, settings) as journal:
        _write_missing(journal, writer, num_prompts, concurrency, stop, progress)
        rows = sorted(journal.rows, key=lambda row: row["id"])
    write_atomically(output_path, map(_line, _usable(rows, tokenizer)))
    return output_path


@dataclass
class _Writer:
    """Let the target write one prompt at a time, each with its own seed."""

    served: ServedTarget
    openings: list[tuple[str, str]]
    seed: int
    client: Callable[[], ChatClient]

    def __call__(self, id: int) -> dict | ServerError:
        """Return the journal row of a prompt, or the server's error if only this prompt fails."""
        opening, end = self.openings[id % len(self.openings)]
        body = {"model": self.served.model, "prompt": opening, "stop": [end], **self.served.fields}
        body |= {"seed": turn_seed(self.seed, id), "skip_special_tokens": False}

        client = self.client()
        try:
            answer = client.complete(body)
        except ServerError as problem:
            if not self.served.fails_alone(problem, client):
                raise
            return problem
        finally:
            client.close()
        return {"id": id, "text": answer.text.split(end)[0].strip(), "finish_reason": answer.finish_reason}


def _write_missing(
    journal: Journal, writer: _Writer, number: int, concurrency: int, stop: threading.Event, progress: bool
) -> None:
    """Append the row of every id that the journal lacks, as rows arrive; a failure ends the other requests."""
    for row in journal.rows:
        check_fields(row, _ROW, journal.path, START_OVER)
        if not 0 <= row["id"] < number:
            raise ValueError(f"{journal.path} holds prompt {row['id']}, but there are {number}: {START_OVER}.")
    missing = sorted(set(range(number)) - {row["id"] for row in journal.rows})

    failed, in_a_row = [], 0
    bar = tqdm(total=number, initial=number - len(missing), unit="prompt", disable=not progress)
    with bar, ThreadPoolExecutor(concurrency) as pool:
        try:
            for done in as_completed([pool.submit(writer, id) for id in missing]):
                row = done.result()
                if isinstance(row, dict):
                    journal.append(row)
                    in_a_row = 0
                else:
                    failed.append(row)
                    in_a_row += 1
                bar.update()

                # one prompt may be at fault, but not so many consecutive ones
                if in_a_row >= SYSTEMATIC:
                    raise ServerError(f"{in_a_row} consecutive prompts cannot be written, the last one since {row}.")
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise

    if failed:
        logger.warning(
            "%d prompts are missing, since the server fails on them; the next call asks for them again. First: %s",
            *(len(failed), failed[0]),
        )


def open_user_turn(tokenizer, system: str | None = None, template_kwargs: dict | None = None) -> tuple[str, str]:
    """Return the template's text before a user's message, and the text right after it, where a prompt ends.

    Raises a `ValueError` if the template changes a user's message, or writes nothing after it.
    """
    messages = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": _MARK}]
    opening, mark, rest = ChatRenderer(tokenizer, template_kwargs).prompt(messages).partition(_MARK)
    end = rest.strip().splitlines()[0] if rest.strip() else ""

    if not mark or not end or (system is not None and system.strip() not in opening):
        raise ValueError(
            f"`target`'s chat template cannot be opened at the user's turn: it renders {messages} as "
            f"{(opening + mark + rest)[:300]!r}."
        )

    first = tokenizer.convert_ids_to_tokens(tokenizer(end, add_special_tokens=False)["input_ids"][0])
    return opening, first if end.startswith(first) and first in tokenizer.all_special_tokens else end


def _usable(rows: list[dict], tokenizer) -> list[str]:
    """Return the finished prompts without duplicates; raise a `ValueError` if there are none."""
    special = [token for token in tokenizer.all_special_tokens if token]
    finished = [row["text"] for row in rows if row["finish_reason"] == "stop" and row["text"]]
    plain = [text for text in finished if not any(token in text for token in special)]
    prompts = list(dict.fromkeys(plain))
    logger.info(
        "%d prompts; of %d written ones %d were not finished, %d held a special token, %d were duplicates.",
        *(len(prompts), len(rows), len(rows) - len(finished), len(finished) - len(plain), len(plain) - len(prompts)),
    )

    if not prompts:
        raise ValueError("No prompt was finished: raise `max_new_tokens`, or look into the journal.")
    return prompts


def _line(prompt: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": prompt}]}, ensure_ascii=False)
