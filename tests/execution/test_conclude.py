"""A promotion that could not be finished is a result of the sweep, which keeps its leaderboard."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from made_by_hand import make_sweep

from tuner.execution.events import Silent
from tuner.execution.sweep import _conclude


@pytest.mark.parametrize("dies_of", ["its process", "its own error"])
def test_a_promotion_that_dies_is_a_refusal_and_the_sweep_is_finished(dies_of, tmp_path: Path, monkeypatch):
    store = make_sweep(tmp_path, status=None, promotion={})
    adapter = store.folder.adapter(0, 750)
    adapter.mkdir(parents=True)
    if dies_of == "its process":  # which ends without a word
        monkeypatch.setattr(sys, "executable", "/bin/false")
        said = "the merge process ended with exit code 1"
    else:
        store.folder.root.models.write_text("no folder")
        said = "cannot write in"
    _conclude(store, Silent())
    status = store.status()
    assert status.status == "finished"
    assert status.promoted["trial"] == 0
    failed, again = status.promoted["refused"]
    assert failed.startswith("the promotion failed: ")
    assert said in failed
    assert again == f"`tuner promote pydoc-lora 0 --root {tmp_path}` tries it again"
