"""Deaths at a certain moment: processes of a sweep that kill themselves, with SIGKILL, when they come to a place."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import tuner

ON_PATH = Path(__file__).parent / "on_path"


@dataclass(frozen=True)
class Death:
    """Where the first process dies that comes there; each death is died once, whoever comes there again."""

    name: str
    place: str
    """A function as `module:function`, before which it happens."""
    call: int
    """At which call of it, in one process."""
    log: str
    """How the path of what the process writes its log to ends: whose it is."""
    after: str = ""
    """The death that must have been died before."""


class Deaths:
    """The deaths of one sweep, and when they were died."""

    def __init__(self, folder: Path, *deaths: Death):
        self._marks = folder / "deaths"
        self._marks.mkdir()
        plan = self._marks / "plan.json"
        plan.write_text(json.dumps([asdict(death) for death in deaths]))
        self.environment = {"PYTHONPATH": f"{ON_PATH}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        self.environment["TUNER_TEST_DEATHS"] = str(plan)

    def time(self, name: str) -> datetime:
        """When it was died; raises FileNotFoundError if it was not."""
        return datetime.fromtimestamp((self._marks / name).stat().st_mtime, UTC)


def of_trial(number: int) -> str:
    """The end of the path of a trial's log."""
    return f"/{number:05d}/trial.log"


def went_on_s(sweep: tuner.Sweep, number: int, death: datetime) -> float:
    """Seconds from a trial's death to its next evaluation."""
    times = [row["time"] for row in sweep.store.reports([number])]
    return (min(time for time in times if time > death) - death).total_seconds()
