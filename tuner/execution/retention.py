"""Which adapters stay in storage: a running trial's best and last, and in the end the best few trials' best."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from tuner.results.ranking import best_report, leaderboard
from tuner.results.record import TrialRecord
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
        if record.outcome == "FAILED":
            _drop_unrecorded(store, record)
    return kept


def _drop(store: Store, number: int, reports: Iterable[Report]) -> None:
    folder = store.folder
    for report in reports:
        if report.adapter_path is not None:
            store.forget_adapter(number, report.tokens)  # first, so that no record names a folder that is gone
            folder.root.forget(folder.adapter(number, report.tokens))


def _drop_unrecorded(store: Store, record: TrialRecord) -> None:
    """What a trial was writing when it failed."""
    folder = store.folder
    known = {folder.adapter(record.number, report.tokens).name for report in record.reports}
    for name in folder.root.names(folder.trial(record.number)):
        if name.startswith("tokens-") and name not in known:
            folder.root.forget(folder.trial(record.number) / name)
