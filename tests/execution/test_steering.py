"""What other processes ask of a search while it runs, without Ray: what is done of it, what is refused, and why."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from made_by_hand import BUDGET, make_report, make_spec
from optuna.trial import TrialState

import tuner
from tuner.errors import TunerError
from tuner.execution import steering
from tuner.execution.events import Silent
from tuner.execution.trials import Trials
from tuner.results.store import Store
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Ending

FACTS = {"tokens_per_trial": BUDGET, "baseline": {"eval_loss": 4.0}}
POINT = {"lora.r": 16, "train.packing": "none"}

pytestmark = pytest.mark.timeout(60)


class Noting(Silent):
    """Keeps the specs that it is told of."""

    def __init__(self) -> None:
        self.specs: list[SweepSpec] = []

    def extended(self, spec: SweepSpec) -> None:
        self.specs.append(spec)


@pytest.fixture(autouse=True)
def looking_at_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "LOOK_S", 0.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    budget = {"trials": 3, "tokens_per_trial": BUDGET, "evals_per_trial": 4}
    return Store.create(make_spec(tmp_path, budget=budget, search={"startup_trials": 1}, stopping={"type": "none"}))


def begin(store: Store, display: Silent | None = None) -> Trials:
    return Trials(store, FACTS, display or Silent())


def answer(store: Store, id: int) -> Any:
    """What has come of a request that a driver has seen; raises what it was refused with."""
    return store.requests.wait(id, lambda: False, 0)


def run_to_the_end(trials: Trials, number: int) -> None:
    for tokens in (250, 500, 750, 1000):
        trials.reported(number, make_report(tokens, 2.0))
    trials.ended(number)


def test_a_cancelled_trial_is_stopped_keeps_its_reports_and_counts_as_one(store):
    trials = begin(store)
    first = trials.ask()["number"]
    trials.reported(first, make_report(250, 2.0))
    asked = store.requests.ask("cancel", first)
    assert not trials.is_cancelled(first)
    assert trials.steer() == [first]
    assert trials.steer() == [first], "until it has ended"
    assert trials.is_cancelled(first)
    trials.failed(first, Ending("FAILED", "worker-lost", "killed for it"))
    trials.ended(first)
    assert answer(store, asked) is None
    assert trials.steer() == []
    record = store.record(first)
    assert (record.outcome, record.cause, record.reason) == ("STOPPED", "cancelled", "by tuner cancel")
    assert (len(record.reports), record.tried) == (1, ())
    while config := trials.ask():
        run_to_the_end(trials, config["number"])
    assert [trial.state for trial in store.study.trials] == [TrialState.PRUNED, *[TrialState.COMPLETE] * 2]


def test_a_trial_that_waits_to_be_tried_again_is_cancelled_at_once(store):
    trials = begin(store)
    number = trials.ask()["number"]
    trials.failed(number, Ending("FAILED", "worker-lost", "gone"))
    trials.ended(number)
    asked = store.requests.ask("cancel", number)
    assert trials.steer() == []
    assert answer(store, asked) is None
    record = store.record(number)
    assert (record.outcome, record.cause, len(record.tried)) == ("STOPPED", "cancelled", 1)
    assert trials.ask()["number"] == number + 1


def test_a_trial_that_was_cancelled_is_so_even_if_the_driver_is_interrupted_before_it_ends(store):
    trials = begin(store)
    number = trials.ask()["number"]
    asked = store.requests.ask("cancel", number)
    trials.steer()
    trials.halt.interrupted = trials.halt.stop_all() or True
    trials.end_the_rest()
    assert answer(store, asked) is None
    assert store.record(number).cause == "cancelled"


def test_what_cannot_be_cancelled_is_refused_with_why(store):
    trials = begin(store)
    first, second = trials.ask()["number"], trials.ask()["number"]
    run_to_the_end(trials, first)
    over, unknown, once, twice = (store.requests.ask("cancel", number) for number in (first, 99, second, second))
    assert trials.steer() == [second]
    for id, why in ((over, "trial 0 does not run"), (unknown, "trial 99 does not run"), (twice, "ending already")):
        with pytest.raises(TunerError, match=why):
            answer(store, id)
    run_to_the_end(trials, second)
    assert answer(store, once) is None
    assert store.record(second).outcome == "COMPLETED", "it was through before it could be ended"


def test_an_added_point_is_tried_next_and_the_sampler_fills_in_the_rest(store):
    trials = begin(store)
    trials.ask()
    asked = store.requests.ask("add", POINT)
    assert trials.steer() == []
    number = answer(store, asked)
    config = trials.ask()
    assert (config["number"], config["point"] | POINT) == (number, config["point"])
    assert set(config["point"]) == set(store.spec.space)
    assert trials.remaining == 1, "it is one of budget.trials"


def test_a_point_for_which_no_trial_is_left_and_one_outside_the_space_are_refused(store):
    trials = begin(store)
    trials.ask()
    outside = store.requests.ask("add", {"lora.r": 7})
    asked = [store.requests.ask("add", POINT) for _ in range(3)]
    trials.steer()
    with pytest.raises(TunerError, match=r"lora\.r: got 7; allowed: 8, 16 or 32"):
        answer(store, outside)
    assert [answer(store, id) for id in asked[:2]] == [1, 2]
    with pytest.raises(
        TunerError, match=r"none of the 3 trials is left for it: `tuner extend pydoc-lora --set budget\.tr"
    ):
        answer(store, asked[2])
    assert [config["number"] for _ in range(3) if (config := trials.ask())] == [1, 2]


def test_more_trials_are_run_and_the_record_has_the_new_budget(store):
    display = Noting()
    trials = begin(store, display)
    asked = store.requests.ask("extend", ["budget.trials=5"])
    trials.steer()
    assert answer(store, asked) is None
    assert trials.remaining == 5
    assert [spec.budget.trials for spec in display.specs] == [5]
    assert Store.open(store.folder).spec.budget.trials == 5
    numbers = []
    while config := trials.ask():
        numbers.append(config["number"])
        run_to_the_end(trials, config["number"])
    assert numbers == [0, 1, 2, 3, 4]
    assert begin(Store.open(store.folder)).remaining == 0


def test_the_search_ends_where_the_extended_budget_does(tmp_path):
    budget = {"trials": 3, "tokens_per_trial": BUDGET, "evals_per_trial": 4, "tokens": 1200}
    store = Store.create(make_spec(tmp_path, budget=budget, search={"startup_trials": 1}, stopping={"type": "none"}))
    trials = begin(store)
    run_to_the_end(trials, trials.ask()["number"])
    number = trials.ask()["number"]
    asked = store.requests.ask("extend", ["budget.tokens=1600"])
    trials.steer()
    assert answer(store, asked) is None
    trials.reported(number, make_report(500, 2.0))
    assert not trials.halt.stop_all()
    trials.reported(number, make_report(750, 2.0))
    assert trials.halt.stop_all()
    assert trials.halt.reason == "budget.tokens of 1,600, all trials together"


@pytest.mark.parametrize(
    ("override", "why"),
    [("budget.trials=2", "budget.trials: got 2; allowed: 3, as the sweep began"), ("train.seed=1", "may grow")],
)
def test_what_would_shrink_or_change_a_score_is_refused(override, why, store):
    trials = begin(store)
    asked = store.requests.ask("extend", [override])
    trials.steer()
    with pytest.raises(TunerError, match=why):
        answer(store, asked)
    assert (trials.remaining, Store.open(store.folder).spec) == (3, store.spec)


def test_what_comes_after_the_last_trial_is_refused(store):
    trials = begin(store)
    asked = store.requests.ask("extend", ["budget.trials=5"])
    trials.end_the_rest()
    with pytest.raises(TunerError, match="the trials of 'pydoc-lora' are over"):
        answer(store, asked)


def test_a_look_costs_one_query_and_comes_once_a_second(store, monkeypatch):
    monkeypatch.setattr(steering, "LOOK_S", 1.0)
    from test_search import statements

    trials = begin(store)
    with statements() as said:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            trials.steer()
    assert len(said) == 1
    assert said[0].startswith("SELECT")


def test_python_asks_as_the_command_line_does(store):
    """A driver in this process, between whose turns nothing waits."""
    import threading

    store.set_status("running")
    trials, over = begin(store), threading.Event()
    number = trials.ask()["number"]

    def ask() -> None:
        sweep = tuner.open(store.spec.name, store.folder.root.place)
        came.append(sweep.add(POINT))
        sweep.extend("budget.trials=4")
        came.append(sweep.spec.budget.trials)
        sweep.cancel(number)
        came.append(sweep.trial(number).cause)
        over.set()

    came: list[Any] = []
    asking = threading.Thread(target=ask)
    asking.start()
    while not over.wait(0.02):
        for ending in trials.steer():
            trials.ended(ending)
    asking.join()
    assert came == [1, 4, "cancelled"]


DRIVER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from made_by_hand import make_sweep
from tuner.execution import sweep
from tuner.execution.events import Silent
sweep.HEARTBEAT_S = 0.5
store = make_sweep(Path(sys.argv[1]), [], None)
with sweep._driving(store, Silent(), False):
    print("ready", flush=True)
    time.sleep(120)
"""


def test_a_driver_on_another_host_is_ended_through_a_database_that_both_reach(postgres_study, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNER_TEST_STUDY", postgres_study)
    command = [sys.executable, "-c", DRIVER, tmp_path, Path(__file__).parents[1]]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert driver.stdout
        assert driver.stdout.readline() == "ready\n"
        monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
        sweep = tuner.open("pydoc-lora", tmp_path)
        sweep.cancel(timeout_s=30)
        assert driver.wait(30) != 0
        assert sweep.status == "cancelled"
    finally:
        driver.kill()
        driver.wait()
