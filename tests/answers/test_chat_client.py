"""What a client asks again, what it refuses, and how it says so; against a real socket."""

import socket
import threading
import time

import pytest
from chat_server import ChatServer, answer

from hf_eagle.answers import chat_client
from hf_eagle.answers.chat_client import Aborted, Broken, ChatClient, Refused, ServerError, TooLong, Unavailable


BAD_TIMES = (0.0, -1.0, float("inf"), float("nan"), 1e30)
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(chat_client, "FIRST_DELAY", 0.002)


def ask(server: ChatServer, **arguments):
    client = ChatClient(server.url, **arguments)
    try:
        return client.chat({"model": "target", "messages": HI})
    finally:
        client.close()


def first(*faults):
    """These faults, in order, then none."""
    return lambda number, body: faults[number] if number < len(faults) else None


def test_an_answer_and_the_list_of_models():
    with ChatServer(count=len) as server:
        found = ask(server)
        assert (found.text, found.finish_reason) == answer(HI)
        assert (found.prompt_tokens, found.completion_tokens) == (1, 7)
        assert [model.id for model in ChatClient(server.url + "/v1/").models()] == ["target"]


def test_token_ids_are_told_to_whom_asks():
    """Then thoughts and calls may be split off; ids that are none are an answer that cannot be read."""
    message = {"role": "assistant", "content": None, "reasoning": "hm"}
    with ChatServer(say=lambda body: ([1, 2], [3, 4], message, "stop")) as server:
        found = ChatClient(server.url).chat({"model": "target", "messages": HI, "return_token_ids": True})
        assert (found.prompt_ids, found.token_ids, found.text) == ([1, 2], [3, 4], "")
        with pytest.raises(ServerError, match="start it without its reasoning parser"):
            ask(server)
    for prompt, ids in ((7, [1]), ([1], "abc"), ([1], [True]), (["a"], [1])):
        with ChatServer(say=lambda body, told=(prompt, ids): (*told, message, "stop")) as server:
            client = ChatClient(server.url, retries=0)
            with pytest.raises(Unavailable, match="an answer that cannot be read"):
                client.chat({"model": "target", "messages": HI, "return_token_ids": True})
            client.close()


@pytest.mark.parametrize(
    "fault",
    [(429, "busy"), (500, "broken"), (503, "not yet"), (408, "late"), "drop", "cut", "garbage", "empty", "abort"],
)
def test_what_passes_is_asked_again(fault):
    with ChatServer(fault=first(fault, fault)) as server:
        assert (ask(server, retries=2).text, server.asked) == (answer(HI)[0], 3)
    with ChatServer(fault=lambda *_: fault) as server:
        with pytest.raises(Unavailable, match="failed 3 times in a row, the last time with: .*then run the same again"):
            ask(server, retries=2)
        assert server.asked == 3


def test_a_slow_answer_is_a_fault():
    with ChatServer(fault=first(1.0)) as server:
        assert ask(server, timeout=0.2).text == answer(HI)[0]
    with ChatServer(fault=lambda *_: 1.0) as server:
        with pytest.raises(Unavailable, match=r"TimeoutError: timed out \(`request_timeout` is 0.1 seconds\)"):
            ask(server, timeout=0.1, retries=1)


def test_delays_double_with_jitter_and_the_server_may_ask_for_more(monkeypatch):
    waited = []

    class Stop(threading.Event):
        def wait(self, timeout=None):
            waited.append(timeout)
            return False

    monkeypatch.setattr(chat_client, "FIRST_DELAY", 0.5)
    with ChatServer(fault=lambda *_: (500, "broken")) as server:
        with pytest.raises(Unavailable):
            ask(server, retries=9, stop=Stop())
    assert len(waited) == 9 and len({round(s / 2**n, 6) for n, s in enumerate(waited)}) > 5
    assert all(0.5 * min(60, 2**n) * 0.5 <= s <= 0.5 * min(60, 2**n) for n, s in enumerate(waited))
    waited.clear()
    with ChatServer(fault=first((429, "busy", {"Retry-After": "7"}))) as server:
        ask(server, stop=Stop())
    assert waited == [7.0]


