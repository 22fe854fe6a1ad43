"""Every server that a sweep asks may take the question and never answer: then a sentence is said, and soon."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import sqlalchemy as sa
from silent import silent

from tuner.errors import MachineError
from tuner.results import database
from tuner.spec import objects
from tuner.spec.in_time import in_time
from tuner.training import hub

pytestmark = pytest.mark.timeout(60)

DRIP = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
SERVERS = pytest.mark.parametrize("drip", [b"", DRIP], ids=["silent", "a byte at a time"])


def test_what_is_not_over_in_time_is_left_behind():
    began = time.monotonic()
    with pytest.raises(MachineError, match=r"who has not answered within 0.2 s"):
        in_time(0.2, "who", lambda: time.sleep(30))
    assert time.monotonic() - began < 5
    assert in_time(5, "who", lambda: 3) == 3
    with pytest.raises(KeyError, match="its own"):
        in_time(5, "who", lambda: {}["its own"])


@SERVERS
def test_a_hub_that_does_not_answer_is_given_up(monkeypatch, drip):
    from huggingface_hub import constants

    from tuner.training.model import pretrained_source

    model = {"name": "some/model", "gguf_file": None, "revision": "main", "trust_remote_code": False}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ANSWER_S", 0.5)
    hub._silence.cache_clear()
    with silent(drip) as port:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        with pytest.raises(MachineError, match=rf"the hub http://127.0.0.1:{port} has not answered .*HF_HUB_OFFLINE=1"):
            pretrained_source(model, None)
    hub._silence.cache_clear()
    hub.refuse_silent_hub()  # nobody is there: its client says so by itself, and takes what is in the cache
    hub._silence.cache_clear()


def test_a_database_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setitem(database._LINK, "connect_timeout", 2)
    began = time.monotonic()
    with silent() as port:
        engine = database.connect(sa.make_url(f"postgresql+psycopg://tuner:secret@127.0.0.1:{port}/study"))
        with pytest.raises(MachineError, match=r"study: the database cannot be used"), database.one_at_a_time(engine):
            pass
    assert time.monotonic() - began < 20


def test_what_the_url_says_of_the_link_is_left_as_it_is():
    options = database.engine_options(sa.make_url("postgresql+psycopg://tuner@host/study?connect_timeout=3"))
    assert "connect_timeout" not in options["connect_args"]
    assert options["connect_args"]["tcp_user_timeout"] == 60_000


@SERVERS
def test_an_object_store_that_does_not_answer_is_given_up(monkeypatch, drip):
    named = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
    monkeypatch.setattr(objects, "_PATIENCE", timedelta(seconds=1))
    monkeypatch.setattr(objects, "_ANSWER", timedelta(seconds=1))
    began = time.monotonic()
    with silent(drip) as port:
        for name, value in {**named, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(MachineError, match="s3://team/runs: "):
            objects.Objects("s3://team/runs").read("sweeps/some/spec.yaml")
    assert time.monotonic() - began < 20
