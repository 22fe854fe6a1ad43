"""Budgets of a whole sweep: what trials report is counted, across drivers, and ends the search when it is used up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.made_by_hand import BUDGET, make_report, make_spec
from tuner.execution import halt as halting
from tuner.execution.events import Silent
from tuner.execution.halt import Halt
from tuner.execution.trials import Trials
from tuner.results.store import Store

FACTS = {"tokens_per_trial": BUDGET, "baseline": {"eval_loss": 4.0}}


def store_with(tmp_path: Path, **limits: Any) -> Store:
    budget = {"trials": 6, "tokens_per_trial": BUDGET, "evals_per_trial": 4, **limits}
    return Store.create(make_spec(tmp_path, budget=budget, stopping={"type": "none"}))


def test_tokens_of_all_trials_end_the_search_and_what_runs_is_stopped_with_the_reason(tmp_path):
    store = store_with(tmp_path, tokens=1600)
    trials = Trials(store, FACTS, Silent())
    first, second = trials.ask(), trials.ask()
    for tokens in (250, 500, 750, 1000):
        trials.reported(first["number"], make_report(tokens, 2.0))
    trials.ended(first["number"])
    trials.reported(second["number"], make_report(500, 2.0))
    assert not trials.halt.stop_all()
    trials.reported(second["number"], make_report(750, 2.0))
    assert trials.halt.stop_all()
    assert trials.ask() is None
    trials.end_the_rest()
    ends = [(record.outcome, record.cause, record.reason) for record in store.trials()]
    assert ends == [
        ("COMPLETED", None, None),
        ("STOPPED", "token limit", "budget.tokens of 1,600, all trials together"),
    ]


def test_what_earlier_drivers_spent_counts_and_so_does_what_is_trained_again(tmp_path):
    store = store_with(tmp_path, tokens=2000)
    trials = Trials(store, FACTS, Silent())
    number = trials.ask()["number"]
    trials.reported(number, make_report(750, 2.0))
    again = Halt(store, Silent())
    again.spend(number, make_report(750, 2.0))  # said once more, by a trial that goes on from there
    again.begins(number)
    again.spend(number, make_report(500, 2.0))
    again.spend(number, make_report(750, 2.0))
    assert not again.stop_all()
    again.spend(number, make_report(1000, 2.0))
    assert not again.stop_all()  # 753 + 1003
    again.spend(1, make_report(250, 2.0))
    assert again.stop_all()


def test_gpu_hours_are_hours_of_trials_times_what_each_holds(tmp_path):
    halt = Halt(store_with(tmp_path, gpu_hours=1.0), Silent())
    halt.spend(0, make_report(250, 2.0, duration_s=3600.0))
    halt.gpus_per_trial = 0.5
    assert not halt.stop_all()
    halt.spend(1, make_report(250, 2.0, duration_s=3599.0))
    assert not halt.stop_all()
    halt.spend(1, make_report(500, 2.0, duration_s=3600.0))
    assert halt.stop_all()
    assert (halt.cause, halt.reason) == ("GPU limit", "budget.gpu_hours of 1")


def test_the_size_of_the_sweep_s_folder_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(halting, "LOOK_S", 0.0)
    store = store_with(tmp_path, disk="2MB")
    halt = Halt(store, Silent())
    assert not halt.stop_all()
    folder = store.folder.adapter(0, 250)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(bytes(2_000_000))
    assert halt.stop_all()
    assert (halt.cause, halt.reason) == ("disk limit", "budget.disk of 0.002 GB")


@pytest.mark.parametrize(("text", "size"), [("500MB", 5 * 10**8), ("1.5 TB", 15 * 10**11), (7, 7)])
def test_sizes_become_bytes(text, size, tmp_path):
    assert store_with(tmp_path, disk=text).spec.budget.disk == size