@pytest.mark.parametrize("asked", ["301", "86400", "9" * 40])
def test_no_server_makes_us_wait_for_a_day(asked):
    with ChatServer(fault=lambda *_: (429, "busy", {"Retry-After": asked})) as server:
        with pytest.raises(
            Unavailable, match=r"asks to wait .* seconds \(429 .*busy\), but the longest wait is 300"
        ) as caught:
            ask(server, retries=5)
        assert caught.value.busy and server.asked == 1


@pytest.mark.parametrize("asked", ["-5", "1e3", "soon", "\u00b2", "", "Wed, 21 Oct 2065 07:28:00 GMT"])
def test_a_wait_that_is_no_number_of_seconds_is_passed_over(asked):
    with ChatServer(fault=first((503, "busy", {"Retry-After": asked}))) as server:
        assert ask(server, retries=1).text == answer(HI)[0]


def test_an_answer_that_nobody_can_train_on_is_asked_once():
    for content, reason in (("a\ud800", "half a character"), ("my sk-planted-key", "the key that it was asked with")):
        message = {"role": "assistant", "content": content}
        with ChatServer(say=lambda body, message=message: ([1], [2], message, "stop")) as server:
            with pytest.raises(Broken, match=f"the answer of the server at .* holds {reason}") as caught:
                ask(server, retries=5, api_key="sk-planted-key")
            assert server.asked == 1 and "planted" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"retries": -1}, "`retries` must be 0 or more"),
        ({"retries": 10**9}, "`retries` must be 0 or more, and at most 1000"),
        *(
            ({"timeout": seconds}, "`request_timeout` must be above 0 seconds and at most 86400")
            for seconds in BAD_TIMES
        ),
    ],
)
def test_numbers_have_bounds(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChatClient("http://localhost", **arguments)


def test_what_does_not_pass_is_said_once():
    cases = [
        ((400, "This model's maximum context length is 512 tokens."), TooLong, "refuses it with 400 .*512 tokens"),
        ((400, "The image cannot be read."), Refused, "refuses it with 400 Bad Request: The image cannot be read."),
        ((422, "Field required"), Refused, "422 .*Field required"),
        ((404, "The model `x` does not exist."), ServerError, "answers POST /v1/chat/completions with 404"),
        ((403, "No."), ServerError, "OPENAI_API_KEY"),
        ((307, "elsewhere"), ServerError, "with 307 .*elsewhere"),
        ("thinks", ServerError, "start it without its reasoning parser"),
    ]
    for fault, kind, message in cases:
        with ChatServer(fault=lambda *_, fault=fault: fault) as server:
            with pytest.raises(ServerError, match=message) as caught:
                ask(server)
            assert type(caught.value) is kind and server.asked == 1
    with ChatServer(key="secret") as server:
        with pytest.raises(ServerError, match="with 401 .*OPENAI_API_KEY"):
            ask(server)
        assert ask(server, api_key="secret").text == answer(HI)[0]


def test_addresses():
    for url in ("localhost:8000", "ftp://x", "http://", ""):
        with pytest.raises(ValueError, match="`server_url` must look like http://localhost:8000, got"):
            ChatClient(url)
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(Unavailable, match="failed 2 times in a row, the last time with: ConnectionRefusedError"):
            ChatClient(f"http://127.0.0.1:{unused.getsockname()[1]}", retries=1).models()


def test_a_connection_is_kept_and_made_anew_when_the_server_closed_it():
    with ChatServer() as server:
        client = ChatClient(server.url, retries=0)
        client.chat({"model": "target", "messages": HI})
        kept = client._connection._http
        client.chat({"model": "target", "messages": HI})
        assert client._connection._http is kept
        kept.sock.shutdown(socket.SHUT_WR)  # what an idle server's close looks like
        assert client.chat({"model": "target", "messages": HI}).text == answer(HI)[0]
        assert client._connection._http is not kept
        client.close()


def test_abort_ends_a_request_under_way():
    stop = threading.Event()
    with ChatServer(delay=20.0) as server:
        client = ChatClient(server.url, stop=stop)
        ended = []

        def work():
            try:
                client.chat({"model": "target", "messages": HI})
            except Aborted:
                ended.append(True)

        thread = threading.Thread(target=work)
        thread.start()
        while not server.under_way:
            time.sleep(0.005)
        stop.set()
        client.abort()
        thread.join()
        assert ended == [True]
