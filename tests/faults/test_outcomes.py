"""Trials that fail: what was good before is no reason to win, and a sweep without a success says so."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import tuner
from tests.faults.matrix import measure
from tests.real_sweeps import write_spec
from tuner.results.record import TrialRecord

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

BUDGET = 12_000
BOTH = {"resources": {"share_base": 2}, "storage": {"root": "runs"}}


def block(place: Path) -> None:
    """Let nobody save an adapter there: a file is in the way."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()


def by_loss(record: TrialRecord) -> float:
    return min(report.eval_loss for report in record.reports)


def test_a_trial_that_fails_after_the_best_score_does_not_win(tiny_model_dir, tmp_path, start, note):
    """The last adapter of the trial with the better learning rate cannot be saved; the other one wins."""
    budget, root = {"trials": 2, "tokens_per_trial": BUDGET, "evals_per_trial": 4}, tmp_path / "runs"
    rates = {"train.learning_rate": {"type": "choice", "values": [3e-3, 3e-4]}}
    search = {"sampler": "grid"}
    file = write_spec(tmp_path, tiny_model_dir, "late", budget=budget, space=rates, search=search, **BOTH)
    running = start("run", file, cwd=tmp_path)
    running.wait_for(f"trial 0 at {BUDGET // 4:,} tokens")
    running.wait_for(f"trial 1 at {BUDGET // 4:,} tokens")
    sweep = tuner.open("late", root)
    (good,) = [record.number for record in sweep.records() if record.point["train.learning_rate"] == 3e-3]
    block(sweep.folder.adapter(good, BUDGET))
    assert running.end() == 0, running.lines
    failed, other = sweep.trial(good), sweep.trial(1 - good)
    assert by_loss(failed) < by_loss(other), "it had not the best score"
    assert (failed.outcome, failed.reached) == ("FAILED", 3 * BUDGET // 4)
    assert failed.log_tail
    figures = measure(sweep, 1, ended={good: ("FAILED", failed.cause)})
    note("an error after the best score", figures)
    assert (figures.lost, figures.duplicated) == (0, 0)
    assert sweep.best.number == other.number == sweep.results()["best"]
    promoted = sweep.state().promoted
    assert promoted["trial"] == other.number


def test_a_sweep_whose_trials_all_fail_has_failed_and_names_no_best(tiny_model_dir, tmp_path, start, note):
    budget, root = {"trials": 3, "tokens_per_trial": BUDGET, "evals_per_trial": 4}, tmp_path / "runs"
    file = write_spec(tmp_path, tiny_model_dir, "lost", budget=budget, **BOTH)
    running = start("run", file, cwd=tmp_path)
    running.wait_for("Searching: 3 trials")
    sweep = tuner.open("lost", root)
    while running.process.poll() is None:
        for record in sweep.records():
            place = sweep.folder.adapter(record.number, BUDGET)
            if record.reports and not place.exists():
                block(place)
        time.sleep(0.05)
    assert running.end() == 1, running.lines
    assert (sweep.status, sweep.best, sweep.results()["best"]) == ("failed", None, None)
    records = sweep.records()
    figures = measure(sweep, 3, ended={record.number: ("FAILED", record.cause) for record in records})
    note("all trials failing", figures)
    assert (figures.lost, figures.duplicated) == (0, 0)
    assert sweep.state().message == "no trial completed its budget"
    assert any("no trial completed its budget" in line for line in running.lines[-3:]), running.lines
    assert not (root / "models").exists()
