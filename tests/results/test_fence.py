"""Of two drivers of one sweep only the last may write, whatever the first was kept from by."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from made_by_hand import TRIALS, Made, make_report, make_sweep

from tuner.errors import Superseded, TunerError
from tuner.results import store as store_module
from tuner.results.record import utc_now
from tuner.results.store import Store
from tuner.spec.layout import Root

RUNNING = Made([2.9], "RUNNING")


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: str) -> tuple[Store, Store]:
    """A driver that stood still for an hour, and the one that has taken its sweep over."""
    monkeypatch.setattr(store_module, "BEAT_S", 0.0)
    first = make_sweep(tmp_path, [TRIALS[0], RUNNING], status=None)
    first.hold_study()
    first._update({"heartbeat": utc_now() - timedelta(hours=1)})
    second = Store.open(first.folder)
    second.take_over(second.status())
    second.hold_study()
    return first, second


WRITES: dict[str, Callable[[Store], object]] = {
    "a report": lambda store: store.add_report(1, make_report(500, 1.0)),
    "a new attempt": lambda store: store.start_trial(1, {}),  # type: ignore[typeddict-item]
    "an outcome": lambda store: store.finish_trial(1, "COMPLETED"),
    "a value for Optuna": lambda store: store.study.tell(1, 1.0),
    "a new trial of Optuna's": lambda store: store.study.ask(),
    "a forgotten adapter": lambda store: store.forget_adapter(0, 250),
    "a status": lambda store: store.set_status("finished"),
    "a heartbeat": lambda store: store.heartbeat(),
    "a message": lambda store: store.set_message("waits"),
    "a promotion": lambda store: store.set_promoted({"version": "v1"}),
    "the right to move an alias": lambda store: store.refuse_superseded(),
    "an answer": lambda store: store.requests.answer(1, "done"),
}


def test_a_driver_that_was_taken_over_writes_nothing_more(two):
    first, second = two
    asked = second.requests.ask("cancel", 1)
    assert first.requests._open is not None
    before = (second.status().status, second.trials(), len(second.study.trials))
    for what, write in WRITES.items():
        with pytest.raises(Superseded, match="taken over by another driver"):
            write(first)
        again = Store.open(first.folder)
        assert (again.status().status, again.trials(), len(again.study.trials)) == before, what
    with pytest.raises(Superseded):
        first.requests.take("cancel")
    assert [request.id for request in second.requests.take("cancel")] == [asked]
    second.add_report(1, make_report(500, 2.0))
    second.finish_trial(1, "COMPLETED")
    second.set_status("finished")
    assert Store.open(first.folder).record(1).outcome == "COMPLETED"


@pytest.mark.sqlite
def test_a_driver_that_only_stood_still_is_alive_again(tmp_path):
    store = make_sweep(tmp_path, [RUNNING], status=None)
    store._update({"heartbeat": utc_now() - timedelta(hours=1)})
    assert Store.open(store.folder).status().status == "interrupted"
    store.heartbeat()
    assert Store.open(store.folder).status().status == "running"


@pytest.mark.sqlite
def test_what_is_given_back_is_as_it_was(tmp_path):
    made = make_sweep(tmp_path, [TRIALS[0]])
    made.set_status("failed", "the disk was full")
    store = Store.open(made.folder)
    seen, spec = store.status(), store.spec
    store.take_over(seen)
    store.set_spec(spec.model_copy(update={"budget": spec.budget.model_copy(update={"trials": 9})}))
    store.give_back(seen, spec)
    made.heartbeat()  # the driver that only stood still is the driver again
    again = Store.open(made.folder)
    assert (again.status().status, again.status().message) == ("failed", "the disk was full")
    assert again.spec == spec
    assert again.status().finished == seen.finished


@pytest.mark.sqlite
def test_a_sweep_that_is_over_is_one_file_and_one_that_goes_on_has_readers_again(tmp_path):
    store = make_sweep(tmp_path, TRIALS)
    assert sorted(path.name for path in store.folder.path.glob("study.db*")) == ["study.db"]
    store = Store.open(store.folder)
    store.take_over(store.status())
    assert (store.folder.path / "study.db-wal").exists()


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Another name of a folder, below which nobody may write anything."""
    view = tmp_path / "view"
    view.mkdir()

    def mount(folder: Path) -> Path:
        if subprocess.run(["mount", "--bind", str(folder), str(view)], capture_output=True).returncode:
            pytest.skip("mounting a file system is not permitted here")
        subprocess.run(["mount", "-o", "remount,bind,ro", str(view)], check=True)
        return view

    yield mount
    subprocess.run(["umount", "--lazy", str(view)], capture_output=True)


@pytest.mark.parametrize("left", ["finished", "running", "copied"])
def test_records_that_may_only_be_read_are_read_whole(left, read_only, tmp_path):
    """A driver at work has a log and an index to it; a copy may have the log alone."""
    store = make_sweep(tmp_path / "runs", TRIALS, status=None)
    if left == "finished":
        store.set_status("finished")
    else:
        store.add_report(5, make_report(500, 2.5))  # in the log alone
    if left == "copied":
        shutil.copytree(tmp_path / "runs", tmp_path / "copy", ignore=shutil.ignore_patterns("*-shm"))
    view = Root.at(str(read_only(tmp_path / ("copy" if left == "copied" else "runs"))))
    reader = Store.open(view.sweep(store.spec.name))
    assert reader.trials() == store.trials()
    assert reader.status().status == store.status().status
    with pytest.raises(TunerError, match="cannot be asked"):
        reader.requests.ask("end")
    if left == "running":
        store.add_report(5, make_report(750, 2.4))
        assert reader.record(5).reached == 750
