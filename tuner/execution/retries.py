"""Which endings another attempt may turn out better, how often that is tried, and what it does otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuner.spec.batch import halved
from tuner.spec.trial import Attempt, Ending, TrialConfig

TIMES = {"worker-lost": 2, "preempted": 5, "stuck": 1}
"""Further attempts between two evaluations, by causes that lie outside the trial; a trial's evaluations bound them."""


def may_pass(ending: Ending) -> bool:
    """Whether another attempt may turn it out better, if there have not been too many."""
    return ending.cause == "oom" or ending.cause in TIMES


def failed_attempt(
    config: TrialConfig, ending: Ending, reached: int, tried: Sequence[Attempt], workers: int
) -> Attempt | None:
    """What is noted of a trial that is to be tried again, `reached` tokens after it began; None when its ending stays.

    Where memory ran out, one more attempt takes half the rows at once and twice as many batches in a step. What lies in
    the point, in the data or in the code would only come again.
    """
    changed: dict[str, Any] = {}
    if ending.cause == "oom":
        fewer = None if any(one.cause == "oom" for one in tried) else halved(config["train"], workers)
        if fewer is None:
            return None
        changed = {f"train.{field}": value for field, value in fewer.items()}
    elif sum((one.cause, one.tokens) == (ending.cause, reached) for one in tried) >= TIMES.get(ending.cause or "", 0):
        return None
    assert ending.cause is not None
    return Attempt(reached, ending.cause, ending.reason, ending.log_tail, changed)


def as_changed(config: TrialConfig, tried: Sequence[Attempt]) -> TrialConfig:
    """What a trial trains with after these attempts."""
    train = dict(config["train"])
    for attempt in tried:
        train |= {key.removeprefix("train."): value for key, value in attempt.changed.items()}
    return {**config, "train": train}
