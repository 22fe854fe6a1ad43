"""What the driver of a sweep writes and reads for each trial, without Ray."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from made_by_hand import make_report, make_spec

from tuner.execution.events import Silent
from tuner.execution.trials import Trials
from tuner.results.store import Store
from tuner.spec.layout import SweepFolder


@contextmanager
def statements() -> Iterator[list[str]]:
    """Everything that is said to any database in the time of a block."""
    said: list[str] = []

    def note(connection: object, cursor: object, statement: str, *_: object) -> None:
        said.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        yield said
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


def run_trial(trials: Trials, folder: SweepFolder, loss: float) -> tuple[int, int]:
    """Statements of a trial with two reports: of one of these, and of all else."""
    with statements() as around:
        config = trials.ask()
        assert config is not None
        for tokens in (500, 1000):
            path = folder.adapter(config["number"], tokens)
            path.mkdir(parents=True)
            with statements() as one_report:
                trials.reported(config["number"], make_report(tokens, loss - tokens / 1e6, adapter_path=str(path)))
        trials.ended(config["number"])
    return len(one_report), len(around)


def test_a_trial_costs_the_same_however_many_there_were(tmp_path):
    budget = {"trials": 30, "tokens_per_trial": 1000, "evals_per_trial": 2}
    spec = make_spec(tmp_path, budget=budget, search={"sampler": "random"}, stopping={"type": "none"})
    store = Store.create(spec)
    trials = Trials(store, {"tokens_per_trial": 1000, "baseline": {"eval_loss": 4.0}}, Silent())
    costs = [run_trial(trials, store.folder, 3 - number / 100) for number in range(30)]
    assert costs[5:] == [costs[5]] * 25
    assert costs[5][0] <= 10
    assert sorted(store.folder.path.glob("trials/*/tokens-*")) == [store.folder.adapter(n, 1000) for n in (27, 28, 29)]


def database_work(root: Path, running: int) -> float:
    """SQLite's instructions for each question, report and end of so many trials that run at once."""
    work = 0

    def count() -> None:
        nonlocal work
        work += 1

    def watch(connection: sqlite3.Connection, *_: object) -> None:
        connection.set_progress_handler(count, 1)

    budget = {"trials": running, "tokens_per_trial": 1000, "evals_per_trial": 4}
    store = Store.create(make_spec(root, budget=budget, stopping={"type": "asha", "grace_evals": 1}))
    sa.event.listen(sa.pool.Pool, "connect", watch)
    try:
        trials = Trials(store, {"tokens_per_trial": 1000, "baseline": {"eval_loss": 4.0}}, Silent())
        numbers = [config["number"] for _ in range(running) if (config := trials.ask())]
        assert len(numbers) == running
        for number in numbers:
            trials.reported(number, make_report(250, 3 - number / 1000))
        for number in numbers:
            trials.ended(number)
    finally:
        sa.event.remove(sa.pool.Pool, "connect", watch)
    return work / running


def test_a_trial_costs_the_database_the_same_however_many_run_beside_it(tmp_path):
    few, many = database_work(tmp_path / "few", 10), database_work(tmp_path / "many", 100)
    assert many < 1.5 * few, (few, many)
