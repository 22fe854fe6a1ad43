"""What notices that a process which trains stands still, and ends it: from outside it looks alive."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SLOWER = 20
"""A move may take so many times as long as the slowest before it."""
FIRST = 6
"""The first may take so many times `stuck_after`: weights are loaded and kernels compiled before it."""
LOOK_S = 0.5
"""Seconds between two looks. A process that could not even look was stopped, not stuck, and is given that time back."""
PARTING_S = 60.0
"""How long a process that is stuck may take to say so."""
FRAMES = 25
"""The innermost calls of the watched thread that are told."""
STDERR = 2


def longest_move(stuck_after: float, slowest: float | None) -> float:
    """Seconds that a move may take when the slowest so far took `slowest`, None before the first."""
    return FIRST * stuck_after if slowest is None else max(stuck_after, SLOWER * slowest)


class Watch:
    """Ends this process when the one thread that is watched has something to do and does not move for too long.

    A move is whatever shows that it gets on: a micro-batch, an optimizer step, a batch of an evaluation, a save. The
    stacks of all threads go to stderr, that of the watched one last, and `last_words` is called with the reason.
    """

    def __init__(self, stuck_after: float, last_words: Callable[[str], None]):
        """`stuck_after` is in seconds, `resources.stuck_after`."""
        self._stuck_after = stuck_after
        self._last_words = last_words
        self._thread = 0
        self._slowest: float | None = None
        self._since: float | None = None
        """When the last move was made; None while there is nothing to do."""
        self._over = threading.Event()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    @contextmanager
    def working(self) -> Iterator[None]:
        """For this block the calling thread is expected to move. Its end is a move, too."""
        self._thread = threading.get_ident()
        self._since = time.monotonic()
        try:
            yield
        finally:
            self.moved()
            self._since = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For this block, within `working`, it is somebody else's turn."""
        self._since = None
        try:
            yield
        finally:
            self._since = time.monotonic()

    def moved(self) -> None:
        """Say that a move was made. Called by the watched thread, within `working`."""
        assert self._since is not None
        now = time.monotonic()
        self._slowest = 0.0 if self._slowest is None else max(self._slowest, now - self._since)
        self._since = now

    def close(self) -> None:
        """Watch no longer."""
        self._over.set()

    def _look(self) -> None:
        looked = time.monotonic()
        while True:
            # Should Python itself stand still, this thread with it, then C looks after it: the stacks, and the end.
            faulthandler.dump_traceback_later(FIRST * self._stuck_after, file=STDERR, exit=True)
            if self._over.wait(LOOK_S):
                break
            now, before = time.monotonic(), looked
            looked = now
            since = self._since
            if since is None:
                continue
            if now - before > 4 * LOOK_S:
                self._since = since + now - before
            elif now - since > longest_move(self._stuck_after, self._slowest):
                self._end(now - since)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, idle: float) -> None:
        faulthandler.dump_traceback_later(PARTING_S, file=STDERR, exit=True)  # whatever the rest may wait for
        before = "it was the first" if self._slowest is None else f"the slowest before took {self._slowest:.1f} s"
        reason = f"no step for {idle:.0f} s; {before}"
        try:
            print(f"stuck: {reason}\n{stacks(self._thread)}", file=sys.stderr, flush=True)
            self._last_words(reason)
        finally:
            os._exit(1)


def stacks(watched: int) -> str:
    """Where every thread of this process is, and last, with all it has come through, the one of this identifier.

    So short that those of two workers stand in the last lines of a trial's log.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda one: one[0] == watched)
    return "\n".join(
        f"Thread {names.get(thread, thread)}:\n"
        + "".join(traceback.format_stack(frame)[-FRAMES if thread == watched else -1 :])
        for thread, frame in frames
    )


def unwatched() -> None:
    """What is told of moves that nobody watches."""
