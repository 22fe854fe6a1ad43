"""What the tests of faults share: commands that are gone when a test is over, however it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from tests.real_sweeps import Command

THIRD = "TUNER_TEST_FAULTS_THIRD"
"""Variable: 0, 1 or 2: only this third of the faults is run."""
WITHIN = "TUNER_TEST_FAULTS_WITHIN_S"
"""Variable: seconds after which no further test begins."""
BEGAN = time.monotonic()


def third_of(count: int, third: int) -> range:
    """Which of so many tests are of a third: every third one, so that those of one kind are in all of them."""
    return range(third % 3, count, 3)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    third = os.environ.get(THIRD)
    if not third:
        return
    faults = [item for item in items if item.get_closest_marker("faults")]
    mine = {id(faults[index]) for index in third_of(len(faults), int(third))}
    others = [item for item in faults if id(item) not in mine]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


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
