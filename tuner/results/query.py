"""Answers about a sweep as pure functions over its records: filter, sort, tables, and the JSON document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tuner.results.ranking import best_trial, leaderboard
from tuner.results.record import SweepStatus, TrialRecord, finite, iso, outcome_counts
from tuner.results.where import holds, kind, known_key, parse_where
from tuner.spec.sweep import SweepSpec

if TYPE_CHECKING:
    import optuna
    import pandas as pd

RESULTS = ("eval_loss", "mean_token_accuracy", "tokens", "step", "duration_s", "tokens_per_s", "adapter_path")
COLUMNS = ("number", "outcome", "cause", "reason", *RESULTS, "reached", "started", "finished")
"""What every trial has, beside its searched values. `eval_loss` to `step` and `adapter_path` are those of the report
it is ranked by; `reached` is how many tokens it trained."""


def select(
    records: Sequence[TrialRecord],
    spec: SweepSpec,
    where: str | None = None,
    sort: str | None = None,
    top: int | None = None,
) -> list[TrialRecord]:
    """The records that fulfil every condition of `where`, best first, or by the key `sort`, at most `top` of them.

    `where` is `KEY OP VALUE [and ...]` with == != < <= > >=. Keys are `COLUMNS`, the searched keys and the fixed ones
    (`train.seed`, `lora.r`). A trial without a value for a key fulfils only `!=`, or `==null`. `sort` is ascending,
    `-KEY` descending; trials without a value come last. Raises `SpecError` naming the keys there are.
    """
    rows = {record.number: _everything(record) for record in records}
    keys = {*COLUMNS, *spec.space, *(key for row in rows.values() for key in row)}
    chosen = leaderboard(records, spec.objective)
    for key, op, value in parse_where(where, keys) if where else []:
        chosen = [record for record in chosen if holds(rows[record.number].get(key), op, value, key)]
    if sort:
        chosen = _sorted(chosen, rows, sort, keys)
    return chosen[:top]


def _sorted(
    records: list[TrialRecord], rows: Mapping[int, Mapping[str, Any]], sort: str, keys: set[str]
) -> list[TrialRecord]:
    key, descending = known_key(sort.removeprefix("-"), keys, "--sort"), sort.startswith("-")
    present = [record for record in records if rows[record.number].get(key) is not None]
    absent = [record for record in records if rows[record.number].get(key) is None]

    def place(record: TrialRecord) -> tuple[str, Any]:
        value = rows[record.number][key]
        return kind(value), value

    return sorted(present, key=place, reverse=descending) + absent


def row(record: TrialRecord) -> dict[str, Any]:
    """A trial as one flat row: `COLUMNS`, then its searched values."""
    return {name: getattr(record, name) for name in COLUMNS} | record.point


def _everything(record: TrialRecord) -> dict[str, Any]:
    """What `where` and `sort` may look at: the row, the fixed values, times as ISO text."""
    fixed = {
        f"{section}.{key}": value
        for section in ("model", "train", "lora")
        for key, value in (record.config.get(section) or {}).items()
    }
    times = {name: iso(getattr(record, name)) for name in ("started", "finished")}
    return fixed | row(record) | times


def trials_frame(records: Sequence[TrialRecord]) -> pd.DataFrame:
    """One row a trial: `COLUMNS`, then a column for each searched key. Times are UTC."""
    import pandas as pd

    searched = dict.fromkeys(key for record in records for key in record.point)
    return pd.DataFrame([row(record) for record in records], columns=[*COLUMNS, *searched])


def reports_frame(records: Sequence[TrialRecord]) -> pd.DataFrame:
    """One row a report: the trial's number and outcome, then the fields of `Report`."""
    import dataclasses

    import pandas as pd

    from tuner.spec.trial import Report

    rows = [
        {"trial": record.number, "outcome": record.outcome} | report.as_dict()
        for record in records
        for report in record.reports
    ]
    return pd.DataFrame(rows, columns=["trial", "outcome", *(field.name for field in dataclasses.fields(Report))])


def write_frame(frame: pd.DataFrame, format: str, target: Any) -> None:
    """Write a frame as `csv` or `parquet` to a path or a binary file.

    In CSV, text that a spreadsheet would run as a formula begins with an apostrophe.
    """
    import pandas as pd

    if format == "csv":
        frame.rename(columns=_no_formula).map(_no_formula).to_csv(target, index=False)
        return
    uniform = frame.copy()
    for name in uniform.columns[[pd.api.types.is_object_dtype(dtype) for dtype in uniform.dtypes]]:
        kinds = {kind(value) for value in uniform[name].dropna()}
        if len(kinds) > 1:  # Parquet columns have one type; a choice may mix numbers and text
            uniform[name] = uniform[name].map(lambda value: None if value is None else str(value))
    uniform.to_parquet(target, index=False)


