"""What a running sweep tells whoever watches it. The command line draws it; a script may ignore it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tuner.results.record import TrialRecord
from tuner.spec.trial import Report

BEGUN = "The sweep has begun in "
"""The stage, the storage root behind it, that says that nothing was refused: `tuner submit` waits for it."""


class Display(Protocol):
    """The calls a sweep makes while it runs, in the driver's process and from its main thread."""

    def stage(self, text: str) -> None: ...

    def progress(self, stage: str, done: int, total: int) -> None: ...

    def prepared(self, summary: dict[str, Any], baseline: dict[str, Any], tokens_per_trial: int) -> None: ...

    def trial_started(self, number: int, point: dict[str, Any]) -> None: ...

    def trial_reported(self, number: int, report: Report) -> None: ...

    def trial_finished(self, record: TrialRecord) -> None: ...

    def sweep_finished(self, records: Sequence[TrialRecord], best: TrialRecord | None) -> None: ...


class Silent:
    """Watches and says nothing."""

    def stage(self, text: str) -> None: ...

    def progress(self, stage: str, done: int, total: int) -> None: ...

    def prepared(self, summary: dict[str, Any], baseline: dict[str, Any], tokens_per_trial: int) -> None: ...

    def trial_started(self, number: int, point: dict[str, Any]) -> None: ...

    def trial_reported(self, number: int, report: Report) -> None: ...

    def trial_finished(self, record: TrialRecord) -> None: ...

    def sweep_finished(self, records: Sequence[TrialRecord], best: TrialRecord | None) -> None: ...
