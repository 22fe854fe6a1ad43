"""The store: what goes in comes out, in this process, in another, and after the writer was killed."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import optuna
import pytest
from made_by_hand import BUDGET, TRIALS, Made, add_trial, make_report, make_spec, make_sweep

from tuner.errors import NotFoundError, SpecError, TunerError
from tuner.results import alive
from tuner.results import record as record_module
from tuner.results import store as store_module
from tuner.results.record import utc_now
from tuner.results.store import Store
from tuner.results.sweeps import sweep_names
from tuner.spec.layout import Root

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("database")

WRITER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from made_by_hand import TRIALS, add_trial, make_sweep
store = make_sweep(Path(sys.argv[1]), TRIALS[:1], None)
print("ready", flush=True)
while True:
    add_trial(store, TRIALS[0])
    store.heartbeat()
"""

READER = """
import json, sys
from pathlib import Path
from tuner.results.store import Store
from tuner.spec.layout import Root
store = Store.open(Root(Path(sys.argv[1])).sweep("pydoc-lora"))
trials = store.trials()
print(json.dumps({"status": store.status().status, "outcomes": [trial.outcome for trial in trials],
                  "reports": [len(trial.reports) for trial in trials]}))
"""


def start_writer(root: Path) -> subprocess.Popen[str]:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, root, TESTS], stdout=subprocess.PIPE, text=True)
    assert writer.stdout
    assert writer.stdout.readline() == "ready\n"
    return writer


def read_elsewhere(root: Path) -> dict:
    reader = subprocess.run([sys.executable, "-c", READER, root], capture_output=True, text=True, timeout=60)
    assert reader.returncode == 0, reader.stderr
    return json.loads(reader.stdout)


def test_every_field_of_a_trial_comes_back_from_a_newly_opened_store(tmp_path):
    store = make_sweep(tmp_path)
    trials = Store.open(store.folder).trials()
    assert [trial.outcome for trial in trials] == [made.outcome for made in TRIALS]
    first, failed = trials[0], trials[4]
    assert first.reports == tuple(make_report(250 * (k + 1), loss) for k, loss in enumerate(TRIALS[0].losses))
    assert first.point == {
        "train.learning_rate": 0.00021,
        "train.packing": "bfd",
        "lora.r": 16,
        "lora.alpha_ratio": 2,
    }
    assert first.config["lora"] == {"r": 16, "lora_alpha": 32}
    assert first.config["train"]["max_length"] == 256
    assert first.started is not None
    assert first.finished is not None
    assert timedelta(0) <= first.finished - first.started < timedelta(seconds=60)
    assert (failed.cause, failed.reason, failed.log_tail) == (TRIALS[4].cause, TRIALS[4].reason, TRIALS[4].log_tail)


def test_a_nan_comes_back_as_nan_and_infinity_as_infinity(tmp_path):
    store = make_sweep(tmp_path, [Made([math.nan, math.inf], "INFEASIBLE")])
    first, second = Store.open(store.folder).trials()[0].reports
    assert math.isnan(first.eval_loss)
    assert second.eval_loss == math.inf


def test_a_report_for_the_same_tokens_replaces_the_one_before(tmp_path):
    store = make_sweep(tmp_path, [Made([2.9, 2.8], "RUNNING")])
    store.add_report(0, make_report(500, 2.2, adapter_path="/again"))
    assert [(row["tokens"], row["eval_loss"]) for row in store.reports([0])] == [(250, 2.9), (500, 2.2)]
    assert store.record(0).adapter_path == "/again"


def test_a_trial_that_starts_again_forgets_its_first_attempt(tmp_path):
    store = make_sweep(tmp_path, [Made([2.0, 1.9], "RUNNING")])
    store.finish_trial(0, "FAILED", "worker-lost", "gone", "log")
    config = store.record(0).config
    store.start_trial(0, config)  # type: ignore[arg-type]
    record = store.record(0)
    assert (record.outcome, record.reports, record.cause, record.reason) == ("RUNNING", (), None, None)
    assert (record.log_tail, record.finished) == (None, None)
    assert record.config == config


def test_the_outcome_counts_from_the_moment_it_is_written_not_when_optuna_is_told(tmp_path):
    store = make_sweep(tmp_path, [Made([2.0], "RUNNING")])
    store.finish_trial(0, "INFEASIBLE", "out_of_memory", "no room")
    assert store.study.trials[0].state == optuna.trial.TrialState.RUNNING
    assert store.record(0).outcome == "INFEASIBLE"


def test_points_that_are_only_enqueued_are_no_trials(tmp_path):
    store = make_sweep(tmp_path, TRIALS[:1])
    store.study.enqueue_trial({"lora.r": 8})
    assert len(store.trials()) == 1