def _no_formula(value: Any) -> Any:
    """A cell as text for a spreadsheet, too: one that would be run as a formula gets an apostrophe before it."""
    if not isinstance(value, str):
        return value
    lines = value.replace("\r\n", "\n").replace("\r", "\n")  # a lone \r is not quoted, and would end the row
    return f"'{lines}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else lines


def document(
    spec: SweepSpec, status: SweepStatus, records: Sequence[TrialRecord], shown: Sequence[TrialRecord] | None = None
) -> dict[str, Any]:
    """What `tuner results NAME --json` prints. The keys and their meaning are stable.

        sweep      text    its name
        status     text    queued, preparing, running, finished, failed, interrupted or cancelled
        objective  text    the metric trials compete on: eval_loss (lower is better) or mean_token_accuracy (higher)
        baseline   object  the untuned base: eval_loss, mean_token_accuracy and more; null until measured
        best       number  of the trial that won; null when none completed its budget with a finite score
        trials     list    leaderboard order, or as asked with --sort, --where, --top (`best` is of all trials)

    and of each trial

        number               int     its number in the sweep, from 0
        outcome              text    RUNNING, INTERRUPTED, COMPLETED, STOPPED, INFEASIBLE or FAILED
        reason               text    why it ended so; null where there is nothing to say
        config               object  the searched values by dotted key
        eval_loss            float   nats per target token    | these five are of its best finite
        mean_token_accuracy  float   0 to 1                   | report, which need not be its last;
        tokens               int     trained by then          | null without one
        step                 int     optimizer step           |
        adapter_path         text    its adapter, if kept     |
        duration_s           float   wall seconds, start to end
        tokens_per_s         float   training speed, evaluations excluded

    A number that is not finite is null.
    """
    best = best_trial(records, spec.objective, status.tokens_per_trial)
    return finite(
        {
            "sweep": status.name,
            "status": status.status,
            "objective": spec.objective.metric,
            "baseline": {"eval_loss": None, "mean_token_accuracy": None} | status.baseline,
            "best": best[0].number if best else None,
            "trials": [_trial(record) for record in (leaderboard(records, spec.objective) if shown is None else shown)],
        }
    )


def _trial(record: TrialRecord) -> dict[str, Any]:
    head = {"number": record.number, "outcome": record.outcome, "reason": record.reason, "config": record.point}
    return head | {name: getattr(record, name) for name in RESULTS}


def status_document(spec: SweepSpec, status: SweepStatus, records: Sequence[TrialRecord]) -> dict[str, Any]:
    """What `tuner status NAME --json` prints.

    sweep, status, message; `trials`: how many by outcome, of `asked`, and how many points `not tried`; `objective`, the
    `best` trial's number and its `score`; `baseline`, `sharing` and `promoted` as objects; elapsed_s; started,
    heartbeat, finished (ISO 8601, UTC); pid and host of the driver; tokens_per_trial.
    """
    best = best_trial(records, spec.objective, status.tokens_per_trial)
    return finite(
        {
            "sweep": status.name,
            "status": status.status,
            "message": status.message,
            "trials": outcome_counts(records),
            "asked": spec.budget.trials,
            "objective": spec.objective.metric,
            "best": best[0].number if best else None,
            "score": getattr(best[1], spec.objective.metric) if best else None,
            "baseline": {"eval_loss": None, "mean_token_accuracy": None} | status.baseline,
            "sharing": status.sharing,
            "promoted": status.promoted,
            "elapsed_s": status.elapsed_s,
            **{name: iso(getattr(status, name)) for name in ("started", "heartbeat", "finished")},
            **{name: getattr(status, name) for name in ("pid", "host", "tokens_per_trial")},
        }
    )


def trial_document(record: TrialRecord) -> dict[str, Any]:
    """What `tuner show NAME TRIAL --json` prints: the trial as in `document`, then everything else.

    cause, reached (tokens at its last report), started, finished; `full_config`: all it ran with; `reports`: every
    evaluation with the fields of `Report`; log_tail; `tried`: attempts that failed before the last, each with tokens,
    cause, reason, log_tail and what was changed for the next.
    """
    return finite(
        {
            **_trial(record),
            "cause": record.cause,
            "reached": record.reached,
            "started": iso(record.started),
            "finished": iso(record.finished),
            "full_config": {key: value for key, value in record.config.items() if key not in ("number", "point")},
            "reports": [report.as_dict() for report in record.reports],
            "log_tail": record.log_tail,
            "tried": [asdict(attempt) for attempt in record.tried],
        }
    )


def importances(study: optuna.Study) -> tuple[dict[str, float], str | None]:
    """How much each searched key explains of the score, as shares that add up to 1, and why there is none.

    Optuna's PED-ANOVA over the completed trials (arXiv 2304.10255). Empty with fewer than two of them.
    """
    import optuna

    complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    usable = [trial for trial in complete if trial.value is not None and math.isfinite(trial.value)]
    if len(usable) < 2:
        return {}, f"importances need at least 2 completed trials; there are {len(usable)}"
    return dict(optuna.importance.get_param_importances(study)), None
