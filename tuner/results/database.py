"""Where a sweep's records are: SQLite in its folder, or any database SQLAlchemy reaches."""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ParamSpec, TypeVar
from urllib.parse import quote

import sqlalchemy as sa

from tuner.errors import MachineError, Problem, SpecError, TunerError
from tuner.spec.layout import SweepFolder
from tuner.spec.sweep import SweepSpec

_MAKES_TABLES = 0x7475_6E65_72
"""Number of the lock, among those that programs agree on in PostgreSQL."""
BUSY_TIMEOUT_S = 60
"""How long a connection to SQLite waits for another process to finish writing."""
AWAY_S = 300.0
"""How long a database may be away in the middle of a sweep, as a server is that is started again."""
_LOOK_S = 0.5
_LINK = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "tcp_user_timeout": 60_000}
"""Of libpq: seconds, but for the last; how soon a server counts as away that does not answer, or is cut off."""

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_logger = logging.getLogger(__name__)


def database_url(spec: SweepSpec, folder: SweepFolder, mode: str) -> sa.URL:
    """Where the records are. `${VAR}` is expanded here, at use: the password stands in no file and no message."""
    if spec.storage.study is None:
        return _sqlite_url(str(folder.study), mode)
    account, at, place = spec.storage.study.rpartition("@")
    account = _VARIABLE.sub(lambda match: quote(_environment(match), safe=""), account)
    try:
        url = sa.make_url(account + at + _VARIABLE.sub(_environment, place))
    except (sa.exc.ArgumentError, ValueError):  # whose words may quote what the variables hold
        raise SpecError([Problem("storage.study", spec.storage.study, "an SQLAlchemy URL, once filled in")]) from None
    return _sqlite_url(url.database or "", mode) if url.get_backend_name() == "sqlite" else url


_VARIABLE = re.compile(r"\$\{(\w+)\}")


def _environment(match: re.Match[str]) -> str:
    variable = match[1]
    if variable not in os.environ:
        raise SpecError([Problem("storage.study", match[0], f"a variable that is set; {variable} is not")])
    return os.environ[variable]


def _sqlite_url(path: str, mode: str) -> sa.URL:
    """An URL that creates the file only with mode `rwc`; a file that this user may only read is opened for reading."""
    return sa.URL.create("sqlite", database=f"file:{quote(path)}", query={"mode": mode, "uri": "true"})


def connect(url: sa.URL) -> sa.Engine:
    """An engine for a database. Raises `SpecError` for one that is not known here, or whose driver is not installed."""
    try:
        return sa.create_engine(url, **engine_options(url))
    except (ModuleNotFoundError, sa.exc.NoSuchModuleError) as error:
        raise SpecError([Problem("storage.study", url.drivername, f"what is installed here ({error})")]) from None


def use_wal(engine: sa.Engine) -> None:
    """Let readers of SQLite read while a driver writes."""
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")


def leave_wal(path: Path) -> None:
    """Make records that nobody writes any more one file, which also a reader without write permission can open.

    Where somebody reads them just now they stay as they are, which any reader with write permission can open.
    """
    with suppress(sqlite3.Error), closing(sqlite3.connect(path, timeout=0)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")


@contextmanager
def readable(path: Path) -> Iterator[sa.URL]:
    """An URL for records of which this user may write neither file nor folder.

    A driver that is at work, or was cut off, has left a write-ahead log and an index to it, which SQLite reads. A log
    without an index, as in a copy of the folder, is read from a copy: SQLite would have to write the index.
    """
    log, index = (path.with_name(f"{path.name}-{kind}") for kind in ("wal", "shm"))
    if index.exists():
        yield _sqlite_url(str(path), "ro")
        return
    if not log.exists() or not log.stat().st_size:
        yield _sqlite_url(str(path), "ro").update_query_dict({"immutable": "1"})
        return
    with TemporaryDirectory(prefix="tuner-") as folder:
        for one in (path, log):
            shutil.copy(one, folder)
        yield _sqlite_url(f"{folder}/{path.name}", "ro")  # what is asked there would never be answered


@contextmanager
def one_at_a_time(engine: sa.Engine) -> Iterator[None]:
    """Of several who make tables in one PostgreSQL, let one go on: it refuses a table that another is just making.

    Raises `MachineError` when the database does not answer, `TunerError` when it refuses.
    """
    try:
        with engine.connect() as connection, connection.begin():
            if engine.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MAKES_TABLES)))
            yield
    except sa.exc.DBAPIError as error:
        kind = MachineError if _is_away(error) else TunerError
        raise kind(f"storage.study: the database cannot be used: {error.orig}") from error


def engine_options(url: sa.URL, durable: bool = True) -> dict[str, Any]:
    """For `create_engine`. A commit to SQLite that is not durable outlives this process, whatever kills it; a power cut
    it outlives as soon as a durable one has followed, by whatever connection.
    """
    if url.get_driver_name().startswith("psycopg"):
        return {"pool_pre_ping": True, "connect_args": {name: _LINK[name] for name in _LINK if name not in url.query}}
    if url.get_backend_name() != "sqlite":
        return {"pool_pre_ping": True}
    options: dict[str, Any] = {"connect_args": {"timeout": BUSY_TIMEOUT_S}}
    return options if durable else options | {"pool_events": [(_sync_with_the_next, "connect")]}


def _sync_with_the_next(connection: Any, _: object) -> None:
    connection.execute("PRAGMA synchronous=NORMAL")


class Away(Exception):
    """The database does not answer, or is locked."""


def say_away(context: sa.engine.ExceptionContext) -> None:
    """For the engine of Optuna, which makes a trial again, up to five times, when it sees the database's own error."""
    error = context.sqlalchemy_exception
    if error is not None and _is_away(error):
        raise Away(str(context.original_exception))


def persistent(
    call: Callable[_Arguments, _Result], again: Callable[..., _Result] | None = None
) -> Callable[_Arguments, _Result]:
    """The same call, made again while the database is away, or locked, for up to AWAY_S seconds; then its error.

    What broke may have been the answer to a commit: `again` is called in place of a call that may not be made twice.
    """

    @functools.wraps(call)
    def persistently(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        end, now, waits = time.monotonic() + AWAY_S, call, False
        while True:
            try:
                return now(*args, **kwargs)
            except (sa.exc.DBAPIError, Away) as error:
                if not _is_away(error) or time.monotonic() > end:
                    raise
                if not waits:
                    _logger.warning("The records' database does not answer: %s", str(error).splitlines()[0])
                now, waits = again or call, True
                time.sleep(_LOOK_S)

    return persistently


def _is_away(error: Exception) -> bool:
    if isinstance(error, sa.exc.OperationalError) and isinstance(error.orig, sqlite3.Error):
        return error.orig.sqlite_errorname.startswith("SQLITE_BUSY")
    lost = isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
    return lost or isinstance(error, sa.exc.OperationalError | Away)
