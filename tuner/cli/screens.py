"""What the commands print on stdout when they are done, each a function from what is known to text."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from tuner.cli.output import asker, say
from tuner.results.plain import plain
from tuner.results.ranking import best_trial
from tuner.results.record import SweepStatus, TrialRecord, iso, outcome_counts
from tuner.results.text import (
    Column,
    change,
    compact,
    count,
    data_text,
    describe,
    duration,
    ending,
    figure,
    fit,
    leaderboard_columns,
    scores_text,
)
from tuner.spec.checks.unread import without_effect
from tuner.spec.sharing import trials_apart, why_not_shared
from tuner.spec.sweep import SweepSpec

if TYPE_CHECKING:
    from tuner.execution.verify import Comparison
    from tuner.training.worst_case import WorstCase

STYLES = {"STOPPED": "dim", "INFEASIBLE": "yellow", "FAILED": "red", "RUNNING": "cyan", "INTERRUPTED": "dim cyan"}
BEST_STYLE = "bold green"
_UNLIMITED = 100_000


def lay_out(columns: Sequence[Column], width: int) -> tuple[list[str], list[str]]:
    """The lines of a table, header first, that fit a width, and the headings that had to go."""
    kept, dropped = fit([column.each(partial(plain, one_line=True)) for column in columns], width)
    padded = [
        [
            cell.rjust(column.width) if column.right else cell.ljust(column.width)
            for cell in (column.header, *column.cells)
        ]
        for column in kept
    ]
    lines = ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]
    return lines, [column.header for column in dropped]


def line(text: str, style: str = "") -> Text:
    """One line that is cut, never wrapped."""
    return Text(plain(text, one_line=True), style=style, no_wrap=True, overflow="ellipsis")


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print one line, cut where the terminal ends: of a text's own `no_wrap` Console.print takes no notice."""
    console.print(line(text, style), no_wrap=True, overflow="ellipsis")


def from_here(path: str | None) -> str | None:
    """A path as it can be typed in the working directory: relative to it, where it lies below.

    A job's working directory is its own, and Ray's to delete: whoever asked is elsewhere.
    """
    if path is None or asker.address or not Path(path).is_relative_to(Path.cwd()):
        return path
    return str(Path(path).relative_to(Path.cwd()))


def show_table(columns: Sequence[Column], styles: Sequence[str]) -> None:
    """Print a table: on a terminal as wide as that, with a style for each row; elsewhere whole and plain."""
    console = Console(highlight=False)
    lines, dropped = lay_out(columns, console.width if console.is_terminal else _UNLIMITED)
    if not console.is_terminal:
        say("\n".join(lines))
        return
    for text, style in zip(lines, ["bold", *styles], strict=True):
        print_line(console, text, style)
    if dropped:
        print_line(console, f"for want of room not shown: {', '.join(dropped)}", "dim")


def show_leaderboard(
    spec: SweepSpec, status: SweepStatus, records: Sequence[TrialRecord], shown: Sequence[TrialRecord] | None = None
) -> None:
    """Print the base and the trials, best first or as `shown`."""
    columns = leaderboard_columns(spec, status, records, shown)
    marks = columns[0].cells
    outcomes = columns[-1].cells
    styles = [
        BEST_STYLE if mark.startswith("*") else STYLES.get(outcome, "")
        for mark, outcome in zip(marks, outcomes, strict=True)
    ]
    show_table(columns, styles)


def show_endings(records: Sequence[TrialRecord]) -> None:
    """Print why trials failed or were infeasible, a line each."""
    for record in records:
        if record.outcome in ("INFEASIBLE", "FAILED"):
            say(textwrap.shorten(f"trial {record.number} {record.outcome}: {ending(record)}", 160, placeholder=" ..."))


def show_best(spec: SweepSpec, status: SweepStatus, records: Sequence[TrialRecord]) -> None:
    """Print the winner in one paragraph, or that there is none."""
    found = best_trial(records, spec.objective, status.tokens_per_trial)
    if found is None:
        say("best: none; no trial completed its budget with a finite score")
        return
    record, report = found
    metric = spec.objective.metric
    versus = change(getattr(report, metric), status.baseline.get(metric))
    say(
        f"best: trial {record.number}, {scores_text(report.as_dict())}"
        + (f" ({metric} {versus} against the base)" if versus else "")
    )
    say("  " + "  ".join(f"{key}={compact(value)}" for key, value in record.point.items()))
    adapter = from_here(report.adapter_path) or "not kept"
    say(f"  scored at {count(report.tokens)} tokens, step {report.step}; adapter {adapter}")


