"""What ends a whole search between two results: Ctrl-C, or a budget of the sweep that is used up."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from tuner.execution.events import Display
from tuner.results.store import Store
from tuner.spec.trial import Report

LOOK_S = 10.0
"""Seconds between two looks at the size of the sweep's folder."""


class Halt:
    """Ends the search on the first Ctrl-C or SIGTERM, or when a budget is used up. A context for the time of it."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, store: Store, display: Display):
        self._store = store
        self._folder = store.folder.path
        self._began = time.monotonic() - store.status().elapsed_s
        self._display = display
        self.gpus_per_trial = 0.0
        """A trial's workers' GPUs, or a slot's share of its engine's."""
        self._spent: dict[int, tuple[int, float]] = {}
        """Trained tokens and seconds of each trial, as it last reported them."""
        self._tokens, self._trial_s = 0, 0.0
        self._look, self._bytes = 0.0, 0
        for row in store.reports():
            self.spend(row["trial"], Report.from_dict(row))
        self.interrupted = False
        self.cause: str | None = None
        self.reason: str | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = {one: signal.signal(one, self._interrupt) for one in self.SIGNALS}

    def __exit__(self, *exc_info: object) -> None:
        if threading.current_thread() is threading.main_thread():
            self._as_before()

    def _interrupt(self, signum: int, frame: object) -> None:
        self.interrupted = True
        self._as_before()  # a second one does not wait

    def _as_before(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def begins(self, number: int) -> None:
        """A trial begins at its beginning, again perhaps: what it spends from now on comes on top."""
        self._spent.pop(number, None)

    def spend(self, number: int, report: Report) -> None:
        """Count what a trial has used since its last report."""
        tokens, seconds = self._spent.get(number, (0, 0.0))
        self._tokens += report.trained_tokens - tokens
        self._trial_s += report.duration_s - seconds
        self._spent[number] = report.trained_tokens, report.duration_s

    def end(self, cause: str, reason: str) -> None:
        """End everything, for a reason found elsewhere."""
        if self.reason is None:
            self.cause, self.reason = cause, reason
            self._display.stage(f"Ending what runs: {reason}")

    def stop_all(self) -> bool:
        """Whether everything is to end, and nothing to start any more."""
        if self.reason is None:
            self.cause, self.reason = ("interrupted", "interrupted") if self.interrupted else self._used_up()
            if self.reason:
                self._display.stage(f"Ending what runs: {self.reason}")
        return self.reason is not None

    def _used_up(self) -> tuple[str, str] | tuple[None, None]:
        """The cause and the reason of trials that end because a budget is used up."""
        budget = self._store.spec.budget  # as it is now: it may be extended meanwhile
        if budget.time_limit is not None and time.monotonic() - self._began > budget.time_limit:
            return "time limit", f"budget.time_limit of {budget.time_limit:g} s"
        if budget.tokens is not None and self._tokens >= budget.tokens:
            return "token limit", f"budget.tokens of {budget.tokens:,}, all trials together"
        if budget.gpu_hours is not None and self._trial_s * self.gpus_per_trial >= 3600 * budget.gpu_hours:
            return "GPU limit", f"budget.gpu_hours of {budget.gpu_hours:g}"
        if budget.disk is not None and self._size() > budget.disk:
            return "disk limit", f"budget.disk of {budget.disk / 1e9:g} GB"
        return None, None

    def _size(self) -> int:
        """Bytes of the sweep's folder, as of the last look."""
        if time.monotonic() > self._look:
            self._look, self._bytes = time.monotonic() + LOOK_S, folder_bytes(self._folder)
        return self._bytes


def folder_bytes(folder: Path) -> int:
    """What the files in a folder take. One that goes away meanwhile counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total
