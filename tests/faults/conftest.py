"""What the tests of faults share: commands that are gone when a test is over, however it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.real_sweeps import Command


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
