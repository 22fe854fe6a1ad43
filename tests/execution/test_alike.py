"""When every trial fails in the same way the search ends, and says so; without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.made_by_hand import BUDGET, make_report, make_spec
from tuner.execution.events import Silent
from tuner.execution.trials import Trials
from tuner.results.store import Store
from tuner.spec.trial import Ending

FACTS = {"tokens_per_trial": BUDGET, "baseline": {"eval_loss": 4.0}}


def begin(tmp_path: Path, **budget: Any) -> tuple[Store, Trials]:
    limits = {"trials": 12, "tokens_per_trial": BUDGET, "evals_per_trial": 4, **budget}
    spec = make_spec(tmp_path, budget=limits, search={"sampler": "random"}, stopping={"type": "none"})
    store = Store.create(spec)
    return store, Trials(store, FACTS, Silent())


def fail(trials: Trials, reason: str, outcome: Any = "FAILED", cause: str = "bug") -> None:
    config = trials.ask()
    assert config is not None
    trials.failed(config["number"], Ending(outcome, cause, reason))
    trials.ended(config["number"])


def test_three_trials_that_fail_alike_end_the_search_with_a_sentence(tmp_path):
    store, trials = begin(tmp_path)
    running = trials.ask()
    for step in (3, 14, 15):
        assert trials.over is None
        fail(trials, f"ValueError: no layer at step {step}")
    assert trials.halt.stop_all()
    assert trials.ask() is None
    said = "the first 3 trials failed alike (bug: ValueError: no layer at step 15), and budget.max_failures is 3"
    assert trials.over == said
    trials.end_the_rest()
    assert store.trials()[running["number"]].outcome == "RUNNING"  # which `tuner resume` takes up again
    again = Trials(store, FACTS, Silent())
    assert again.remaining == 9
    assert again.ask()["number"] == running["number"]


def test_max_failures_says_how_many_and_may_be_raised_meanwhile(tmp_path):
    store, trials = begin(tmp_path, max_failures=2)
    fail(trials, "no")
    store.set_spec(store.spec.model_copy(update={"budget": store.spec.budget.model_copy(update={"max_failures": 4})}))
    fail(trials, "no")
    fail(trials, "no")
    assert not trials.halt.stop_all()
    fail(trials, "no")
    assert trials.halt.stop_all()


@pytest.mark.parametrize(
    "others",
    [
        [("FAILED", "bug", "another fault")],
        [("INFEASIBLE", "oom", "CUDA out of memory.")] * 3,
        [("INFEASIBLE", "diverged", "eval_loss is nan")] * 3,
        [("FAILED", "preempted", "its node went away")] * 3,
    ],
    ids=str,
)
def test_what_fails_otherwise_or_lies_in_the_point_or_outside_is_not_counted(others, tmp_path):
    _, trials = begin(tmp_path)
    for _ in range(2):
        fail(trials, "no")
    for outcome, cause, reason in others:
        for _ in range(6):  # until it is not tried again
            if trials.over is None and not trials.halt.stop_all():
                fail(trials, reason, outcome, cause)
        break
    assert not trials.halt.stop_all()


def test_trials_that_come_further_than_those_that_failed_go_on(tmp_path):
    _, trials = begin(tmp_path)
    number = trials.ask()["number"]
    trials.reported(number, make_report(250, 2.0))
    for _ in range(4):
        fail(trials, "no")
    assert not trials.halt.stop_all()