def test_a_sweep_keeps_its_status_its_baseline_and_what_was_promoted(tmp_path):
    store = make_sweep(tmp_path, TRIALS[:1], status=None)
    store.set_prepared(77, {"rows": 3, "odd": math.nan}, {"eval_loss": math.inf, "mean_token_accuracy": 0.5})
    store.set_promoted({"refused": ["worse than the base"]})
    store.set_status("failed", "no trial completed")
    status = Store.open(store.folder).status()
    assert (status.status, status.message, status.tokens_per_trial) == ("failed", "no trial completed", 77)
    assert status.data == {"rows": 3, "odd": None}
    assert status.baseline == {"eval_loss": None, "mean_token_accuracy": 0.5}
    assert status.promoted == {"refused": ["worse than the base"]}
    assert status.created <= status.started <= status.finished  # type: ignore[operator]
    assert status.pid == os.getpid()


def test_the_time_between_an_interruption_and_a_resume_does_not_count(tmp_path):
    store = make_sweep(tmp_path, TRIALS[:1], status=None)
    store._began -= 600  # ten minutes ago
    store.set_status("interrupted")
    assert store.status().elapsed_s == pytest.approx(600, abs=10)
    store._update({"finished": utc_now() - timedelta(hours=8)})
    store.set_status("preparing")
    store.set_status("running")
    assert store.status().elapsed_s == pytest.approx(600, abs=10)
    store._began -= 1800
    store.heartbeat()
    store._update({"heartbeat": utc_now() - timedelta(hours=1)})  # and this driver has vanished
    assert store.status().status == "interrupted"
    assert store.status().elapsed_s == pytest.approx(600 + 1800, abs=10)


@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_jumps_lets_no_second_driver_in_and_lasts_no_time(tmp_path, monkeypatch, hours):
    store = make_sweep(tmp_path, [Made([2.9, 2.7], "RUNNING")], status=None)
    store._update({"host": "elsewhere"})  # here, the kernel would shift the births of processes as well

    def clock() -> datetime:
        return datetime.now(UTC) + timedelta(hours=hours)

    for module in (store_module, record_module, alive):
        monkeypatch.setattr(module, "utc_now", clock)
    monkeypatch.setattr(store_module, "BEAT_S", 1.0)
    rival = Store.open(store.folder)
    seen = rival.status()
    assert seen.status == "interrupted"  # until it beats again
    assert 0 <= seen.elapsed_s < 10
    beat = threading.Timer(0.3, store.heartbeat)
    beat.start()
    with pytest.raises(TunerError, match="is running already"):
        rival.take_over(seen)
    beat.join()
    assert store.status().status == "running"
    assert 0 <= store.status().elapsed_s < 10
    store.finish_trial(0, "COMPLETED")
    assert store.record(0).duration_s >= store.record(0).reports[-1].duration_s


def test_a_driver_whose_process_is_gone_is_not_waited_for_and_one_elsewhere_is(tmp_path):
    store = make_sweep(tmp_path, TRIALS[:1], status=None)
    dead = replace(store.status(), heartbeat=utc_now() - timedelta(hours=1))
    assert not alive.may_live(replace(dead, pid=2**22 + 1))
    assert not alive.may_live(replace(dead, finished=utc_now()))
    assert alive.may_live(replace(dead, pid=2**22 + 1, host="elsewhere"))
    assert alive.may_live(dead)


@pytest.mark.sqlite
def test_a_new_sweep_is_queued_and_its_spec_stands_beside_it(tmp_path):
    spec = make_spec(tmp_path)
    store = Store.create(spec)
    assert store.status().status == "queued"
    assert Store.open(store.folder).spec == spec
    assert sorted(path.name for path in store.folder.path.iterdir() if not path.name.startswith("study.db-")) == [
        "spec.yaml",
        "study.db",
    ]


def test_a_name_that_is_taken_is_refused_and_resume_is_named(tmp_path):
    make_sweep(tmp_path, TRIALS[:1])
    with pytest.raises(TunerError, match="tuner resume pydoc-lora") as refusal:
        Store.create(make_spec(tmp_path))
    assert refusal.value.exit_code == 1
    assert len(Store.open(Root(tmp_path).sweep("pydoc-lora")).trials()) == 1


@pytest.mark.sqlite
def test_a_name_that_is_taken_in_a_shared_database_is_refused_and_nothing_is_left_behind(tmp_path):
    url = f"sqlite:///{tmp_path}/shared.db"
    Store.create(make_spec(tmp_path / "one", storage={"root": str(tmp_path / "one"), "study": url}))
    two = tmp_path / "two"
    with pytest.raises(TunerError, match="already holds a study 'pydoc-lora'"):
        Store.create(make_spec(two, storage={"root": str(two), "study": url}))
    assert list((two / "sweeps").iterdir()) == []


