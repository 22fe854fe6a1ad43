"""What is known of one trial and of one sweep, as plain frozen values that any process can read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from tuner.spec.trial import Attempt, Outcome, Report

Status = Literal["queued", "preparing", "running", "finished", "failed", "interrupted", "cancelled"]
ACTIVE: tuple[Status, ...] = ("preparing", "running")
"""A driver is at work. Every other status but `queued` means that nobody is."""


OPEN = ("RUNNING", "INTERRUPTED")
"""Outcomes of trials that have none yet; of the second nobody trains any more, until `tuner resume` goes on."""


def utc_now() -> datetime:
    return datetime.now(UTC)


def iso(time: datetime | None) -> str | None:
    return time.isoformat(timespec="seconds") if time else None


def finite(value: Any) -> Any:
    """The same JSON document with null for every NaN and infinity, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class TrialRecord:
    """One trial: what it was asked, what it reported, how it ended."""

    number: int
    outcome: Outcome
    point: dict[str, Any]
    """The searched values, by dotted key."""
    config: dict[str, Any]
    """The whole `TrialConfig`; empty when the trial never got one."""
    reports: tuple[Report, ...] = ()
    """In order of tokens."""
    report: Report | None = None
    """The report the trial is ranked by: its best finite one, which need not be its last. None without one."""
    cause: str | None = None
    """One word for what ended it, such as `out_of_memory`; None for a trial that did all it was asked."""
    reason: str | None = None
    log_tail: str | None = field(default=None, repr=False)
    tried: tuple[Attempt, ...] = ()
    """Attempts that failed before the last one."""
    started: datetime | None = None
    """None of a trial that was not: its point was known to be infeasible, and it is none of the budget's trials."""
    finished: datetime | None = None

    @property
    def is_over(self) -> bool:
        """Whether it is one of the budget's trials that nobody has to run any more."""
        return self.outcome not in OPEN and self.started is not None

    @property
    def eval_loss(self) -> float | None:
        return self.report.eval_loss if self.report else None

    @property
    def mean_token_accuracy(self) -> float | None:
        return self.report.mean_token_accuracy if self.report else None

    @property
    def tokens(self) -> int | None:
        """Trained tokens at the report the trial is ranked by."""
        return self.report.tokens if self.report else None

    @property
    def step(self) -> int | None:
        return self.report.step if self.report else None

    @property
    def adapter_path(self) -> str | None:
        return self.report.adapter_path if self.report else None

    @property
    def reached(self) -> int:
        """Trained tokens at the last report, finite or not: how far the trial got."""
        return self.reports[-1].tokens if self.reports else 0

    @property
    def duration_s(self) -> float | None:
        """Wall seconds from start to end; of a trial that still runs, to its last report."""
        reported = self.reports[-1].duration_s if self.reports else None
        if self.started and self.finished:  # by a clock that may have been set back meanwhile; a worker's never is
            return max((self.finished - self.started).total_seconds(), reported or 0.0)
        return reported

    @property
    def tokens_per_s(self) -> float | None:
        """Training speed over the whole trial, evaluations excluded."""
        seconds, before = 0.0, 0
        for report in self.reports:
            if not report.tokens_per_s > 0:
                return None
            seconds += (report.trained_tokens - before) / report.tokens_per_s
            before = report.trained_tokens
        return before / seconds if seconds > 0 else None


def as_seen(records: Iterable[TrialRecord], status: Status) -> list[TrialRecord]:
    """The trials as somebody sees them from outside: none runs without a driver."""
    if status in ACTIVE:
        return list(records)
    return [replace(one, outcome="INTERRUPTED") if one.outcome == "RUNNING" else one for one in records]


def outcome_counts(records: Iterable[TrialRecord]) -> dict[str, int]:
    """Trials by outcome, in a fixed order, without the outcomes that none has; those `not tried` apart."""
    outcomes = [record.outcome if record.is_over or record.outcome in OPEN else "not tried" for record in records]
    order = ("COMPLETED", "STOPPED", "RUNNING", "INTERRUPTED", "INFEASIBLE", "FAILED", "not tried")
    return {outcome: outcomes.count(outcome) for outcome in order if outcome in outcomes}


@dataclass(frozen=True)
class SweepStatus:
    """How a sweep stands. All times are UTC."""

    name: str
    status: Status
    """As observed: a sweep that says it runs, but whose driver is gone, is `interrupted`."""
    created: datetime
    message: str | None = None
    pid: int | None = None
    host: str | None = None
    """Where the driver runs, or ran last."""
    started: datetime | None = None
    heartbeat: datetime | None = None
    finished: datetime | None = None
    driven_s: float = 0.0
    """Seconds that drivers were at work, by their monotonic clocks, up to the last heartbeat or the end."""
    tokens_per_trial: int | None = None
    """The full budget; None until the data is prepared."""
    data: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)
    """Scores of the untuned base; empty until they are measured."""
    sharing: dict[str, Any] | None = None
    """How trials ran: `slots` on each of so many `engines`, none if each had its own base; and the `reason`."""
    promoted: dict[str, Any] | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds a driver has been at work, the time between an interruption and a resume left out.

        A driver that vanished counts until its last sign of life.
        """
        if self.status not in ACTIVE or self.heartbeat is None:
            return self.driven_s
        return self.driven_s + max((utc_now() - self.heartbeat).total_seconds(), 0.0)
