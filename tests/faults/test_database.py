"""The records' database is locked, killed and started again, or read all the time, while a sweep writes to it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from servers import PASSWORD, PASSWORD_VARIABLE, Postgres, postgres

import tuner
from tests.faults.matrix import measure, recovery_s
from tests.made_by_hand import make_report, make_spec
from tests.real_sweeps import write_spec
from tuner.execution.events import Silent
from tuner.execution.trials import Trials
from tuner.results.record import utc_now
from tuner.results.store import Store
from tuner.spec.trial import milestones

NAME = "kept"
LOCKED_S = 20.0
FACTS = {"tokens_per_trial": 1000, "baseline": {"eval_loss": 4.0}}
WAITING = "SELECT pg_{}_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


def run_trials(store: Store) -> None:
    """Every trial of a sweep, as a driver runs them whose trials cost nothing; those at once report in turn."""
    trials = Trials(store, FACTS, Silent())
    ahead = milestones(1000, store.spec.budget.evals_per_trial)
    while configs := [config for _ in range(20) if (config := trials.ask())]:
        for tokens in ahead:
            for config in configs:
                trials.reported(config["number"], make_report(tokens, 3 - tokens / 1e4 + config["number"] / 1e6))
        for config in configs:
            trials.ended(config["number"])


def begin(root: Path, trials: int, evals: int, study: str | None = None) -> Store:
    budget = {"trials": trials, "tokens_per_trial": 1000, "evals_per_trial": evals}
    sections = {"search": {"sampler": "random"}, "stopping": {"type": "none"}}
    store = Store.create(make_spec(root, NAME, budget=budget, storage={"root": str(root), "study": study}, **sections))
    store.set_status("running")
    store.set_prepared(1000, {}, {"eval_loss": 4.0})
    return store


@pytest.mark.faults
@pytest.mark.timeout(120)
def test_a_trial_is_written_down_once_when_the_answer_to_a_commit_is_lost(postgres_server, postgres_study, tmp_path):
    """The server has made it, and waits for a standby that never comes, when it is cut off, or says so at once."""
    store, rng, cut = begin(tmp_path, 2, 1, postgres_study), random.Random(0), 0
    socket = str(postgres_server.socket)
    with ThreadPoolExecutor(1) as pool, psycopg.connect(host=socket, user="postgres", autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        connection.execute("SELECT pg_reload_conf()")
        try:
            driver = pool.submit(run_trials, store)
            while not driver.done():
                what = rng.choice(["terminate", "cancel"])
                while not driver.done() and not (found := connection.execute(WAITING.format(what)).fetchall()):
                    time.sleep(0.01)
                cut += len(found) if what == "terminate" else 0
        finally:
            connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            connection.execute("SELECT pg_reload_conf()")
        driver.result()
    store.set_status("finished")
    figures = measure(tuner.open(NAME, tmp_path), cut)
    assert cut > 5
    assert (figures.asked, figures.lost, figures.duplicated) == (2, 0, 0)


@pytest.fixture
def own_postgres(monkeypatch: pytest.MonkeyPatch) -> Iterator[Postgres]:
    monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)
    with tempfile.TemporaryDirectory(prefix="pg") as folder, postgres(Path(folder)) as server:
        yield server


@pytest.mark.faults
@pytest.mark.timeout(240)
def test_a_sweep_goes_on_when_its_postgres_is_killed_and_comes_back(
    tiny_model_dir, tmp_path, own_postgres, start, note
):
    budget, root = {"trials": 4, "tokens_per_trial": 12_000, "evals_per_trial": 4}, tmp_path / "runs"
    storage = {"root": "runs", "study": own_postgres.new_study()}
    sections = {"resources": {"share_base": 2}, "promotion": None, "storage": storage}
    running = start("run", write_spec(tmp_path, tiny_model_dir, "away", budget=budget, **sections), cwd=tmp_path)
    faults = []
    for line in ("trial 0 at 3,000 tokens", "trial 3 at 3,000 tokens"):
        running.wait_for(line)
        faults.append(utc_now())
        own_postgres.kill()
        time.sleep(5)
        own_postgres.start()
    assert running.end() == 0, running.lines
    sweep = tuner.open("away", root)
    figures = measure(sweep, len(faults), [recovery_s(sweep, fault) for fault in faults])
    note("a PostgreSQL restart mid-sweep", figures)
    assert (sweep.status, figures.lost, figures.duplicated) == ("finished", 0, 0)


@contextmanager
def held(database: Path, begin: str) -> Iterator[None]:
    """A transaction of another process, begun so and left open; one that reads has read."""
    program = f"""
