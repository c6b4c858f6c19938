"""Batches are asked for ahead: each document once, a few batches at a time, whatever is taken of them."""

from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eagle.targets.asked_ahead import AskedAhead


HOW = st.sampled_from(["whole", "less", "never", "unknown"])
DOCUMENTS = st.lists(st.sampled_from([[1], [2], [1, 2], [3, 3]]), min_size=1, max_size=4)


class Server:
    """Remembers what it was asked for; answers at once."""

    def __init__(self):
        self.asked = []

    def __call__(self, ids):
        future = Future()
        future.ids = ids
        self.asked.append(future)
        return future


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(DOCUMENTS, st.sampled_from(["whole", "less", "never", "unknown"])), max_size=8),
    st.integers(1, 3),
)
def test_what_is_taken_is_what_was_asked_for(batches, most):
    server = Server()
    ahead = AskedAhead(server, most)
    for documents, how in batches:
        if how != "unknown":
            ahead.add(documents)
    for documents, how in batches:
        if how == "never":
            continue
        wanted = documents[:1] if how == "less" else documents
        taken = ahead.take(wanted)
        assert [future.ids for future in taken] == wanted
        assert not any(future.cancelled() for future in taken)
        assert len({id(future) for future in taken}) == len(taken)
        assert len(ahead._begun) <= most


@pytest.mark.parametrize("batches", [1, 5])
def test_each_document_is_asked_for_once_and_before_it_is_needed(batches):
    server = Server()
    ahead = AskedAhead(server)
    data = [[[n, k] for k in range(3)] for n in range(batches)]
    ahead.add(data[0])
    for n in range(batches):
        if n + 1 < batches:
            ahead.add(data[n + 1])  # a data loader is a batch ahead
        before = len(server.asked)
        assert before == 3 * min(n + 2, batches)
        ahead.take(data[n])
        assert len(server.asked) == before
    assert [future.ids for future in server.asked] == [ids for batch in data for ids in batch]


def test_an_accumulated_step_is_asked_for_a_few_batches_at_a_time():
    server = Server()
    ahead = AskedAhead(server, most=2)
    for n in range(6):
        ahead.add([[n]])
    for n in range(6):
        assert len(server.asked) == min(n + 2, 6)
        assert ahead.take([[n]])[0].ids == [n]


def test_the_same_document_twice_in_a_batch_is_asked_for_twice():
    server = Server()
    ahead = AskedAhead(server)
    ahead.add([[1], [1]])
    first, second = ahead.take([[1], [1]])
    assert first is not second and len(server.asked) == 2


def test_what_nobody_takes_is_dropped():
    """A run that stopped between steps, or filler rows at the end of a pass."""
    server = Server()
    ahead = AskedAhead(server)
    ahead.add([[1], [2]])
    ahead.add([[3], [4]])
    assert [future.ids for future in ahead.take([[3]])] == [[3]]
    assert [future.cancelled() for future in server.asked] == [True, True, False, True]


def test_forgetting_waits_for_what_is_under_way_and_no_longer():
    server = Server()
    ahead = AskedAhead(server)
    ahead.add([[1], [2]])
    server.asked[0].set_running_or_notify_cancel()
    ahead.forget(0.01)
    assert [future.cancelled() for future in server.asked] == [False, True]
    assert ahead.take([[1]])[0] is not server.asked[0]
