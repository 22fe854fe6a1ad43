"""A sweep whose folder is taken away while it runs."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from real_sweeps import write_spec

import tuner
from tuner.errors import TunerError
from tuner.execution.events import Silent
from tuner.execution.folder import watched_folder
from tuner.spec.layout import SweepFolder
from tuner.spec.load import load_spec

GONE = r"the folder of sweep 'removed', was removed or renamed while the sweep ran: it has ended"


def folder_of(root: Path, model: Path) -> tuple[Any, SweepFolder]:
    budget = {"trials": 100, "epochs_per_trial": 2, "evals_per_trial": 2}
    file = write_spec(root, model, "removed", budget=budget, resources={"share_base": 1}, promotion=None)
    spec = load_spec(file, root=root / "runs")
    return spec, SweepFolder.of(spec)


@pytest.mark.timeout(60)
def test_who_works_on_a_folder_that_is_removed_is_interrupted_and_told(tiny_model_dir, tmp_path):
    _, folder = folder_of(tmp_path, tiny_model_dir)
    folder.path.mkdir(parents=True)
    began = time.monotonic()
    folder.path.rename(tmp_path / "elsewhere")
    with pytest.raises(TunerError, match=GONE), watched_folder(folder):
        time.sleep(50)
    assert time.monotonic() - began < 20
    with pytest.raises(TunerError, match=GONE), watched_folder(folder):
        raise OSError("whatever does not find it")


@pytest.mark.timeout(60)
def test_while_the_folder_is_there_errors_and_interrupts_are_what_they_are(tiny_model_dir, tmp_path):
    _, folder = folder_of(tmp_path, tiny_model_dir)
    folder.path.mkdir(parents=True)
    for error in (KeyError("its own"), KeyboardInterrupt()):
        with pytest.raises(type(error)), watched_folder(folder):
            raise error


class Remover(Silent):
    def __init__(self, folder: SweepFolder):
        self._folder = folder

    def trial_finished(self, record: Any) -> None:
        shutil.rmtree(self._folder.path, ignore_errors=True)


@pytest.mark.timeout(180)
def test_a_sweep_whose_folder_is_removed_ends_in_words(tiny_model_dir, tmp_path):
    spec, folder = folder_of(tmp_path, tiny_model_dir)
    with pytest.raises(TunerError, match=GONE):
        tuner.run(spec, display=Remover(folder))
