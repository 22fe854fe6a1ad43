"""How figures are put into words: the same in the live table, the leaderboard and the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuner.results.ranking import best_trial, leaderboard
from tuner.results.record import SweepStatus, TrialRecord
from tuner.spec.drops import describe_drops
from tuner.spec.space import Choice, Distribution, Int
from tuner.spec.sweep import SweepSpec

_SHORT = {
    "alpha_ratio": "alpha/r",
    "gradient_accumulation_steps": "accumulate",
    "learning_rate": "lr",
    "lora_dropout": "dropout",
    "lr_scheduler_type": "schedule",
    "per_device_train_batch_size": "batch",
    "target_modules": "targets",
}


@dataclass(frozen=True)
class Column:
    """One column of a table; where there is no room, the one with the highest `drop` goes first, 0 never."""

    header: str
    cells: Sequence[str]
    drop: int = 0
    right: bool = True

    def each(self, change: Callable[[str], str]) -> Column:
        """The column with its header and every cell changed."""
        return replace(self, header=change(self.header), cells=[change(cell) for cell in self.cells])

    @property
    def width(self) -> int:
        return max(map(len, [self.header, *self.cells]))


def fit(columns: Sequence[Column], width: int, gap: int = 2) -> tuple[list[Column], list[Column]]:
    """The columns that find room side by side in `width` characters, and those that were dropped for it."""
    kept = list(columns)
    while sum(column.width + gap for column in kept) - gap > width and any(column.drop for column in kept):
        kept.remove(max(kept, key=lambda column: (column.drop, kept.index(column))))
    return kept, [column for column in columns if column not in kept]


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """A heading for each dotted key: its last part or a usual abbreviation; the whole key where two would be alike."""
    short = {key: _SHORT.get(last := key.rpartition(".")[2], last) for key in keys}
    return {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}


def figure(value: Any, digits: int = 4) -> str:
    """A score with fixed decimals; nothing for None."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def compact(value: Any) -> str:
    """A value of the space, short: three significant digits, true and false as YAML writes them."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def describe(distribution: Distribution) -> str:
    """A distribution in a few words, as the spec's author would say it."""
    if isinstance(distribution, Choice):
        text = "one of " + ", ".join(compact(value) for value in distribution.values)
    else:
        text = f"{compact(distribution.low)} to {compact(distribution.high)}"
        text += (
            " (log)"
            if distribution.type == "log_uniform" or (isinstance(distribution, Int) and distribution.log)
            else ""
        )
        text += f" in steps of {compact(distribution.step)}" if distribution.step not in (None, 1) else ""
    for key, values in (distribution.when or {}).items():
        text += f"; only where `{key}` is {' or '.join(compact(value) for value in values)}"
    return text


def point_text(point: dict[str, Any]) -> str:
    """A point in one line: `lr=0.00021 r=16`."""
    names = short_keys(point)
    return " ".join(f"{names[key]}={compact(value)}" for key, value in point.items())


def count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def duration(seconds: float | None) -> str:
    """`0:42`, `12:05` or `3:20:11`."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def change(value: float | None, base: float | None) -> str:
    """The relative difference to the base in percent, signed."""
    if value is None or not base or not math.isfinite(base):
        return ""
    return f"{100 * (value - base) / abs(base):+.1f} %"


def scores_text(scores: dict[str, Any]) -> str:
    """`eval_loss 2.7123, accuracy 0.4512`, of what there is."""
    names = {"eval_loss": "eval_loss", "mean_token_accuracy": "accuracy"}
    return ", ".join(f"{name} {figure(scores[key])}" for key, name in names.items() if scores.get(key) is not None)


def data_text(summary: Mapping[str, Any]) -> list[str]:
    """What the data came to, a line each: the rows, and those that could not be used, with the first few by number."""
    if not summary:
        return []
    counted = {
        "read": summary["rows_read"],
        "to train on": summary["rows_train"],
        "to evaluate on": summary["rows_eval"],
        "cut at max_length": summary["truncated"] or None,
        "in both, not trained on": summary["duplicates_removed"] or None,
    }
    parts = [f"{count(number)} {what}" for what, number in counted.items() if number is not None]
    lines = [f"{summary['format']} rows: {', '.join(parts)}; {count(summary['train_tokens'])} tokens"]
    if summary.get("columns_unused"):
        lines += [f"columns that are not used: {', '.join(summary['columns_unused'])}"]
    for key, done in {"dropped": "dropped", "eval_dropped": "dropped from the evaluation set"}.items():
        lines += [describe_drops(summary[key], done)] if summary[key] else []
    return lines


def ending(record: TrialRecord) -> str:
    """Why a trial ended, in one line."""
    first = (record.reason or "").strip().splitlines()[:1]
    return ": ".join(part for part in [record.cause or "", *first] if part)


def leaderboard_columns(
    spec: SweepSpec, status: SweepStatus, records: Sequence[TrialRecord], shown: Sequence[TrialRecord] | None = None
) -> list[Column]:
    """The leaderboard: the untuned base first, then `shown`, or every trial, best first; the winner has a star."""
    best = best_trial(records, spec.objective, status.tokens_per_trial)
    winner = best[0].number if best else None
    rows = leaderboard(records, spec.objective) if shown is None else shown
    metric, base = spec.objective.metric, status.baseline
    keys = list(dict.fromkeys([*spec.space, *(key for record in rows for key in record.point)]))
    names = short_keys(keys)
    searched = [
        Column(names[key], ["", *(compact(row.point[key]) if key in row.point else "" for row in rows)], drop=1)
        for key in keys
    ]
    eval_loss = [figure(base.get("eval_loss")), *(figure(row.eval_loss) for row in rows)]
    accuracy = [figure(base.get("mean_token_accuracy")), *(figure(row.mean_token_accuracy) for row in rows)]
    versus = [change(getattr(row, metric), base.get(metric)) for row in rows]
    is_loss = metric == "eval_loss"
    return [
        Column("trial", ["base", *(f"{'*' if row.number == winner else ''}{row.number}" for row in rows)]),
        *searched,
        Column("eval_loss", eval_loss, drop=0 if is_loss else 3),
        Column("accuracy", accuracy, drop=3 if is_loss else 0),
        Column("vs base", ["", *versus], drop=2),
        Column("tokens", ["", *(count(row.reached) for row in rows)], drop=4),
        Column("time", ["", *(duration(row.duration_s) for row in rows)], drop=5),
        Column("outcome", ["untuned", *(row.outcome for row in rows)], right=False),
    ]
