"""Let the target write prompts itself, so that no data set is needed: it continues where its chat template opens the
user's turn, and writes what users said in the data that it was tuned on (Magpie, https://arxiv.org/abs/2406.08464).
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
    """Sample what users might say, from the target itself; the file's lines are `{"messages": [a user's message]}`.

    Left out are prompts that were not finished within `max_new_tokens`, that hold a special token, or that were
    written before; the log counts them, and those that the server fails on. Each prompt goes to
    `<output_path>.journal` as it comes, and the same call asks only for the missing ones.

    Args:
        output_path (`str` or `Path`): written completely or not at all.
        server_url (`str`): of a server with OpenAI's completion API (vLLM, SGLang) that runs the target.
        target (`str`): folder or Hub id; the server must serve it.
        tokenizer: the target's, with its chat template.
        num_prompts (`int`): prompts to ask for; a few per cent are left out.
        template_kwargs (`dict`, *optional*): further arguments of the template; `tools` are on offer in every chat.
        system_prompts (`list[str]`, *optional*): system messages to take in turn, which steer what is asked about;
            they are not written. By default, what the template says if a chat has none.
        server_model (`str`, *optional*): the server's name for the target, if that cannot be found by `target`.
        api_key (`str`, *optional*): sent as a bearer token.
        max_new_tokens (`int`, *optional*, defaults to 256): greatest length of a prompt.
        concurrency (`int`, *optional*, defaults to 64): requests in flight together.
        temperature (`float`, *optional*, defaults to 1.0): above 0, or all prompts would be the same.
        top_p (`float`, *optional*, defaults to 0.95): nucleus.
        seed (`int`, *optional*, defaults to 0): each prompt has its own, made from it.
        retries (`int`, *optional*, defaults to 12): attempts after the first one, over two to three minutes.
        request_timeout (`float`, *optional*, defaults to 600.0): seconds that a prompt may take.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns the path. Raises a `ValueError` for an argument out of range, for a template that cannot be opened at the
    user's turn, or if no prompt is left, and a `ServerError` (a `ValueError` too) as `regenerate_through_server` does.
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
    """Lets the target write one prompt at a time, each with its own seed."""

    served: ServedTarget
    openings: list[tuple[str, str]]
    seed: int
    client: Callable[[], ChatClient]

    def __call__(self, id: int) -> dict | ServerError:
        """The row of a prompt, or the server's error if only this prompt fails."""
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
    """Append the row of every id that the journal lacks, as they come; a failure ends the others."""
    for row in journal.rows:
        check_fields(row, _ROW, journal.path, "delete it to begin anew")
        if not 0 <= row["id"] < number:
            raise ValueError(
                f"{journal.path} holds prompt {row['id']}, but there are {number}: delete it to begin anew."
            )
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

                # one prompt may be at fault, but not so many in a row
                if in_a_row >= SYSTEMATIC:
                    raise ServerError(f"{in_a_row} prompts in a row cannot be written, the last one since {row}.")
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise

    if failed:
        logger.warning(
            "%d prompts are missing, since the server fails on them; the same call asks for them again. One: %s",
            *(len(failed), failed[0]),
        )


def open_user_turn(tokenizer, system: str | None = None, template_kwargs: dict | None = None) -> tuple[str, str]:
    """The text up to what the user says, and how the template continues after it: where a prompt ends.

    Raises a `ValueError` if the template does not write a user's message as it is, with something after it.
    """
    messages = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": _MARK}]
    opening, mark, rest = ChatRenderer(tokenizer, template_kwargs).prompt(messages).partition(_MARK)
    end = rest.strip().splitlines()[0] if rest.strip() else ""

    if not mark or not end or (system is not None and system.strip() not in opening):
        raise ValueError(
            f"`target`'s chat template cannot be opened at the user's turn: of {messages} it makes "
            f"{(opening + mark + rest)[:300]!r}."
        )

    first = tokenizer.convert_ids_to_tokens(tokenizer(end, add_special_tokens=False)["input_ids"][0])
    return opening, first if end.startswith(first) and first in tokenizer.all_special_tokens else end


def _usable(rows: list[dict], tokenizer) -> list[str]:
    """Finished prompts, each once; raises a `ValueError` if there are none."""
    special = [token for token in tokenizer.all_special_tokens if token]
    finished = [row["text"] for row in rows if row["finish_reason"] == "stop" and row["text"]]
    plain = [text for text in finished if not any(token in text for token in special)]
    prompts = list(dict.fromkeys(plain))
    logger.info(
        "%d prompts; of %d written ones %d were not finished, %d held a special token, %d came twice.",
        *(len(prompts), len(rows), len(rows) - len(finished), len(finished) - len(plain), len(plain) - len(prompts)),
    )

    if not prompts:
        raise ValueError("No prompt was finished: raise `max_new_tokens`, or see what the journal holds.")
    return prompts


def _line(prompt: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": prompt}]}, ensure_ascii=False)
