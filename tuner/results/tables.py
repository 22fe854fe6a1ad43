"""The tables beside Optuna's, and how their rows, and Optuna's trials, become records."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import sqlalchemy as sa

from tuner.results.record import SweepStatus, TrialRecord
from tuner.spec.trial import Attempt, Outcome, Report

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


class UTCDateTime(sa.TypeDecorator):
    """Aware UTC times in Python, naive UTC in the database: SQLite knows no time zones."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return value.astimezone(UTC).replace(tzinfo=None) if value else None

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        return value.replace(tzinfo=UTC) if value else None


METADATA = sa.MetaData()

SWEEPS = sa.Table(
    "tuner_sweeps",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("message", sa.Text),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("tokens_per_trial", sa.BigInteger),
    sa.Column("data", sa.JSON(none_as_null=True)),
    sa.Column("baseline", sa.JSON(none_as_null=True)),
    sa.Column("sharing", sa.JSON(none_as_null=True)),
    sa.Column("promoted", sa.JSON(none_as_null=True)),
    sa.Column("pid", sa.Integer),
    sa.Column("host", sa.String(255)),
    sa.Column("driven_s", sa.Double),
    sa.Column("driver", sa.String(32)),
    *(sa.Column(name, UTCDateTime) for name in ("created", "started", "heartbeat", "finished")),
)

OPTIONAL = (SWEEPS.c.driver,)
"""Columns that older versions lack and no reader needs."""

_COLUMN_TYPES = {"int": sa.BigInteger, "float": sa.Double, "str | None": sa.Text}
_KEY = ("sweep", "trial", "tokens")

REPORTS = sa.Table(
    "tuner_reports",
    METADATA,
    sa.Column("sweep", sa.String(64), primary_key=True),
    sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("tokens", sa.BigInteger, primary_key=True, autoincrement=False),
    *(
        sa.Column(field.name, _COLUMN_TYPES[str(field.type)])
        for field in dataclasses.fields(Report)
        if field.name not in _KEY
    ),
    sa.Column("time", UTCDateTime),
)

REQUESTS = sa.Table(
    "tuner_requests",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("sweep", sa.String(64), nullable=False, index=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("value", sa.JSON),
    sa.Column("answer", sa.JSON),
    sa.Column("refusal", sa.Text),
    *(sa.Column(name, UTCDateTime) for name in ("asked", "taken", "answered")),
)


_FLOATS = [field.name for field in dataclasses.fields(Report) if field.type == "float"]


def report_row(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A row of `tuner_reports` without the sweep's name. SQLite keeps NaN as NULL: it comes back as NaN."""
    values = {key: value for key, value in row.items() if key != "sweep"}
    return values | {name: math.nan for name in _FLOATS if values[name] is None}


def sweep_status(row: Mapping[Any, Any]) -> SweepStatus:
    values = {field.name: row[field.name] for field in dataclasses.fields(SweepStatus)}
    filled = {"data": row["data"] or {}, "baseline": row["baseline"] or {}, "driven_s": row["driven_s"] or 0.0}
    return SweepStatus(**values | filled)


def interrupted(status: SweepStatus) -> SweepStatus:
    """The status of a sweep whose driver is gone without a word."""
    return dataclasses.replace(status, status="interrupted", message=status.message or "its driver is gone")


def record(trial: FrozenTrial, reports: list[Report], best_of: Callable[[list[Report]], Report | None]) -> TrialRecord:
    """What Optuna keeps of a trial, and its reports, as a record.

    The outcome that `Store.finish_trial` wrote comes before Optuna's state, which is told a moment later.
    """
    known = trial.user_attrs
    config = known.get("config") or {}
    return TrialRecord(
        number=trial.number,
        outcome=cast(Outcome, known.get("outcome") or _OUTCOME_OF_STATE[trial.state.name]),
        point=config.get("point", trial.params),
        config=config,
        reports=tuple(reports),
        report=best_of(reports),
        cause=known.get("cause"),
        reason=known.get("reason"),
        log_tail=known.get("log_tail"),
        tried=tuple(attempts(known)),
        started=_time(known.get("started"), None if known.get("outcome") else trial.datetime_start),
        finished=_time(known.get("finished"), trial.datetime_complete),
    )


def attempts(known: Mapping[str, Any]) -> list[Attempt]:
    """What a trial's attributes say of its attempts that failed before the last."""
    return [Attempt(**attempt) for attempt in known.get("tried") or ()]


_OUTCOME_OF_STATE = {"RUNNING": "RUNNING", "COMPLETE": "COMPLETED", "PRUNED": "STOPPED", "FAIL": "FAILED"}


def _time(written: str | None, optunas: datetime | None) -> datetime | None:
    """Ours in UTC, or else Optuna's, which is naive and local."""
    if written:
        return datetime.fromisoformat(written)
    return optunas.astimezone(UTC) if optunas else None
