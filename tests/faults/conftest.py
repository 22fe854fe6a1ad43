"""What the tests of faults share: commands that are gone when a test is over, however it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from tests.real_sweeps import Command

WITHIN = "TUNER_TEST_FAULTS_WITHIN_S"
"""Variable: seconds after which no further test begins."""
BEGAN = time.monotonic()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    within = os.environ.get(WITHIN)
    if within and time.monotonic() - BEGAN > float(within):
        pytest.skip(f"the {within} s for all of them are over")


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """Starts a `tuner` command; whatever is left of it is killed at the end of the test."""
    started: list[Command] = []

    def start(*arguments: object, **options: object) -> Command:
        started.append(Command(*arguments, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for one in started:
        one.kill()
