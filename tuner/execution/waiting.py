"""Says what a trial needs and what the cluster has, while nothing of a sweep can be placed there."""

from __future__ import annotations

import logging
import time

from tuner.execution.events import Display
from tuner.execution.machine import Placement, shortage
from tuner.results.store import Store

PATIENCE_S = 30.0
"""Seconds without a place before a line is said: processes need some to start where there is room."""
LOOK_AGAIN_S = 10.0

logger = logging.getLogger(__name__)


class Waiting:
    """For the driver's main thread: one line in the log and in `tuner status`, and another when it has changed."""

    def __init__(self, store: Store, placement: Placement, display: Display):
        self._store, self._placement, self._display = store, placement, display
        self._look = time.monotonic() + (PATIENCE_S if placement.concurrent else 0.0)
        self._said: str | None = None

    def note(self, placed: bool) -> None:
        """Say what there is to say; expected every second or oftener. `placed`: something of the sweep has a place."""
        now = time.monotonic()
        if placed:
            self._look = now + PATIENCE_S
            if self._said:
                self._said = None
                self._store.set_message(None)
        elif now > self._look:
            self._look = now + LOOK_AGAIN_S
            text = shortage(self._placement)
            if text != self._said:
                self._said = text
                self._store.set_message(text)
                self._display.stage(text)
                logger.warning(text)