import sqlite3, sys
connection = sqlite3.connect({str(database)!r}, timeout=60, isolation_level=None)
connection.execute({begin!r})
connection.execute("SELECT count(*) FROM trials").fetchone()
print("held", flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        yield
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.faults
@pytest.mark.timeout(240)
def test_a_sweep_waits_for_who_has_locked_its_store_and_no_other_starts_a_cluster_beside_it(
    tiny_model_dir, tmp_path, start, note
):
    """A reader that never ends its transaction, and for some seconds one that lets nobody write."""
    budget, root = {"trials": 4, "tokens_per_trial": 12_000, "evals_per_trial": 4}, tmp_path / "runs"
    sections = {"resources": {"share_base": 2}, "promotion": None, "storage": {"root": "runs"}}
    running = start("run", write_spec(tmp_path, tiny_model_dir, "locked", budget=budget, **sections), cwd=tmp_path)
    running.wait_for("trial 0 at 3,000 tokens")
    sweep = tuner.open("locked", root)
    with held(sweep.folder.study, "BEGIN"):
        fault = utc_now()
        with held(sweep.folder.study, "BEGIN EXCLUSIVE"):
            other = write_spec(tmp_path, tiny_model_dir, "other", budget=budget, **sections)
            second = start("run", other, cwd=tmp_path)
            assert second.process.wait(60) == 3
            time.sleep(max(0.0, LOCKED_S - (utc_now() - fault).total_seconds()))
        assert running.end() == 0, running.lines
    assert "a Ray cluster runs on this host already" in second.lines[-1]
    assert "RAY_ADDRESS=auto" in second.lines[-1]
    assert not (root / "sweeps" / "other").exists()
    recover_s = recovery_s(sweep, fault)
    figures = measure(sweep, 2, [recover_s])
    note("a store locked by another process", figures)
    note("a second Ray cluster on the host", measure(sweep, 1))
    assert (sweep.status, figures.lost, figures.duplicated) == ("finished", 0, 0)
    assert LOCKED_S - 2 < recover_s < LOCKED_S + 30, "nothing was locked"


READER = """
import json, sys, time
import sqlalchemy as sa
import tuner
asked = 0
def count(*_):
    global asked
    asked += 1
sa.event.listen(sa.Engine, "before_cursor_execute", count)
sweep = tuner.open("kept", sys.argv[1])
while True:
    finished = sweep.status == "finished"
    before, since = asked, time.monotonic()
    trials = sweep.records()
    reports = sum(len(trial.reports) for trial in trials)
    sweep.results()
    print(json.dumps([asked - before, len(trials), reports, time.monotonic() - since]), flush=True)
    if finished:
        break
    time.sleep(0.5)
"""


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_of_200_trials_with_50_reports_each_none_is_lost_while_a_reader_polls(tmp_path, note):
    store = begin(tmp_path, 200, 50)
    polled = tmp_path / "polled.jsonl"
    with polled.open("w") as file:
        reader = subprocess.Popen([sys.executable, "-c", READER, str(tmp_path)], stdout=file, stderr=subprocess.PIPE)
        try:
            run_trials(store)
            store.set_status("finished")
            assert reader.wait(60) == 0, reader.stderr.read()
        finally:
            reader.kill()
    polls = [json.loads(line) for line in polled.read_text().splitlines()]
    queries, trials, reports, _ = zip(*polls, strict=True)
    assert len(polls) > 20
    assert max(queries) <= 30, "as many whatever there is to read"
    assert list(reports) == sorted(reports)
    assert (trials[-1], reports[-1]) == (200, 200 * 50)
    figures = measure(tuner.open(NAME, tmp_path), len(polls))
    note("200 trials each reporting 50 times with a reader polling", figures)
    assert (figures.asked, figures.lost, figures.duplicated) == (200, 0, 0)
