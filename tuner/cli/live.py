"""What a user sees while a sweep runs: a live table on a terminal, a line per event elsewhere. All on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from tuner.cli.screens import BEST_STYLE, STYLES, lay_out, line
from tuner.execution.events import Display, Silent
from tuner.results.plain import plain
from tuner.results.ranking import best_report, best_trial, leaderboard
from tuner.results.record import TrialRecord
from tuner.results.text import (
    Column,
    change,
    compact,
    count,
    data_text,
    duration,
    ending,
    figure,
    point_text,
    scores_text,
    short_keys,
)
from tuner.spec.changes import differences
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report

BAR_WIDTH = 8


@contextmanager
def watching(spec: SweepSpec, quiet: bool = False, earlier: Sequence[TrialRecord] = ()) -> Iterator[Display]:
    """The display that fits: a live table where stdout and stderr are a terminal, else lines, or nothing if quiet.

    `earlier` trials, of a run that is resumed, stand in the table. Both write to a duplicate of stderr: stdout
    and stderr themselves belong to the libraries while a sweep runs, and go to its log.
    """
    console = Console(file=os.fdopen(os.dup(2), "w"), highlight=False)
    if quiet:
        yield Silent()
    elif console.is_terminal and sys.stdout.isatty():
        table = LiveTable(spec, earlier, console)
        with Live(
            get_renderable=table.render,
            console=console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ):
            yield table
    else:
        yield Lines(spec, console)


@dataclass
class Lines:
    """One line per event, for logs and pipes."""

    spec: SweepSpec
    console: Console
    begun: float = field(default_factory=time.monotonic)
    quarters: dict[str, int] = field(default_factory=dict)
    doing: str = ""

    def stage(self, text: str) -> None:
        if text != self.doing:
            self.doing = text
            self._say(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        quarter = 4 * done // max(total, 1)
        if quarter > self.quarters.get(stage, 0):
            self._say(f"{stage}: {count(done)} of {count(total)}")
        self.quarters[stage] = quarter

    def prepared(self, summary: dict[str, Any], baseline: dict[str, Any], tokens_per_trial: int) -> None:
        for text in data_text(summary):
            self._say(text)
        self._say(f"untuned base: {scores_text(baseline)}; {count(tokens_per_trial)} tokens a trial")

    def trial_started(self, number: int, point: dict[str, Any]) -> None:
        self._say(f"trial {number} starts: {point_text(point)}")

    def trial_reported(self, number: int, report: Report) -> None:
        self._say(
            f"trial {number} at {count(report.tokens)} tokens: {scores_text(report.as_dict())}, "
            f"{report.tokens_per_s:.0f} tokens/s"
        )

    def trial_finished(self, record: TrialRecord) -> None:
        score = f", {scores_text(record.report.as_dict())}" if record.report else ""
        why = ending(record)
        self._say(f"trial {record.number} {record.outcome}{score}" + (f" ({why})" if why else ""))

    def extended(self, spec: SweepSpec) -> None:
        for key, (old, new) in differences(self.spec, spec).items():
            self._say(f"{key} is {new} from now on, was {old}")
        self.spec = spec

    def sweep_finished(self, records: Sequence[TrialRecord], best: TrialRecord | None) -> None:
        over = sum(record.started is not None for record in records)
        self._say(f"{over} trials are over; " + (f"the best is {best.number}" if best else "none is best"))

    def _say(self, text: str) -> None:
        said = f"[{duration(time.monotonic() - self.begun)}] {plain(text)}"
        self.console.print(said, markup=False, soft_wrap=True)


class LiveTable:
    """The live table: a row per trial, what is being done above it, the base and the best so far below.

    Events come from the driver's main thread, `render` from the thread that draws; each event replaces whole values.
    """

    def __init__(self, spec: SweepSpec, earlier: Sequence[TrialRecord], console: Console):
        self._spec = spec
        self._console = console
        self._begun = time.monotonic()
        self._trials = {record.number: record for record in earlier if record.outcome != "RUNNING"}
        self._data: list[str] = []
        self._baseline: dict[str, Any] = {}
        self._budget: int | None = None
        self._spinner = Spinner("dots")
        self._stage = "Starting"
        self._progress: tuple[int, int] | None = None

    def stage(self, text: str) -> None:
        self._stage, self._progress = text, None

    def progress(self, stage: str, done: int, total: int) -> None:
        self._stage, self._progress = stage, (done, total)

    def prepared(self, summary: dict[str, Any], baseline: dict[str, Any], tokens_per_trial: int) -> None:
        self._data = data_text(summary)
        self._baseline, self._budget, self._progress = baseline, tokens_per_trial, None

    def trial_started(self, number: int, point: dict[str, Any]) -> None:
        self._trials[number] = TrialRecord(number, "RUNNING", point, config={})

    def trial_reported(self, number: int, report: Report) -> None:
        before = self._trials[number]
        reports = (*before.reports, report)
        best = best_report(reports, self._spec.objective)
        self._trials[number] = TrialRecord(number, "RUNNING", before.point, {}, reports, best)

    def trial_finished(self, record: TrialRecord) -> None:
        self._trials[record.number] = record

    def extended(self, spec: SweepSpec) -> None:
        self._spec = spec

    def sweep_finished(self, records: Sequence[TrialRecord], best: TrialRecord | None) -> None:
        self._trials = {record.number: record for record in records}

    def render(self) -> Group:
        """The table as it stands, at most as wide and as high as the terminal."""
        records = list(self._trials.values())
        shown = self._rows_that_fit(records)
        lines, dropped = lay_out(self._columns(shown), self._console.width)
        winner = best_trial(records, self._spec.objective, self._budget)
        styles = [
            BEST_STYLE if winner and record.number == winner[0].number else STYLES.get(record.outcome, "")
            for record in shown
        ]
        body = [line(text, style) for text, style in zip(lines, ["bold", *styles], strict=True)] if shown else []
        return Group(self._stage_line(), *body, *self._caption(records, len(shown), dropped))

    def _stage_line(self) -> Table:
        over = sum(record.is_over for record in self._trials.values())
        amount = f"{over} of {self._spec.budget.trials} trials over" if self._trials else ""
        bar: ProgressBar | str = ""
        if self._progress:
            done, total = self._progress
            bar, amount = ProgressBar(total, done, width=2 * BAR_WIDTH), f"{count(done)} of {count(total)}"
        grid = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, None, None, 1, None):
            grid.add_column(ratio=ratio, no_wrap=True)
        elapsed = duration(time.monotonic() - self._begun)
        grid.add_row(self._spinner, line(self._stage, "bold"), bar, Text(amount, style="dim"), Text(elapsed))
        return grid

    def _rows_that_fit(self, records: list[TrialRecord]) -> list[TrialRecord]:
        """All trials in order of number or, where there are too many, those that run and the best others."""
        room = max(self._console.height - 9, 3)
        running = [record for record in records if record.outcome == "RUNNING"]
        others = leaderboard((record for record in records if record.outcome != "RUNNING"), self._spec.objective)
        shown = [*running, *others][:room]
        return sorted(shown, key=lambda record: record.number)

    def _columns(self, shown: Sequence[TrialRecord]) -> list[Column]:
        names = short_keys(self._spec.space)
        searched = [
            Column(name, [compact(record.point[key]) if key in record.point else "" for record in shown], drop=1)
            for key, name in names.items()
        ]
        loss_first = self._spec.objective.metric == "eval_loss"
        return [
            Column("trial", [str(record.number) for record in shown]),
            *searched,
            Column("budget", [self._bar(record) for record in shown], drop=2, right=False),
            Column("eval_loss", [figure(record.eval_loss) for record in shown], drop=0 if loss_first else 3),
            Column("accuracy", [figure(record.mean_token_accuracy) for record in shown], drop=3 if loss_first else 0),
            Column("state", [record.outcome.lower() for record in shown], right=False),
        ]

    def _bar(self, record: TrialRecord) -> str:
        share = min(record.reached / self._budget, 1) if self._budget else 0
        full = round(share * BAR_WIDTH)
        return "━" * full + "·" * (BAR_WIDTH - full)

    def _caption(self, records: Sequence[TrialRecord], shown: int, dropped: Sequence[str]) -> list[Text]:
        captions = []
        hidden = [f"{len(records) - shown} trials" if len(records) > shown else "", *dropped]
        if shown and any(hidden):
            captions.append(line("not shown: " + ", ".join(filter(None, hidden)), "dim"))
        captions += [line(text, "dim") for text in self._data]
        if self._baseline:
            captions.append(line(f"untuned base: {scores_text(self._baseline)}"))
        winner = best_trial(records, self._spec.objective, self._budget)
        if winner:
            metric = self._spec.objective.metric
            versus = change(getattr(winner[1], metric), self._baseline.get(metric))
            text = f"best so far: trial {winner[0].number}, {scores_text(winner[1].as_dict())}"
            captions.append(line(text + (f" ({versus})" if versus else ""), BEST_STYLE))
        return captions