def show_promoted(promoted: dict[str, Any] | None) -> None:
    """Print where the promoted model is, or why there is none, and a sample answer before and after."""
    if not promoted:
        return
    if reasons := promoted.get("refused"):
        say("not promoted: " + "; ".join(reasons))
        return
    metric, known = promoted["metric"], promoted.get("scores")  # an earlier version recorded the objective's alone
    names = {"merged": "score_after", "trial": "score_before", "baseline": "baseline"}
    scores = known or {whose: {metric: promoted[name]} for whose, name in names.items()}
    forced = ", forced" if promoted.get("forced") else ""
    say(f"promoted: {promoted['alias']} {promoted['version']}{forced}, {from_here(promoted['path'])}")
    say(
        f"  merged and loaded again: {scores_text(scores['merged'])}; the trial: {scores_text(scores['trial'])}; "
        f"the base: {scores_text(scores['baseline'])}"
    )
    for sample in (promoted.get("samples") or [])[:1]:
        for label in ("prompt", "before", "after"):
            say(_paragraph(f"  {label:<8}", str(sample.get(label, ""))))


def _paragraph(label: str, text: str) -> str:
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    shortened = textwrap.shorten(text, 420, placeholder=" ...") or "(nothing)"
    return textwrap.fill(shortened, width, initial_indent=label, subsequent_indent=" " * len(label))


def show_status(spec: SweepSpec, status: SweepStatus, records: Sequence[TrialRecord]) -> None:
    """Print one screen: how the sweep stands."""
    counts = ", ".join(f"{number} {outcome}" for outcome, number in outcome_counts(records).items()) or "none yet"
    driver = f"pid {status.pid} on {status.host}" if status.pid else "none yet"
    facts = {
        "sweep": spec.name,
        "data": "; ".join(data_text(status.data)) or "not read yet",
        "status": status.status + (f" ({status.message})" if status.message else ""),
        "trials": f"{counts}; {spec.budget.trials} asked for",
        "base": scores_text(status.baseline) or "not measured yet",
        "sharing": sharing_text(status.sharing),
        "elapsed": duration(status.elapsed_s),
        "driver": driver,
        "last heartbeat": iso(status.heartbeat) or "none yet",
    }
    for key, value in facts.items():
        say(f"{key:<15} {value}")
    show_best(spec, status, records)
    show_promoted({key: value for key, value in (status.promoted or {}).items() if key != "samples"})


def show_comparison(found: Comparison) -> None:
    """Print the reports of a trial beside those of its rerun, and whether they agree."""
    pairs = list(zip(found.recorded, found.rerun, strict=True))
    columns = [Column("tokens", [count(a.tokens) for a, _ in pairs]), Column("step", [count(a.step) for a, _ in pairs])]
    for name in ("eval_loss", "train_loss", "grad_norm"):
        columns += [
            Column(name, [f"{getattr(a, name):.6f}" for a, _ in pairs]),
            Column("rerun", [f"{getattr(b, name):.6f}" for _, b in pairs], drop=1),
            Column("differs", [f"{abs(getattr(a, name) - getattr(b, name)):.1e}" for a, b in pairs]),
        ]
    show_table(columns, [""] * len(pairs))
    verdict = "agrees with" if found.agrees else "differs from"
    say(
        f"trial {found.number} {verdict} its rerun: eval_loss by {found.largest['eval_loss']:.1e} at most, where "
        f"{found.bound:g} is allowed ({found.why_this_bound})"
    )


def sharing_text(sharing: dict[str, Any] | None) -> str:
    """In words, how the trials of a sweep use the base."""
    if not sharing:
        return "not decided yet"
    if strategy := sharing.get("strategy"):
        return f"each trial has its own base: {sharing['reason']}; {strategy['reason']}"
    if not sharing["slots"]:
        return f"each trial has its own base: {sharing['reason']}"
    slots, engines = sharing["slots"], sharing["engines"]
    where = "the shared base" if engines == 1 else f"each of {engines} shared bases"
    return f"{slots} {'slot' if slots == 1 else 'slots'} on {where}: {sharing['reason']}"


def show_trial(record: TrialRecord) -> None:
    """Print all that is known of one trial: how it ended, what it ran with, its reports, its last words."""
    say(f"trial {record.number}: {record.outcome}" + (f", {ending(record)}" if ending(record) else ""))
    if record.report:
        say(f"{scores_text(record.report.as_dict())} at {count(record.tokens)} tokens, step {record.step}")
        say(f"adapter  {from_here(record.adapter_path) or 'not kept'}")
    speed = f"{record.tokens_per_s:.0f} tokens/s" if record.tokens_per_s else ""
    say(", ".join(filter(None, [f"{count(record.reached)} tokens trained", duration(record.duration_s), speed])))
    say("\nconfig (* searched)")
    for section in ("model", "train", "lora"):
        for key, value in sorted((record.config.get(section) or {}).items()):
            dotted = f"{section}.{key}"
            say(f"{'*' if dotted in record.point else ' '} {dotted} = {_value(value)}")
    for dotted in sorted(key for key in record.point if not _stands_in(record.config, key)):
        say(f"* {dotted} = {_value(record.point[dotted])}")
    if record.reports:
        say()
        show_table(_report_columns(record), [BEST_STYLE if one is record.report else "" for one in record.reports])
    for attempt in record.tried:
        say(f"\ntried before, up to {count(attempt.tokens)} tokens\n{textwrap.indent(str(attempt), '  ')}")
    if record.reason:
        say(f"\nreason\n{textwrap.indent(record.reason.strip(), '  ')}")
    if record.log_tail:
        say(f"\nlast lines of its log\n{textwrap.indent(record.log_tail.rstrip(), '  ')}")


