"""The matrix: what is done to a sweep, and what that cost it, as its tests measured; and the README's copy of it.

Every row is proved by tests that note their figures with the fixture `note`. `make figures` writes these to
`results/`, `python -m tests.faults.matrix README.md` puts the table into the README; a test fails when it no longer
fits them, and when a row has no test.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import tuner
from tests.real_sweeps import trained_alone
from tuner.results.record import TrialRecord
from tuner.spec.reference import put_between
from tuner.spec.trial import NO_IMPROVEMENT, milestones

RESULTS = Path(__file__).parent / "results"
WRITE = "TUNER_TEST_FIGURES"
"""Variable: when set, figures are written to RESULTS."""

ROWS = (
    "a worker killed mid-step",
    "a worker killed mid-evaluation",
    "a worker killed mid-save",
    "the driver killed at 20 random moments",
    "the driver killed between training's end and the store's commit",
    "an engine killed with 4 slots in it",
    "a raylet removed",
    "the head killed and restarted",
    "rank 0 raising while rank 1 waits in a collective",
    "a train loop that sleeps for ever",
    "NaN at step 3",
    "an error after the best score",
    "all trials failing",
    "a store locked by another process",
    "a PostgreSQL restart mid-sweep",
    "a truncated adapter",
    "a truncated checkpoint",
    "a truncated Tune snapshot",
    "truncated searcher state",
    "a truncated cache file",
    "two processes filling one cache",
    "disk full in a checkpoint",
    "disk full in promotion",
    "a kill between promotion's write and rename",
    "a second Ray cluster on the host",
    "a dashboard that never answers",
    "a port drawn that Ray takes for itself",
    "two drivers resuming one sweep",
    "a clock that jumps",
    "200 trials each reporting 50 times with a reader polling",
)


@dataclass(frozen=True)
class Figures:
    """What faults cost a sweep, as its records say afterwards."""

    injected: int
    """Faults."""
    asked: int
    """Trials that there were to be."""
    lost: int
    """Trials that are missing, still RUNNING, short of an evaluation, or ended as they would not have without."""
    duplicated: int
    """Numbers given twice, trials beyond those asked for, evaluations beyond a trial's, finished trials run again."""
    recover_s: tuple[float, ...] = ()
    """Seconds from each fault to the first new progress; of those after which something was to go on."""
    difference: float | None = None
    """The largest, in nats, of any eval_loss of a trial that went on from that of an uninterrupted stock trainer."""


def measure(
    sweep: tuner.Sweep,
    injected: int,
    recover_s: Iterable[float | None] = (),
    ended: Mapping[int, tuple[str, str | None]] | None = None,
    before: Sequence[Sequence[TrialRecord]] = (),
    difference: float | None = None,
) -> Figures:
    """The figures of a sweep that is over.

    `ended` has the outcome and cause of trials that the fault itself was to end; all others are to have trained their
    budget. `before` are records from earlier moments: what was finished then must be unchanged now.
    """
    import optuna

    spec, records = sweep.spec, {record.number: record for record in sweep.records()}
    asked = spec.budget.trials
    ahead = milestones(sweep.state().tokens_per_trial or 0, spec.budget.evals_per_trial)
    endings = dict.fromkeys(range(asked), ("COMPLETED", None)) | dict(ended or {})

    def whole(number: int) -> bool:
        record = records.get(number)
        if record is None or record.finished is None or (record.outcome, record.cause) != endings[number]:
            return False
        return record.outcome != "COMPLETED" or [report.tokens for report in record.reports] == ahead

    study = sweep.store.study.get_trials(deepcopy=False)
    numbers = [trial.number for trial in study if trial.state != optuna.trial.TrialState.WAITING]
    reports = [(row["trial"], row["tokens"]) for row in sweep.store.reports()]
    strange = [report for report in reports if report[1] not in ahead]
    finished = [record for moment in before for record in moment if record.finished]
    again = {record.number for record in finished if _told(records.get(record.number)) != _told(record)}
    return Figures(
        injected=injected,
        asked=asked,
        lost=sum(not whole(number) for number in range(asked)),
        duplicated=len(numbers)
        - len(set(numbers) & set(range(asked)))
        + len(reports)
        - len(set(reports))
        + len(strange)
        + len(again),
        recover_s=tuple(round(seconds, 1) for seconds in recover_s if seconds is not None),
        difference=difference,
    )


