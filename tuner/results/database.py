"""Where a sweep's records are: SQLite in its folder, or any database SQLAlchemy reaches."""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa

from tuner.errors import Problem, SpecError
from tuner.spec.layout import SweepFolder
from tuner.spec.sweep import SweepSpec

BUSY_TIMEOUT_S = 60
"""How long a connection to SQLite waits for another process to finish writing."""


def database_url(spec: SweepSpec, folder: SweepFolder, mode: str) -> sa.URL:
    """Where the records are. `${VAR}` is expanded here, at use: the password stands in no file and no message."""
    if spec.storage.study is None:
        return _sqlite_url(str(folder.study), mode)
    url = sa.make_url(re.sub(r"\$\{(\w+)\}", _environment, spec.storage.study))
    return _sqlite_url(url.database or "", mode) if url.get_backend_name() == "sqlite" else url


def _environment(match: re.Match[str]) -> str:
    variable = match[1]
    if variable not in os.environ:
        raise SpecError([Problem("storage.study", match[0], f"a variable that is set; {variable} is not")])
    return os.environ[variable]


def _sqlite_url(path: str, mode: str) -> sa.URL:
    """An URL that creates the file only with mode `rwc`; a file that this user may only read is opened for reading."""
    return sa.URL.create("sqlite", database=f"file:{quote(path)}", query={"mode": mode, "uri": "true"})


def engine_options(url: sa.URL, durable: bool = True) -> dict[str, Any]:
    """For `create_engine`. A commit to SQLite that is not durable outlives this process, whatever kills it; a power cut
    it outlives as soon as a durable one has followed, by whatever connection.
    """
    if url.get_backend_name() != "sqlite":
        return {"pool_pre_ping": True}
    options: dict[str, Any] = {"connect_args": {"timeout": BUSY_TIMEOUT_S}}
    return options if durable else options | {"pool_events": [(_sync_with_the_next, "connect")]}


def _sync_with_the_next(connection: Any, _: object) -> None:
    connection.execute("PRAGMA synchronous=NORMAL")
