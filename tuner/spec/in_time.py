"""An end to waiting for a call that has none of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from tuner.errors import MachineError

_Answer = TypeVar("_Answer")


def in_time(seconds: float, who: str, ask: Callable[[], _Answer]) -> _Answer:
    """What `ask` returns or raises. Raises MachineError when it is not over in time, and leaves it behind.

    A socket's timeout bounds the wait for the next bytes only, and a look-up of a name has none: a thread makes the
    call.
    """
    answers: list[_Answer] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            answers.append(ask())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise MachineError(f"{who} has not answered within {seconds:g} s")
    return answers[0]
