"""What PostgreSQL asks of the records beyond SQLite: tables made at once, one driver of several, secrets kept."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from made_by_hand import TRIALS, make_spec, make_sweep
from servers import PASSWORD_VARIABLE

from tuner.errors import SpecError, TunerError
from tuner.results.store import Store


def create(root: Path, name: str, study: str) -> str:
    return Store.create(make_spec(root, name, storage={"root": str(root), "study": study})).status().status


def test_sweeps_that_begin_at_once_in_an_empty_database_all_begin(postgres_study, tmp_path):
    names = [f"sweep-{number}" for number in range(6)]
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        made = pool.starmap(create, [(tmp_path, name, postgres_study) for name in names])
    assert made == ["queued"] * 6


@pytest.mark.usefixtures("database")
def test_of_several_who_go_on_with_a_sweep_that_has_no_driver_one_does(tmp_path):
    store = make_sweep(tmp_path, TRIALS[:1], "interrupted")
    seen = store.status()
    rivals = [Store.open(store.folder) for _ in range(3)]
    rivals[0].take_over(seen)
    for rival, sees in [(rivals[1], seen), (rivals[2], seen), (rivals[2], store.status())]:
        with pytest.raises(TunerError, match="is running already"):
            rival.take_over(sees)
    assert store.status().status == "preparing"


def test_the_password_is_in_no_message_whatever_is_wrong_with_the_database(postgres_study, tmp_path, monkeypatch):
    store = make_sweep(tmp_path, TRIALS[:1], storage={"root": str(tmp_path), "study": postgres_study})
    assert len(Store.open(store.folder).trials()) == 1
    monkeypatch.setenv(PASSWORD_VARIABLE, "another-hunter2")
    with pytest.raises(TunerError, match="password authentication failed") as refusal:
        Store.open(store.folder)
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("postgresql://me:hunter2@127.0.0.1:9/none", TunerError),
        ("postgresql://me:hunter2@host:port/none", SpecError),
        ("nobody://me:hunter2@host/none", SpecError),
        ("mysql+pymysql://me:hunter2@host/none", SpecError),
    ],
)
def test_a_database_that_cannot_be_used_is_refused_in_words_and_nothing_is_left(url, error, tmp_path, monkeypatch):
    monkeypatch.setenv("WHOLE_URL", url)
    with pytest.raises(error, match=r"storage\.study") as refusal:
        Store.create(make_spec(tmp_path, storage={"root": str(tmp_path), "study": "${WHOLE_URL}"}))
    assert "hunter2" not in str(refusal.value)
    assert os.listdir(tmp_path / "sweeps") == []
