"""A sweep whose time is up before any trial is through, on real Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.trial import TrialState
from real_sweeps import Command, write_spec

import tuner

pytestmark = pytest.mark.timeout(300)

LIMIT_S = 45


@pytest.fixture(scope="module")
def stopped(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[str], tuner.Sweep]:
    """Two trials of hours each, one after the other; their rows are made by a template."""
    folder = tmp_path_factory.mktemp("time-limit")
    budget = {"trials": 2, "tokens_per_trial": 20_000_000, "evals_per_trial": 100, "time_limit": f"{LIMIT_S}s"}
    data = {"path": "train.jsonl", "eval_path": "eval.jsonl", "template": "{prompt} ->{completion}"}
    file = write_spec(folder, tiny_model_dir, "too-long", data=data, budget=budget, storage={"root": "runs"})
    command = Command("run", file, cwd=folder)
    try:
        code = command.end()
    finally:
        command.kill()
    return code, command.lines, tuner.open("too-long", folder / "runs")


def test_what_runs_when_the_time_is_up_is_stopped_and_nothing_is_started_any_more(stopped):
    _, lines, sweep = stopped
    (trial,) = sweep.records()
    assert (trial.outcome, trial.cause) == ("STOPPED", "time limit"), lines
    assert trial.reason == f"budget.time_limit of {LIMIT_S} s"
    assert [trial.state for trial in sweep.store.study.trials] == [TrialState.PRUNED]
    assert LIMIT_S <= sweep.state().elapsed_s < LIMIT_S + 30


def test_without_a_completed_trial_the_sweep_has_failed_and_says_why(stopped):
    code, lines, sweep = stopped
    assert code == 1
    assert (sweep.status, sweep.state().message) == ("failed", "no trial completed its budget")
    assert f"Ending what runs: budget.time_limit of {LIMIT_S} s" in "".join(lines)
    assert lines[-1].startswith("tuner show too-long 0")


def test_rows_made_by_a_template_are_texts(stopped):
    assert stopped[2].state().data["format"] == "text"
