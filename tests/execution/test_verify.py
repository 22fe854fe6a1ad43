"""`tuner verify`: a trial trained again alone is compared with what was recorded of it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.training.test_shared import spec_for
from tuner.api import Sweep
from tuner.errors import NotFoundError
from tuner.execution.verify import verify_trial
from tuner.results.store import Store
from tuner.search.study import Search
from tuner.spec.trial import Report, milestones
from tuner.training.baseline import prepare_sweep
from tuner.training.model import load_model
from tuner.training.shared.engine import Engine


@pytest.fixture(scope="module")
def store(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A sweep of two trials that trained as slots beside each other, recorded as a driver would, without Ray."""
    folder = tmp_path_factory.mktemp("verify")
    spec = spec_for(tiny_model_dir, folder, budget={"trials": 2, "tokens_per_trial": 900, "evals_per_trial": 3})
    store = Store.create(spec)
    facts = prepare_sweep(spec, lambda stage, done, total: None)
    store.set_prepared(facts.tokens_per_trial, facts.data, facts.baseline)
    search = Search(spec, store.study, facts.tokens_per_trial, facts.baseline["eval_loss"])
    base = load_model(spec.model.model_dump(), folder / "cache")
    engine = Engine(spec, base, facts, store.folder.eval_rows)
    reports: dict[int, list[Report]] = {}

    def train(config: Any) -> None:
        engine.attach(config)
        reports[config["number"]] = [engine.advance(config["number"], at) for at in milestones(900, 3)]

    configs = [search.ask(), search.ask()]
    threads = [threading.Thread(target=train, args=(config,)) for config in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=200)
    engine.close()
    for config in configs:
        assert config is not None
        number = config["number"]
        store.start_trial(number, config)
        for report in reports[number]:
            store.add_report(number, report)
            search.report(number, report)
        store.finish_trial(number, "COMPLETED")
        search.tell(number, search.ending(number))
    store.set_status("finished")
    return store


def test_a_slot_is_confirmed_by_a_stock_trainer(store):
    found = Sweep(store).verify(1)
    assert found.agrees
    assert found.bound == 1e-4
    assert [report.tokens for report in found.rerun] == [300, 600, 900]
    assert found.largest["eval_loss"] < 1e-4
    assert found.largest["learning_rate"] == found.largest["step"] == 0


def test_a_record_that_is_not_true_is_found_out_and_said(store):
    report = store.record(0).reports[-1]
    store.add_report(0, Report(**{**report.as_dict(), "eval_loss": report.eval_loss - 0.01}))
    root = str(store.folder.path.parent.parent)
    command = [sys.executable, "-m", "tuner.cli", "verify", "slots", "0", "--root", root, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 1
    document = json.loads(ended.stdout)
    assert document["agrees"] is False
    assert document["largest_difference"]["eval_loss"] == pytest.approx(0.01, abs=1e-4)
    store.add_report(0, report)


def test_a_trial_without_a_report_cannot_be_verified(store):
    record = store.record(0)
    empty = type(record)(number=7, outcome="FAILED", point={}, config={})
    with pytest.raises(NotFoundError, match="no finite report"):
        verify_trial(store, empty)
