"""What is asked of a sweep while it runs: a trial cancelled, a point added, a budget extended."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from tuner.errors import SpecError, TunerError
from tuner.execution.events import Display
from tuner.results.requests import Request
from tuner.results.store import Store
from tuner.search.study import Search
from tuner.spec.changes import with_more_budget
from tuner.spec.checks.space import check_point
from tuner.spec.trial import Ending

LOOK_S = 1.0
"""How long a request may go unnoticed."""

CANCELLED = Ending("STOPPED", "cancelled", "by tuner cancel")


class Steering:
    """Does what other processes ask of a search, and answers each; for the driver's main thread."""

    def __init__(self, store: Store, search: Search, display: Display):
        self._store, self._search, self._display = store, search, display
        self._look = 0.0
        self._cancelled: dict[int, int] = {}
        """The request that each cancelled trial answers with its end."""

    def look(self, running: Collection[int]) -> list[int]:
        """Do what has been asked since the last look; returns those of the running trials that are to end.

        They are named at every look, until they have ended: the first may come too early, to one that just begins.
        """
        if time.monotonic() < self._look:
            return []
        self._look = time.monotonic() + LOOK_S
        for request in self._store.requests.take("cancel", "add", "extend"):
            self._do(request, running)
        return list(self._cancelled)

    def is_cancelled(self, number: int) -> bool:
        """Whether a running trial is to end."""
        return number in self._cancelled

    def ended(self, number: int) -> None:
        """A trial is recorded: who had it cancelled may know."""
        if number in self._cancelled:
            self._store.requests.answer(self._cancelled.pop(number))

    def close(self) -> None:
        """Refuse what comes too late."""
        for request in self._store.requests.take("cancel", "add", "extend"):
            self._refuse(
                request, f"the trials of {self._store.spec.name!r} are over: resume it with more of its budget"
            )

    def _do(self, request: Request, running: Collection[int]) -> None:
        answer = None
        try:
            match request.kind:
                case "cancel":
                    self._cancel(request, running)
                    return  # its end is the answer
                case "add":
                    answer = self._add(request.value)
                case "extend":
                    self._extend(request.value)
        except TunerError as refusal:
            self._refuse(request, str(refusal))
        else:
            self._store.requests.answer(request.id, answer)

    def _refuse(self, request: Request, why: str) -> None:
        self._store.requests.answer(request.id, refusal=why)

    def _cancel(self, request: Request, running: Collection[int]) -> None:
        number = request.value
        if number not in running:
            raise TunerError(f"trial {number} does not run")
        if number in self._cancelled:
            raise TunerError(f"trial {number} is ending already")
        self._cancelled[number] = request.id
        self._search.decide(number, CANCELLED)

    def _add(self, point: dict[str, Any]) -> int:
        if problems := check_point(self._store.spec.space, point):
            raise SpecError(problems, "point")
        return self._search.add(point)

    def _extend(self, overrides: list[str]) -> None:
        spec = with_more_budget(self._store.spec, overrides)
        self._store.set_spec(spec)
        self._search.extend(spec)
        self._display.extended(spec)
