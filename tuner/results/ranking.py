"""Choosing the best: pure functions over records, the one truth for the search, the display and the queries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tuner.results.record import TrialRecord
from tuner.spec.sweep import ObjectiveSpec
from tuner.spec.trial import NO_IMPROVEMENT, Report

_GROUPS = {"COMPLETED": 0, "STOPPED": 1, "RUNNING": 2, "INTERRUPTED": 3, "INFEASIBLE": 4, "FAILED": 5}


def cost(report: Report | None, objective: ObjectiveSpec) -> float:
    """The objective such that lower is better, whatever its goal; infinite without a finite report."""
    if report is None or not report.is_finite():
        return math.inf
    value = getattr(report, objective.metric)
    return value if objective.goal == "minimize" else -value


def best_report(reports: Iterable[Report], objective: ObjectiveSpec) -> Report | None:
    """The best finite report, the earlier one of equals; None when there is no finite one."""
    finite = [report for report in reports if report.is_finite()]
    return min(finite, key=lambda report: (cost(report, objective), report.tokens), default=None)


def best_trial(
    records: Sequence[TrialRecord], objective: ObjectiveSpec, tokens_per_trial: int | None
) -> tuple[TrialRecord, Report] | None:
    """The winner and the report (with its adapter) that it wins by, or None when nobody may win.

    Only trials of equal budget are compared: those that completed, which reached `tokens_per_trial` or were over by
    their own patience. These had the same budget and left some of it: more evaluations could only have made their best
    one better. A trial that others stopped, that failed after a good report, or has no finite report never wins. Of
    equals the lower number wins.
    """
    candidates = [
        (record, report)
        for record in records
        if record.outcome == "COMPLETED"
        and (report := best_report(record.reports, objective)) is not None
        and (record.cause == NO_IMPROVEMENT or record.reached >= (tokens_per_trial or 0))
    ]
    return min(candidates, key=lambda pair: (cost(pair[1], objective), pair[0].number), default=None)


def leaderboard(records: Iterable[TrialRecord], objective: ObjectiveSpec) -> list[TrialRecord]:
    """Completed trials by score, then stopped ones by how far they got and score, then running, infeasible, failed."""

    def place(record: TrialRecord) -> tuple[int, int, float, int]:
        group = _GROUPS[record.outcome]
        reached = -record.reached if group else 0
        return group, reached, cost(record.report, objective), record.number

    return sorted(records, key=place)
