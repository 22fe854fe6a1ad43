"""A sweep as one Markdown page: what was asked, what came out, and why trials ended as they did."""

from __future__ import annotations

from collections.abc import Sequence

from tuner.results.markdown import code, inline
from tuner.results.ranking import best_trial
from tuner.results.record import SweepStatus, TrialRecord, outcome_counts
from tuner.results.text import (
    Column,
    change,
    count,
    data_text,
    describe,
    duration,
    ending,
    figure,
    leaderboard_columns,
    scores_text,
)
from tuner.spec.sweep import SweepSpec


def markdown_report(
    spec: SweepSpec,
    status: SweepStatus,
    records: Sequence[TrialRecord],
    importances: dict[str, float],
    why_none: str | None = None,
) -> str:
    """The report that `tuner report` prints; `why_none` says why there are no importances."""
    sections = [
        f"# Sweep {spec.name}",
        _summary(spec, status),
        "## Asked\n\n" + _asked(spec, status),
        "## Best\n\n" + _best(spec, status, records),
        "## Leaderboard\n\n" + _leaderboard(spec, status, records) + "\n\n`*` the best.",
        "## What mattered\n\n" + _importances(importances, why_none),
        "## Outcomes\n\n" + _outcomes(records),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(spec: SweepSpec, status: SweepStatus) -> str:
    started = f", started {status.started:%Y-%m-%d %H:%M} UTC" if status.started else ""
    text = f"**{status.status}**{started}, took {duration(status.elapsed_s)}."
    text += f" {inline(status.message)}" if status.message else ""
    promoted = status.promoted or {}
    if promoted.get("version"):
        text += f"\n\nPromoted as `{promoted['alias']}` {promoted['version']}: {code(promoted['path'])}."
    elif promoted.get("refused"):
        text += "\n\nNot promoted: " + inline("; ".join(promoted["refused"])) + "."
    return text


def _asked(spec: SweepSpec, status: SweepStatus) -> str:
    budget = f"{count(status.tokens_per_trial)} tokens" if status.tokens_per_trial else "a budget not yet counted"
    lines = [
        f"- model: {code(spec.model.name)} ({spec.model.dtype}, quantization {spec.model.quantization})",
        f"- data: {code(spec.data.path)}",
        *(f"  - {inline(line)}" for line in data_text(status.data)),
        f"- objective: {spec.objective.goal} {spec.objective.metric}",
        f"- budget: {spec.budget.trials} trials of {budget}, {spec.budget.evals_per_trial} evaluations each",
        f"- search: {spec.search.sampler}, early stopping {spec.stopping.type}",
        f"- baseline (untuned): {scores_text(status.baseline) or 'not measured'}",
    ]
    rows = [(code(key), inline(describe(distribution))) for key, distribution in spec.space.items()]
    space = [
        Column("searched", [key for key, _ in rows], right=False),
        Column("range", [text for _, text in rows], right=False),
    ]
    return "\n".join(lines) + "\n\n" + _table(space)


def _best(spec: SweepSpec, status: SweepStatus, records: Sequence[TrialRecord]) -> str:
    found = best_trial(records, spec.objective, status.tokens_per_trial)
    if found is None:
        return "None: no trial completed its budget with a finite score."
    record, report = found
    metric = spec.objective.metric
    versus = change(getattr(report, metric), status.baseline.get(metric))
    lines = [
        f"Trial {record.number}: {scores_text(report.as_dict())}"
        + (f" ({metric} {versus} against the base)." if versus else "."),
        f"Scored at {count(report.tokens)} tokens, step {report.step}; "
        f"adapter {code(report.adapter_path or 'not kept')}.",
        "\n".join(f"- {code(key)}: {inline(value)}" for key, value in record.point.items()),
    ]
    return "\n\n".join(lines)


def _importances(importances: dict[str, float], why_none: str | None) -> str:
    if not importances:
        return f"Nothing to say yet: {inline(why_none)}."
    keys = Column("key", [code(key) for key in importances], right=False)
    return _table(
        [keys, Column("share of the score's variation", [figure(share, 2) for share in importances.values()])]
    )


def _outcomes(records: Sequence[TrialRecord]) -> str:
    counts = ", ".join(f"{number} {outcome}" for outcome, number in outcome_counts(records).items()) or "No trials."
    reasons = [
        f"- trial {record.number} {record.outcome}: {inline(ending(record))}" for record in records if ending(record)
    ]
    return "\n".join([counts, *([""] if reasons else []), *reasons])


def _leaderboard(spec: SweepSpec, status: SweepStatus, records: Sequence[TrialRecord]) -> str:
    columns = leaderboard_columns(spec, status, records)
    return _table([column.each(inline) for column in columns])


def _table(columns: Sequence[Column]) -> str:
    """A table of cells that are Markdown."""
    header = [column.header for column in columns]
    rule = ["---:" if column.right else ":---" for column in columns]
    body = zip(*(column.cells for column in columns), strict=True)
    lines = [header, rule, *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
