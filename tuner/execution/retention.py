"""Which adapters stay in storage: a running trial's best and last, and in the end the best few trials' best."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from tuner.results.ranking import best_report, leaderboard
from tuner.results.store import Store
from tuner.spec.trial import Report


def drop_worse_adapters(store: Store, number: int) -> None:
    """Of a running trial, keep the adapter of its best report and of its last."""
    reports = [Report.from_dict(row) for row in store.reports([number])]
    keep = {report.tokens for report in (best_report(reports, store.spec.objective), reports[-1]) if report}
    _drop(store, number, [report for report in reports if report.tokens not in keep])


def keep_best_adapters(store: Store, numbers: Collection[int]) -> set[int]:
    """Of those of these trials that have ended, keep the best adapter of the `storage.keep_best` best that completed.

    Returns the trials whose adapters are kept.
    """
    ended = [record for record in store.trials(numbers) if record.outcome != "RUNNING"]
    completed = [record for record in ended if record.outcome == "COMPLETED"]
    kept = {record.number for record in leaderboard(completed, store.spec.objective)[: store.spec.storage.keep_best]}
    for record in ended:
        best = record.report.tokens if record.report and record.number in kept else None
        _drop(store, record.number, [report for report in record.reports if report.tokens != best])
    return kept


def _drop(store: Store, number: int, reports: Iterable[Report]) -> None:
    root = store.folder.root
    for report in reports:
        if report.adapter_path is not None:
            store.forget_adapter(number, report.tokens)  # first, so that no record names a folder that is gone
            root.forget(root.here(report.adapter_path))
