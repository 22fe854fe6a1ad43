"""What of `storage` is refused, and that no message shows a secret."""

from __future__ import annotations

import importlib.util

import pytest

from tuner.spec.load import load_spec

POSTGRES = "storage.study=postgresql://tuner:${PASSWORD}@host/tuner"
S3 = "storage.root=s3://team/runs"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((S3,), "storage.study: got null, SQLite; allowed: a database beside an object store, such as postgresql://"),
        ((S3, "storage.study=sqlite:////tmp/s.db"), "storage.study: got SQLite; allowed: a database beside"),
        (("storage.root=gs://team/runs", POSTGRES), "storage.root: got 'gs://team/runs'; allowed: a folder, or s3://"),
        (("storage.root=s3://team/a b", POSTGRES), "storage.root: got 's3://team/a b'; allowed: a folder, or s3://"),
    ],
)
def test_places_where_no_sweep_can_be_kept_are_refused(messages_of, overrides, said):
    (message,) = messages_of(*overrides)
    assert message.startswith(said)


@pytest.mark.parametrize(
    "study",
    [
        *("sqlite://", "sqlite:///:memory:", "sqlite:///file::memory:?uri=true", "sqlite:////etc/passwd"),
        *("mysql://", "mysql+pymysql://host/db", "oracle://host/db", "postgresql://", "postgresql://${HOST}/db"),
        "postgresql://me:${PASSWORD}@${HOST}/db",
    ],
)
def test_a_database_that_no_sweep_can_be_recorded_in_is_refused(messages_of, study):
    (message,) = messages_of(f"storage.study={study}")
    assert message.startswith("storage.study: got ")


@pytest.mark.parametrize(
    "study",
    [
        "${DATABASE}",
        "postgresql://host/db",
        "postgresql+psycopg://${USER}:${PASSWORD}@host:5432/${DB}",
        "sqlite:////tmp/s.db",
    ],
)
def test_a_database_that_may_be_one_is_taken(messages_of, study):
    assert messages_of(f"storage.study={study}") == []


@pytest.mark.parametrize(
    "study",
    [
        "postgresql://me:hunter2@host/db",
        "postgresql://me:hunt/er2@host/db",
        "postgresql+psycopg://:hunter2@host/db",
        "postgresql://host/db?user=me&password=hunter2",
        "postgresql://me:${PASSWORD}hunter2@host/db",
        "me:hunter2@host/db",
    ],
)
def test_a_password_is_refused_wherever_it_stands_and_not_repeated(messages_of, study):
    (message,) = messages_of(f"storage.study={study}")
    assert "hunt" not in message
    assert "${TUNER_DB_PASSWORD}" in message


@pytest.mark.parametrize(
    "overrides", [(S3, POSTGRES), (S3, "storage.study=${DATABASE}"), ("storage.root=s3://b", POSTGRES)]
)
def test_an_object_store_beside_a_database_is_what_is_allowed(messages_of, overrides):
    assert messages_of(*overrides) == []


def test_a_url_is_the_same_from_every_folder_and_by_every_way(good, monkeypatch):
    monkeypatch.setenv("TUNER_ROOT", "s3://team/environment/")
    assert load_spec(good, [POSTGRES]).storage.root == "s3://team/environment"
    assert load_spec(good, [POSTGRES], root="s3://team/option").storage.root == "s3://team/option"


def test_a_driver_that_is_not_installed_is_said_with_the_extra_that_brings_it(messages_of, monkeypatch):
    found = importlib.util.find_spec
    missing = ("obstore", "psycopg")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else found(name))
    assert messages_of(S3, POSTGRES) == [
        "storage.root: got s3://...; allowed: what is installed here (pip install 'tuner[s3]')",
        "storage.study: got postgres...; allowed: what is installed here (pip install 'tuner[postgres]')",
    ]
