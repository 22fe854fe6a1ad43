"""Tables of other versions: those of 0.1 are read as they are and brought up to date by a driver, newer refused."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from made_by_hand import TRIALS, add_trial, make_report, make_spec, make_sweep

from tuner.errors import TunerError
from tuner.results import schema
from tuner.results.record import SweepStatus
from tuner.results.store import Store
from tuner.results.tables import METADATA
from tuner.spec.layout import Root, SweepFolder

OLD = Path(__file__).with_name("store_0_1")
"""A sweep as tuner 0.1 left it, its database as SQL."""


@pytest.fixture
def old(tmp_path: Path) -> SweepFolder:
    folder = Root.at(str(tmp_path)).sweep("of-version-0-1")
    folder.path.mkdir(parents=True)
    folder.spec.write_text((OLD / "spec.yaml").read_text())
    with closing(sqlite3.connect(folder.study)) as connection:
        connection.executescript((OLD / "study.sql").read_text())
    return folder


def columns(folder: SweepFolder) -> set[str]:
    with closing(sqlite3.connect(folder.study)) as connection:
        return {row[1] for row in connection.execute("PRAGMA table_info(tuner_sweeps)")}


def test_a_store_of_0_1_is_read_without_being_changed(old):
    before = old.study.read_bytes()
    store = Store.open(old)
    assert store.status().status == "interrupted"
    assert [trial.outcome for trial in store.trials()] == [made.outcome for made in TRIALS]
    assert store.status().baseline["eval_loss"] == 3.0
    assert old.study.read_bytes() == before
    assert "driver" not in columns(old)


def test_a_store_of_0_1_goes_on_and_its_trials_stay(old):
    before = [(trial.number, trial.outcome, trial.reports) for trial in Store.open(old).trials()]
    store = Store.open(old)
    store.take_over(store.status())
    assert "driver" in columns(old)
    add_trial(store, TRIALS[0])
    store.set_status("finished")
    after = [(trial.number, trial.outcome, trial.reports) for trial in Store.open(old).trials()]
    assert after[:-1] == before
    assert after[-1][1] == "COMPLETED"


def test_the_steps_make_the_tables_that_are_written_to(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'new.db'}")
    schema.bring_up_to_date(engine)
    schema.bring_up_to_date(engine)  # nothing more to do
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": schema.VERSION_TABLE})
        assert context.get_current_revision() == schema.VERSIONS[-1]
        difference = [one for one in compare_metadata(context, METADATA) if one[0] != "remove_table"]
    assert difference == []


@pytest.mark.sqlite
def test_the_tables_of_a_newer_version_are_refused_in_words(tmp_path):
    folder = make_sweep(tmp_path, []).folder
    with closing(sqlite3.connect(folder.study)) as connection:
        connection.execute(f"UPDATE {schema.VERSION_TABLE} SET version_num = '0099'")
        connection.commit()
    with pytest.raises(TunerError, match=r"those of a newer tuner \(schema 0099, this one knows 0002\)"):
        Store.open(folder)


def test_a_database_with_tables_of_0_1_takes_a_new_sweep_and_keeps_the_old(postgres_study, tmp_path, monkeypatch):
    """A shared PostgreSQL: whoever comes first brings the tables of all up to date; several may come at once."""
    monkeypatch.setenv("TUNER_TEST_STUDY", postgres_study)
    old = make_sweep(tmp_path, TRIALS, name="old")
    engine = old._engine
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE tuner_sweeps DROP COLUMN driver"))
        connection.execute(sa.text(f"DROP TABLE {schema.VERSION_TABLE}"))
    made: list[Store] = []
    threads = [
        threading.Thread(target=lambda name=name: made.append(Store.create(make_spec(tmp_path, name=name))))
        for name in ("new", "newer")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {store.spec.name for store in made} == {"new", "newer"}
    assert len(Store.open(old.folder).trials()) == len(TRIALS)
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '0099'"))
    with pytest.raises(TunerError, match=r"the tables of a newer tuner \(schema 0099\)"):
        Store.create(make_spec(tmp_path, name="newest"))
    assert not Root.at(str(tmp_path)).sweep("newest").path.exists()


def test_a_trial_can_be_reported_to_tables_that_were_brought_up_to_date(old):
    store = Store.open(old)
    seen: SweepStatus = store.status()
    store.take_over(seen)
    store.add_report(5, make_report(500, 2.5))
    assert [report.tokens for report in Store.open(old).record(5).reports] == [250, 500]
