"""Which trials are tried again, with what, and what is kept of the attempts before; without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_by_hand import BUDGET, make_report, make_spec

from tuner.execution.events import Silent
from tuner.execution.retries import TIMES, as_changed, failed_attempt
from tuner.execution.trials import Trials
from tuner.results.store import Store
from tuner.spec.space import resolve
from tuner.spec.trial import Attempt, Ending

FACTS = {"tokens_per_trial": BUDGET, "baseline": {"eval_loss": 4.0}}
LOST = Ending("FAILED", "worker-lost", "it was killed", "the last line")
NO_MEMORY = Ending("INFEASIBLE", "oom", "CUDA out of memory.", "the last line")


def sweep(tmp_path: Path, **sections: Any) -> tuple[Store, Trials]:
    budget = {"trials": 2, "tokens_per_trial": BUDGET, "evals_per_trial": 4}
    spec = make_spec(tmp_path, budget=budget, search={"sampler": "random"}, stopping={"type": "none"}, **sections)
    store = Store.create(spec)
    return store, Trials(store, FACTS, Silent())


def fail(trials: Trials, number: int, ending: Ending) -> None:
    trials.failed(number, ending)
    trials.ended(number)


@pytest.mark.parametrize("cause", ["diverged", "data", "disk", "bug", "refused", "strategy", "budget", "cancelled"])
def test_what_would_only_come_again_is_not_tried_again(cause, tmp_path):
    config = resolve(make_spec(tmp_path), 0, {})
    assert failed_attempt(config, Ending("FAILED", cause), 0, [], 1) is None


@pytest.mark.parametrize("cause", TIMES)
def test_what_may_pass_is_tried_so_often_until_an_evaluation_comes_between(cause, tmp_path):
    config = resolve(make_spec(tmp_path), 0, {})
    tried: list[Attempt] = []
    while attempt := failed_attempt(config, Ending("FAILED", cause), 250, tried, 1):
        tried.append(attempt)
    assert len(tried) == TIMES[cause]
    assert failed_attempt(config, Ending("FAILED", cause), 500, tried, 1) is not None


def test_where_memory_ran_out_it_is_tried_once_with_half_the_rows_at_once(tmp_path):
    config = resolve(make_spec(tmp_path, train={"per_device_train_batch_size": 8}), 0, {})
    attempt = failed_attempt(config, NO_MEMORY, 0, [], 1)
    assert attempt is not None
    changed = as_changed(config, [attempt])["train"]
    assert (changed["per_device_train_batch_size"], changed["gradient_accumulation_steps"]) == (4, 2)
    assert config["train"]["per_device_train_batch_size"] == 8
    assert failed_attempt(config, NO_MEMORY, 250, [attempt], 1) is None
    one_row = resolve(make_spec(tmp_path, train={"per_device_train_batch_size": 1}), 0, {})
    assert failed_attempt(one_row, NO_MEMORY, 0, [], 1) is None


def test_one_trial_has_one_number_whatever_is_tried_and_its_record_says_what_was(tmp_path):
    store, trials = sweep(tmp_path, train={"per_device_train_batch_size": 8})
    first = trials.ask()
    trials.reported(0, make_report(250, 3.0))
    fail(trials, 0, LOST)
    assert trials.remaining == 2  # this one and one that has not begun
    store.folder.trial_state(0).parent.mkdir(parents=True, exist_ok=True)
    store.folder.trial_state(0).write_bytes(b"what it goes on from")
    again = trials.ask()
    assert again == first
    assert trials.reached(0) == 250
    assert not trials.reported(0, make_report(250, 3.0))
    fail(trials, 0, NO_MEMORY)
    smaller = trials.ask()
    assert (smaller["number"], smaller["train"]["per_device_train_batch_size"]) == (0, 4)
    assert smaller["point"] == first["point"]
    for tokens in (500, 750, 1000):
        trials.reported(0, make_report(tokens, 2.5))
    trials.ended(0)
    record = store.record(0)
    assert (record.outcome, record.cause) == ("COMPLETED", None)
    assert [report.tokens for report in record.reports] == [250, 500, 750, 1000]
    assert record.config["train"]["per_device_train_batch_size"] == 4
    assert [(one.tokens, one.cause, one.log_tail) for one in record.tried] == [
        (250, "worker-lost", "the last line"),
        (250, "oom", "the last line"),
    ]
    assert record.tried[1].changed == {"train.per_device_train_batch_size": 4, "train.gradient_accumulation_steps": 2}
    assert trials.ask()["number"] == 1


def test_a_trial_that_begins_again_says_everything_again_and_is_judged_once(tmp_path):
    store, trials = sweep(tmp_path)
    trials.ask()
    trials.reported(0, make_report(250, 3.0))
    fail(trials, 0, LOST)
    trials.ask()  # nothing is there to go on from
    assert (trials.reached(0), store.record(0).reports) == (0, ())
    for tokens in (250, 500, 750, 1000):
        assert not trials.reported(0, make_report(tokens, 2.5))
    trials.ended(0)
    record = store.record(0)
    assert (record.outcome, [report.eval_loss for report in record.reports]) == ("COMPLETED", [2.5] * 4)


def test_a_trial_that_fails_for_good_says_how_often_it_was_tried(tmp_path):
    store, trials = sweep(tmp_path)
    for _ in range(TIMES["worker-lost"] + 1):
        assert trials.ask()["number"] == 0
        fail(trials, 0, LOST)
    record = store.record(0)
    assert (record.outcome, record.cause, len(record.tried)) == ("FAILED", "worker-lost", TIMES["worker-lost"])
    assert trials.remaining == 1


def test_another_driver_goes_on_with_what_the_last_one_had_changed(tmp_path):
    store, trials = sweep(tmp_path, train={"per_device_train_batch_size": 8})
    trials.ask()
    fail(trials, 0, NO_MEMORY)
    trials.ask()
    again = Trials(store, FACTS, Silent())
    assert again.ask()["train"]["per_device_train_batch_size"] == 4
    fail(again, 0, NO_MEMORY)
    assert (store.record(0).outcome, store.record(0).cause) == ("INFEASIBLE", "oom")


def test_when_all_are_told_to_stop_none_is_tried_again(tmp_path):
    store, trials = sweep(tmp_path)
    trials.ask()
    trials.ask()
    fail(trials, 1, LOST)  # waits for its turn
    trials.halt.cause, trials.halt.reason = "time limit", "budget.time_limit of 1 s"
    fail(trials, 0, LOST)
    trials.end_the_rest()
    ends = [(record.outcome, record.cause) for record in store.trials()]
    assert ends == [("FAILED", "worker-lost"), ("STOPPED", "time limit")]
