"""Regenerate answers through a server, in children that can be killed: see forks.py."""

import logging
import sys

from forks import serve_forks

from hf_eagle.answers import chat_client
from hf_eagle.answers.served_answers import regenerate_through_server


CONCURRENCY = 8
chat_client.FIRST_DELAY = 0.002  # the tests' server recovers at once


def records(number: int = 250) -> list[dict]:
    """One to three user turns each, some after a system message, some with an image, answers to be replaced."""
    chats = []
    for n in range(number):
        messages = [{"role": "system", "content": "Be brief."}] * (n % 4 == 0)
        for turn in range(1 + n % 3):
            content = f"what is {n} and {turn}?"
            if n % 5 == 0:
                image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{n}"}}
                content = [image, {"type": "text", "text": content}]
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": "somebody else's"}]
        chats.append({"messages": messages})
    return chats


def regenerate(output, url: str, temperature: float = 0.0, **arguments):
    arguments = {"records": records(), "max_new_tokens": 12, "concurrency": CONCURRENCY, **arguments}
    arguments = {"target": "target", "progress": False, "temperature": float(temperature), **arguments}
    return regenerate_through_server(output_path=output, server_url=url, **arguments)


if __name__ == "__main__":
    assert "torch" not in sys.modules, "asking a server needs no torch"
    logging.disable(logging.WARNING)
    serve_forks(regenerate)