def _stands_in(config: dict[str, Any], dotted: str) -> bool:
    section, _, key = dotted.partition(".")
    return key in (config.get(section) or {})


def _value(value: Any) -> str:
    return compact(value) if value is None or isinstance(value, bool) else str(value)


def _report_columns(record: TrialRecord) -> list[Column]:
    reports = record.reports
    return [
        Column("tokens", [f"{'*' if report is record.report else ''}{count(report.tokens)}" for report in reports]),
        Column("step", [count(report.step) for report in reports], drop=1),
        Column("epoch", [f"{report.epoch:.2f}" for report in reports], drop=5),
        Column("train_loss", [figure(report.train_loss) for report in reports], drop=2),
        Column("eval_loss", [figure(report.eval_loss) for report in reports]),
        Column("accuracy", [figure(report.mean_token_accuracy) for report in reports]),
        Column("lr", [compact(report.learning_rate) for report in reports], drop=3),
        Column("grad_norm", [compact(report.grad_norm) for report in reports], drop=6),
        Column("tokens/s", [f"{report.tokens_per_s:.0f}" for report in reports], drop=4),
        Column("peak MB", [count(report.peak_memory_bytes // 2**20) for report in reports], drop=7),
        Column("time", [duration(report.duration_s) for report in reports], drop=4),
    ]


def show_overview(rows: Sequence[dict[str, Any]]) -> None:
    """Print one line a sweep."""
    columns = [
        Column("sweep", [row["name"] for row in rows], right=False),
        Column("status", [row["status"] for row in rows], right=False),
        Column("trials", [f"{row['trials']}/{row['asked']}" if row["asked"] else "" for row in rows]),
        Column("best", ["" if row["best"] is None else str(row["best"]) for row in rows]),
        Column("score", [figure(row["score"]) for row in rows]),
        Column("base", [figure(row["baseline"]) for row in rows], drop=1),
        Column("metric", [row["metric"] or "" for row in rows], drop=2, right=False),
        Column("elapsed", [duration(row["elapsed_s"]) for row in rows], drop=3),
        Column("created (UTC)", [f"{row['created']:%Y-%m-%d %H:%M}" if row["created"] else "" for row in rows], drop=4),
    ]
    show_table(columns, [STYLES.get(str(row["status"]).upper(), "") for row in rows])
    for row in rows:
        if row["status"] == "unreadable":
            say(f"{row['name']}: {row['problem']}", err=True)


def _base_text(spec: SweepSpec) -> str:
    reasons = why_not_shared(spec)
    if reasons:
        return "; ".join(f"one each: {reason}" for reason in reasons)
    return "; ".join(["shared by the trials", *trials_apart(spec)])


def show_spec(spec: SweepSpec, most: WorstCase | None = None) -> None:
    """Print what a sound spec asks for, and what that takes at most."""
    budget = spec.budget
    per_trial = {"tokens": budget.tokens_per_trial, "steps": budget.steps_per_trial, "epochs": budget.epochs_per_trial}
    amount = " ".join(f"{value:,} {unit}" for unit, value in per_trial.items() if value is not None)
    limits = [
        budget.time_limit and duration(budget.time_limit),
        budget.tokens and f"{budget.tokens:,} tokens",
        budget.gpu_hours and f"{budget.gpu_hours:g} GPU-hours",
        budget.disk and f"{budget.disk / 1e9:g} GB on disk",
    ]
    limit = "".join(f", at most {limit}" for limit in limits if limit)
    facts = {
        "sweep": spec.name,
        "model": f"{spec.model.name}, {spec.model.dtype}, quantization {spec.model.quantization}",
        "data": spec.data.path,
        "tuning": "full" if spec.lora is None else "LoRA",
        "budget": f"{budget.trials} trials of {amount}, {budget.evals_per_trial} evaluations each{limit}",
        "search": f"{spec.search.sampler}, early stopping {spec.stopping.type}",
        "objective": f"{spec.objective.goal} {spec.objective.metric}",
        "base": _base_text(spec),
        "root": spec.storage.root,
    }
    for key, value in facts.items():
        say(f"{key:<10} {value}")
    for key, distribution in spec.space.items():
        say(f"  {key}: {describe(distribution)}")
    for sentence in without_effect(spec):
        say(sentence)
    if most is not None:
        tokens = "as many epochs as asked for" if most.tokens is None else f"{most.tokens:,} tokens"
        say(f"at most    {most.trials} trials, {tokens} trained, {most.evaluated_rows:,} rows scored")
        say(f"  memory   {most.strategy}")
        say(f"  disk     {most.disk_bytes / 1e9:.2f} GB; one adapter {most.adapter_bytes / 1e6:.1f} MB")
