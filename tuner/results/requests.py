"""What other processes ask of a running sweep: rows of its own database, which its driver takes and answers.

A request is taken by the driver or withdrawn by who asked, never both: what was not answered has not been done.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from tuner.errors import TunerError
from tuner.results.database import persistent
from tuner.results.record import utc_now
from tuner.results.tables import REQUESTS

LOOK_S = 0.2
"""How often who waits looks for an answer."""

Kind = Literal["cancel", "add", "extend", "end"]


@dataclass(frozen=True)
class Request:
    """`cancel` a trial by its number, `add` a point, `extend` budgets by overrides, or `end` the driver."""

    id: int
    kind: Kind
    value: Any


class Requests:
    """The requests of one sweep."""

    def __init__(self, engine: sa.Engine, sweep: str, writing: Callable[[], AbstractContextManager[sa.Connection]]):
        """`writing` begins a transaction of the driver's, if it still is the driver."""
        self._engine = engine
        self._writing = writing
        self._sweep = sweep
        self.of_one_host = engine.dialect.name == "sqlite"
        """Whether only the driver's own host may write: SQLite's file is no meeting place of two."""
        self._open = (REQUESTS.c.sweep == sweep) & REQUESTS.c.taken.is_(None)

    # Whoever asks

    def ask(self, kind: Kind, value: Any = None) -> int:
        """Write a request for the driver and return its id. Raises TunerError where this user may only read."""
        row = {"sweep": self._sweep, "kind": kind, "value": value, "asked": utc_now()}
        try:  # a border: a file of another user's, or an account that may only read
            with self._engine.begin() as connection:
                return connection.execute(REQUESTS.insert().values(row).returning(REQUESTS.c.id)).scalar_one()
        except sa.exc.DBAPIError as error:
            raise TunerError(f"the driver of {self._sweep!r} cannot be asked: {error.orig}") from error

    def wait(self, id: int, has_driver: Callable[[], bool], timeout_s: float) -> Any:
        """The driver's answer. Raises TunerError when it refuses, ends before, or takes too long."""
        end = time.monotonic() + timeout_s
        while True:
            driven = has_driver()  # before the answer is looked for, which may be the last thing it did
            with self._engine.connect() as connection:
                row = connection.execute(sa.select(REQUESTS).where(REQUESTS.c.id == id)).mappings().one()
            if row["answered"]:
                if row["refusal"]:
                    raise TunerError(row["refusal"])
                return row["answer"]
            if not driven:
                self.withdraw(id)
                raise TunerError(f"the driver of {self._sweep!r} ended before it answered")
            if time.monotonic() > end and self.withdraw(id):
                raise TunerError(
                    f"the driver of {self._sweep!r} has not answered in {timeout_s:.0f} s; nothing is done"
                )
            if time.monotonic() > end + timeout_s:
                raise TunerError(f"the driver of {self._sweep!r} began it, but has not answered in {timeout_s:.0f} s")
            time.sleep(LOOK_S)

    def withdraw(self, id: int) -> bool:
        """Take a request back; whether the driver had not taken it yet."""
        with self._engine.begin() as connection:
            return connection.execute(REQUESTS.delete().where(self._open & (REQUESTS.c.id == id))).rowcount == 1

    # The driver

    @persistent
    def take(self, *kinds: Kind) -> list[Request]:
        """The open requests of these kinds, which are this driver's now to answer."""
        query = sa.select(REQUESTS).where(self._open & REQUESTS.c.kind.in_(kinds)).order_by(REQUESTS.c.id)
        with self._engine.connect() as connection:
            found = connection.execute(query).mappings().all()
        return [Request(row["id"], row["kind"], row["value"]) for row in found if self._taken(row["id"])]

    def _taken(self, id: int) -> bool:
        mine = REQUESTS.update().where(self._open & (REQUESTS.c.id == id)).values(taken=utc_now())
        with self._writing() as connection:
            return connection.execute(mine).rowcount == 1

    @persistent
    def answer(self, id: int, answer: Any = None, refusal: str | None = None) -> None:
        """Say that it is done, and what came of it; or why it is not."""
        values = {"answered": utc_now(), "answer": answer, "refusal": refusal}
        with self._writing() as connection:
            connection.execute(REQUESTS.update().where(REQUESTS.c.id == id).values(values))

    @persistent
    def forget_open(self) -> None:
        """A new driver begins: what was asked of the one before is nothing to it."""
        with self._writing() as connection:
            connection.execute(REQUESTS.delete().where(self._open))
