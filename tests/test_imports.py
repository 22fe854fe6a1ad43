"""Importing the package and asking for help are quick: no heavy library is loaded for either."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import pytest

import tuner

HEAVY = ("torch", "ray", "optuna", "pandas", "transformers", "trl", "peft", "datasets", "sqlalchemy")
HELP = """
import sys, tuner.cli
sys.argv = ["tuner", "--help"]
try:
    tuner.cli.main()
except SystemExit:
    pass
"""
LOADED = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "code",
    [
        "import tuner",
        "import tuner; tuner.SpecError, tuner.TunerError",
        "import tuner.errors, tuner.spec.sweep, tuner.spec.space, tuner.spec.trial, tuner.spec.layout, tuner.spec.load",
        "import tuner.cli",
        HELP,
    ],
)
def test_no_heavy_library_is_loaded_by(code):
    assert python(f"{code}\n{LOADED}") == "[]"


def test_help_answers_in_under_a_second():
    def seconds() -> float:
        begun = time.monotonic()
        subprocess.run([sys.executable, "-m", "tuner.cli", "--help"], check=True, capture_output=True, timeout=60)
        return time.monotonic() - begun

    assert statistics.median(seconds() for _ in range(3)) < 1


def test_every_public_name_can_be_reached():
    assert all(getattr(tuner, name) is not None for name in tuner.__all__)
    assert set(tuner.__all__) <= set(dir(tuner))
    assert tuner.open.__module__ == "tuner.api"


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        tuner.nothing_of_that_name  # noqa: B018


def test_every_process_that_imports_tuner_waits_without_spinning():
    """Threads of OpenMP that spin take five times as long where another program uses a core."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    program = "import tuner, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["PASSIVE", "False"]


def test_workers_of_a_cluster_that_runs_already_are_told_so_too():
    from tuner.execution.machine import _SETTINGS

    assert _SETTINGS["OMP_WAIT_POLICY"] == "PASSIVE"
