"""Whether all trials fail in the same way: then the fault is not in their points, and more of them find nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from tuner.results.record import TrialRecord
from tuner.spec.trial import Ending

NOT_COUNTED = ("preempted",)
"""Causes of failures that lie outside both the trial and the spec."""
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+(\.\d+)?(e[-+]?\d+)?", re.I)


def kind_of(ending: Ending) -> tuple[str | None, str]:
    """What two failures have in common when they are alike: the cause, and the reason without its numbers."""
    return ending.cause, _NUMBER.sub("N", ending.reason or "")


class Alike:
    """Counts the failures of a search from its start or its resumption, until another outcome shows that it can work.

    INFEASIBLE points and those that were ended from outside say nothing of the rest, and change nothing.
    """

    def __init__(self, before: Iterable[TrialRecord] = ()):
        """`before` are the trials that earlier drivers ran."""
        self._works = any(record.outcome == "COMPLETED" for record in before)
        self._kind: tuple[str | None, str] | None = None
        self._count = 0
        self._reached = 0
        self.said: str | None = None
        """Why the search is over, once it is."""

    def ended(self, ending: Ending, reached: int, running: Collection[int], most: int) -> str | None:
        """Take a trial's end, the tokens it reached, and those that running trials have reached.

        Returns why the search is to end, None while it is not: `most`, `budget.max_failures`, have failed alike, and no
        running trial has come further than they did.
        """
        if ending.outcome == "COMPLETED" or ending.cause == "early stopping":
            self._works = True
        if ending.outcome != "FAILED" or ending.cause in NOT_COUNTED:
            return None
        kind = kind_of(ending)
        self._works = self._works or self._kind not in (None, kind)
        self._kind, self._count, self._reached = kind, self._count + 1, max(self._reached, reached)
        if self._works or self._count < most or any(tokens > self._reached for tokens in running):
            return None
        trials = "the first trial" if self._count == 1 else f"the first {self._count} trials"
        self.said = f"{trials} failed alike ({ending.cause}: {ending.reason}), and budget.max_failures is {most}"
        return self.said
