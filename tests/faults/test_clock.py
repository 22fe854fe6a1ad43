"""The clock of a driver's host is set by an hour, forwards and then backwards, while it runs."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import tuner
from tests.faults.matrix import measure
from tests.real_sweeps import write_spec
from tuner.execution.events import Silent
from tuner.results import alive, record, store
from tuner.spec.load import load_spec
from tuner.spec.trial import Report

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

HOUR_S = 3600.0


class Jumps(Silent):
    """Sets this process's clock at the first evaluation of each of two trials, and has a rival try to resume then."""

    def __init__(self, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self._start, self._patch, self._time = start, monkeypatch, time.time
        self.by = {0: HOUR_S, 1: -HOUR_S}
        self.said: list[tuple[int, list[str]]] = []

    def trial_reported(self, number: int, report: Report) -> None:
        if number not in self.by:
            return
        by = self.by.pop(number)
        for module in (alive, record, store):
            self._patch.setattr(module, "utc_now", lambda: datetime.now(UTC) + timedelta(seconds=by))
        self._patch.setattr(time, "time", lambda: self._time() + by)
        rival = self._start()
        self.said.append((rival.end(100), rival.lines))


def test_a_clock_that_jumps_loses_no_trial_ends_no_budget_and_lets_no_second_driver_in(
    tiny_model_dir, tmp_path, note, monkeypatch, start
):
    root = tmp_path / "runs"
    budget = {"trials": 3, "tokens_per_trial": 6_000, "evals_per_trial": 3, "time_limit": "30m"}
    spec = load_spec(write_spec(tmp_path, tiny_model_dir, "clock", budget=budget, promotion=None), root=root)
    display = Jumps(lambda: start("resume", "clock", "--root", root, cwd=tmp_path), monkeypatch)
    begun = time.monotonic()
    sweep = tuner.run(spec, display=display)
    assert [code for code, _ in display.said] == [1, 1]
    assert all("is running already" in " ".join(lines) for _, lines in display.said), display.said
    assert sweep.status == "finished"
    assert 0 < sweep.state().elapsed_s < time.monotonic() - begun
    for trial in sweep.records():
        assert trial.tried == ()
        assert trial.duration_s >= trial.reports[-1].duration_s > 0
    figures = measure(sweep, injected=2)
    note("a clock that jumps", figures)
    assert (figures.lost, figures.duplicated) == (0, 0)