def test_a_database_that_cannot_be_opened_is_refused_and_leaves_nothing(tmp_path):
    spec = make_spec(tmp_path, storage={"root": str(tmp_path), "study": f"sqlite:///{tmp_path}/no/such/folder/s.db"})
    with pytest.raises(TunerError, match=r"storage\.study: the database cannot be used: unable to open"):
        Store.create(spec)
    assert not list(tmp_path.glob("sweeps/*"))


@pytest.mark.sqlite
def test_two_sweeps_in_one_database_do_not_mix(tmp_path):
    storage = {"root": str(tmp_path), "study": f"sqlite:///{tmp_path}/shared.db"}
    one = make_sweep(tmp_path, TRIALS[:1], name="one", storage=storage)
    two = make_sweep(tmp_path, TRIALS[2:4], name="two", storage=storage)
    assert [len(trial.reports) for trial in one.trials()] == [4]
    assert [len(trial.reports) for trial in two.trials()] == [4, 2]


@pytest.mark.sqlite
def test_the_password_of_a_database_is_taken_from_the_environment_and_never_written(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_FILE", "hunter2")
    storage = {"root": str(tmp_path), "study": f"sqlite:///{tmp_path}/${{STUDY_FILE}}.db"}
    store = make_sweep(tmp_path, TRIALS[:1], storage=storage)
    assert (tmp_path / "hunter2.db").exists()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 2
    assert not any(b"hunter2" in content for content in written)
    assert len(Store.open(store.folder).trials()) == 1
    monkeypatch.delenv("STUDY_FILE")
    with pytest.raises(SpecError, match="STUDY_FILE is not"):
        Store.open(store.folder)


@pytest.mark.sqlite
@pytest.mark.parametrize("folder", ["plain", "with space", "100%25", "a?b#c&d", "brace{x}", "ünïcode"])
def test_a_root_of_any_name_holds_a_sweep(tmp_path, folder):
    store = make_sweep(tmp_path / folder, TRIALS[:1])
    assert len(Store.open(store.folder).trials()) == 1
    assert (tmp_path / folder / "sweeps" / "pydoc-lora" / "study.db").exists()


def test_a_root_that_was_moved_opens_under_its_new_name(tmp_path):
    make_sweep(tmp_path / "before", TRIALS[:1])
    (tmp_path / "before").rename(tmp_path / "after")
    store = Store.open(Root(tmp_path / "after").sweep("pydoc-lora"))
    assert store.spec.storage.root == str(tmp_path / "after")
    assert len(store.trials()) == 1


def test_an_unknown_sweep_is_not_found_and_the_nearest_is_named(tmp_path):
    make_sweep(tmp_path, [])
    with pytest.raises(NotFoundError, match="did you mean pydoc-lora"):
        Store.open(Root(tmp_path).sweep("pydoc-lore"))
    with pytest.raises(NotFoundError, match="there is none"):
        Store.open(Root(tmp_path / "empty").sweep("any"))


@pytest.mark.sqlite
def test_a_half_made_sweep_is_no_sweep(tmp_path):
    make_sweep(tmp_path, [])
    (tmp_path / "sweeps" / ".other.abcd").mkdir()
    (tmp_path / "sweeps" / ".other.abcd" / "spec.yaml").write_text("name: other")
    (tmp_path / "sweeps" / "empty").mkdir()
    assert sweep_names(Root(tmp_path)) == ["pydoc-lora"]


@pytest.mark.sqlite
def test_opening_creates_and_changes_nothing(tmp_path):
    store = make_sweep(tmp_path, TRIALS[:1])
    schema = "SELECT type, name, sql FROM sqlite_master ORDER BY name"
    with sqlite3.connect(store.folder.study) as connection:
        before = connection.execute(schema).fetchall(), connection.execute("PRAGMA data_version").fetchone()
        again = Store.open(store.folder)
        again.trials(), again.status(), again.reports()
        assert (connection.execute(schema).fetchall(), connection.execute("PRAGMA data_version").fetchone()) == before


@pytest.mark.sqlite
def test_a_sweep_whose_database_is_gone_is_not_found_and_not_made_anew(tmp_path):
    store = make_sweep(tmp_path, TRIALS[:1])
    store.folder.study.unlink()
    with pytest.raises(NotFoundError, match="has lost its records"):
        Store.open(store.folder)
    assert not store.folder.study.exists()


@pytest.mark.sqlite
def test_optuna_opens_the_study_as_it_is(tmp_path):
    store = make_sweep(tmp_path)
    study = optuna.load_study(study_name="pydoc-lora", storage=f"sqlite:///{store.folder.study}")
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    assert study.best_trial.number == 0
    assert study.trials[0].intermediate_values == {250: 2.9, 500: 2.7, 750: 2.6, 1000: 2.65}
    with sqlite3.connect(store.folder.study) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        types = {row[1]: row[2] for row in connection.execute("PRAGMA table_info(tuner_reports)")}
    assert {"studies", "trials", "tuner_sweeps", "tuner_reports"} <= tables
    assert (types["tokens"], types["eval_loss"], types["adapter_path"]) == ("BIGINT", "DOUBLE", "TEXT")


def test_a_goal_of_maximize_is_the_direction_of_the_study(tmp_path):
    objective = {"metric": "mean_token_accuracy", "goal": "maximize"}
    store = Store.create(make_spec(tmp_path, objective=objective))
    assert store.study.direction == optuna.study.StudyDirection.MAXIMIZE


def test_another_process_reads_while_the_driver_writes_and_after_it_was_killed(tmp_path):
    writer = start_writer(tmp_path)
    try:
        seen = [read_elsewhere(tmp_path) for _ in range(3)]
        assert all(answer["status"] == "running" for answer in seen)
        counts = [len(answer["outcomes"]) for answer in seen]
        assert counts[0] < counts[-1]
    finally:
        writer.send_signal(signal.SIGKILL)
        # not waited for yet: a dead driver that its parent has not noticed is dead all the same
    after = read_elsewhere(tmp_path)
    writer.wait()
    assert after["status"] == "interrupted"
    assert len(after["outcomes"]) >= counts[-1]
    assert after["reports"][:-1] == [4] * (len(after["outcomes"]) - 1)
    store = Store.open(Root(tmp_path).sweep("pydoc-lora"))
    add_trial(store, TRIALS[0])
    assert len(store.trials()) == len(after["outcomes"]) + 1


def test_a_sweep_is_interrupted_once_its_driver_is_silent_or_gone(tmp_path, monkeypatch):
    store = make_sweep(tmp_path, [], status=None)
    now = store.status()
    assert now.status == "running"
    assert alive.driver_lives(now)
    stale = utc_now() - timedelta(seconds=61)
    assert not alive.driver_lives(replace(now, heartbeat=stale))
    assert not alive.driver_lives(replace(now, host="elsewhere", heartbeat=stale))
    assert alive.driver_lives(replace(now, host="elsewhere", pid=2**22 + 1))
    assert not alive.driver_lives(replace(now, pid=2**22 + 1))
    monkeypatch.setattr(alive, "STALE_AFTER_S", 0.0)
    assert store.status().status == "interrupted"
    store.set_status("finished")
    assert store.status().status == "finished"


def test_a_process_that_took_over_the_pid_is_not_the_driver(tmp_path):
    store = make_sweep(tmp_path, [], status=None)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        before_it_was_born = utc_now() - timedelta(seconds=30)
        status = replace(store.status(), pid=child.pid, heartbeat=before_it_was_born)
        assert not alive.driver_lives(status)
        assert alive.driver_lives(replace(status, heartbeat=utc_now()))
    finally:
        child.communicate(b"\n")


def test_the_speed_of_a_trial_leaves_evaluations_out(tmp_path):
    store = make_sweep(tmp_path, [Made([], "RUNNING")])
    store.add_report(0, make_report(500, 2.0, trained_tokens=500, tokens_per_s=100.0, duration_s=50.0))
    store.add_report(0, make_report(BUDGET, 2.0, trained_tokens=1000, tokens_per_s=50.0, duration_s=90.0))
    assert store.record(0).tokens_per_s == pytest.approx(1000 / (5 + 10))
    assert store.record(0).duration_s == 90.0


@pytest.mark.sqlite
def test_records_that_are_damaged_or_of_another_version_are_said_to_be(tmp_path):
    made = make_sweep(tmp_path, [], name="older")
    with sqlite3.connect(made.folder.study) as connection:
        connection.execute("ALTER TABLE tuner_sweeps DROP COLUMN promoted")
    with pytest.raises(TunerError, match="are damaged: tuner_sweeps lacks promoted"):
        Store.open(made.folder)
    with sqlite3.connect(made.folder.study) as connection:
        connection.execute("DROP TABLE tuner_reports")
    with pytest.raises(TunerError, match="cannot be read: no table tuner_reports"):
        Store.open(made.folder)
    damaged = make_sweep(tmp_path, [], name="damaged")
    damaged.folder.study.write_bytes(b"garbage" * 1000)
    with pytest.raises(TunerError, match="cannot be read: file is not a database"):
        Store.open(damaged.folder)