def _told(record: TrialRecord | None) -> Any:
    """What no one changes of a finished trial; its adapters may be dropped."""
    return record and (
        record.started,
        record.finished,
        [(report.tokens, report.eval_loss) for report in record.reports],
    )


def recovery_s(sweep: tuner.Sweep, fault: datetime) -> float | None:
    """Seconds from a fault to the first evaluation, end of a trial, or end of the sweep after it; None without any."""
    ends = [record.finished for record in sweep.records()] + [sweep.state().finished]
    times = [row["time"] for row in sweep.store.reports()] + [end for end in ends if end]
    after = [time for time in times if time > fault]
    return (min(after) - fault).total_seconds() if after else None


def difference_alone(sweep: tuner.Sweep, numbers: Iterable[int], folder: Path) -> float:
    """The largest difference, in nats, of an eval_loss of these trials from what a stock SFTTrainer reports there."""
    state = sweep.state()
    facts = {field: getattr(state, field) for field in ("tokens_per_trial", "data", "baseline")}
    resources = sweep.spec.resources.model_copy(update={"workers_per_trial": 1, "strategy": "auto"})
    spec = sweep.spec.model_copy(update={"resources": resources})
    worst = 0.0
    for number in numbers:
        record = sweep.trial(number)
        alone = trained_alone(spec, record.config, facts, folder)
        assert record.cause == NO_IMPROVEMENT or len(record.reports) == len(alone), f"trial {number} is not whole"
        pairs = zip(record.reports, alone, strict=False)
        worst = max([worst, *(abs(here.eval_loss - there.eval_loss) for here, there in pairs)])
    return worst


def write(row: str, test: str, figures: Figures) -> None:
    """Put the figures of one test into the file of its row."""
    assert row in ROWS, f"{row!r} is no row of the matrix"
    if os.environ.get(WRITE):
        RESULTS.mkdir(exist_ok=True)
        there = read(row) | {test: asdict(figures) | {"cores": os.cpu_count()}}
        _file(row).write_text(json.dumps(dict(sorted(there.items())), indent=1) + "\n", encoding="utf-8")


def read(row: str) -> dict[str, dict[str, Any]]:
    """The committed figures of a row, by test."""
    return json.loads(_file(row).read_text(encoding="utf-8")) if _file(row).exists() else {}


def _file(row: str) -> Path:
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', row.lower())}.json"


LEGEND = """\
faults          how often it was done, in all tests of the row; trials: how many there were to be
lost            missing, still running, without one of their evaluations, or ended as they would not have
duplicated      numbers given twice, trials or evaluations too many, finished trials that were run again
recover         seconds from a fault to the next evaluation, end of a trial or end of the sweep: median (most), start
                of Ray and of the libraries included where a sweep was resumed
loss differs    most, in nats, that a trial which went on is from one that was never cut off (float32)
"""


def table() -> str:
    """The committed figures as text, a line for every row."""
    lines = [["fault", "faults", "trials", "lost", "duplicated", "recover s", "loss differs"]]
    for row in ROWS:
        tests = list(read(row).values())
        times = [seconds for one in tests for seconds in one["recover_s"]]
        differences = [one["difference"] for one in tests if one["difference"] is not None]
        sums = [str(sum(one[key] for one in tests)) for key in ("injected", "asked", "lost", "duplicated")]
        recover = f"{statistics.median(times):.0f} ({max(times):.0f})" if times else ""
        differs = f"{max(differences):.0e}" if differences else ""
        lines.append([row, *sums, recover, differs] if tests else [row, "not measured", *[""] * 5])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in lines
    ]
    cores = sorted({one["cores"] for row in ROWS for one in read(row).values()})
    where = f"On {'/'.join(map(str, cores))} CPU cores."
    return "\n".join([*(line.rstrip() for line in text), "", where, LEGEND])


BEGIN, END = (
    "<!-- measured by `make figures`, put here by `make readme` -->\n",
    "<!-- end of the matrix -->",
)


def with_matrix(page: str) -> str:
    """Return a page with the table of the committed figures between its markers."""
    return put_between(page, BEGIN, END, f"\n```text\n{table()}```\n\n")


if __name__ == "__main__":
    (page,) = map(Path, sys.argv[1:])
    page.write_text(with_matrix(page.read_text(encoding="utf-8")), encoding="utf-8")
