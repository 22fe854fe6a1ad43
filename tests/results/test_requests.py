"""What other processes ask of a running sweep's driver: each request is answered or withdrawn, never both."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from made_by_hand import TRIALS, make_sweep

from tuner.errors import TunerError
from tuner.results.requests import Request, Requests
from tuner.results.store import Store

pytestmark = [pytest.mark.usefixtures("database"), pytest.mark.timeout(60)]


@pytest.fixture
def store(tmp_path) -> Store:
    return make_sweep(tmp_path, TRIALS[:1], status=None)


def asked(requests: Requests, id: int, driven: Callable[[], bool] = lambda: True, timeout_s: float = 30) -> list[Any]:
    """What comes of waiting for an answer, in a thread: the answer or the refusal, once it is there."""
    came: list[Any] = []

    def wait() -> None:
        try:
            came.append(requests.wait(id, driven, timeout_s))
        except TunerError as error:
            came.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    came.append(thread)
    return came


def outcome(came: list[Any]) -> Any:
    came.pop(0).join(30)
    return came.pop()


def test_a_request_is_taken_once_and_its_answer_reaches_who_asked(store):
    there = Store.open(store.folder).requests
    add, cancel = there.ask("add", {"lora.r": 8}), there.ask("cancel", 3)
    waiting = [asked(there, id) for id in (add, cancel)]
    assert store.requests.take("end") == []
    assert store.requests.take("add", "cancel") == [Request(add, "add", {"lora.r": 8}), Request(cancel, "cancel", 3)]
    assert store.requests.take("add", "cancel") == []
    store.requests.answer(add, 7)
    store.requests.answer(cancel, refusal="trial 3 does not run")
    assert [outcome(came) for came in waiting] == [7, "trial 3 does not run"]


def test_requests_of_another_sweep_in_the_same_database_are_not_this_one_s(store, tmp_path):
    other = make_sweep(tmp_path, [], status=None, name="other")
    other.requests.ask("cancel", 0)
    assert store.requests.take("cancel") == []
    assert len(other.requests.take("cancel")) == 1


def test_what_was_not_answered_in_time_is_withdrawn_and_never_done(store):
    id = store.requests.ask("cancel", 0)
    said = outcome(asked(store.requests, id, timeout_s=0.1))
    assert said == "the driver of 'pydoc-lora' has not answered in 0 s; nothing is done"
    assert store.requests.take("cancel") == []


def test_what_was_taken_in_time_is_waited_for(store):
    id = store.requests.ask("cancel", 0)
    assert len(store.requests.take("cancel")) == 1
    came = asked(store.requests, id, timeout_s=1)
    came[0].join(1.5)
    assert came[0].is_alive()
    store.requests.answer(id)
    assert outcome(came) is None
    hangs = store.requests.ask("cancel", 1)
    store.requests.take("cancel")
    said = outcome(asked(store.requests, hangs, timeout_s=0.1))
    assert said == "the driver of 'pydoc-lora' began it, but has not answered in 0 s"


def test_a_driver_that_is_gone_answers_nothing_and_the_next_one_hears_nothing_of_it(store):
    id, forgotten = store.requests.ask("cancel", 0), store.requests.ask("cancel", 1)
    said = outcome(asked(store.requests, id, driven=lambda: False))
    assert said == "the driver of 'pydoc-lora' ended before it answered"
    store.set_status("interrupted")
    store.take_over(store.status())
    assert store.requests.take("cancel") == []
    assert store.requests.withdraw(forgotten) is False


def test_the_answer_of_a_driver_that_has_ended_since_is_heard(store):
    id = store.requests.ask("add", {})
    store.requests.take("add")

    def last_words() -> bool:
        store.requests.answer(id, 4)
        return False

    assert outcome(asked(store.requests, id, driven=last_words)) == 4


@pytest.mark.sqlite
def test_who_may_only_read_is_told_so(store, monkeypatch):
    import sqlalchemy as sa

    engine = sa.create_engine(f"sqlite:///file:{store.folder.study}?mode=ro&uri=true")
    reading = Requests(engine, "pydoc-lora", engine.begin)
    with pytest.raises(TunerError, match="cannot be asked: attempt to write a readonly database"):
        reading.ask("cancel", 0)
