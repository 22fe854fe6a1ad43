"""What a process that ends itself leaves to be read: whoever waits for it only sees that it is gone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tuner.execution.endings import tail
from tuner.spec.layout import SweepFolder
from tuner.spec.trial import Ending


def leave_stuck(folder: SweepFolder, numbers: Sequence[int], log: Path, reason: str) -> None:
    """Say of trials that this process was stuck in them. What it was doing stands at the end of its log."""
    folder.root.keep(log, stays=True)
    ending = Ending("FAILED", "stuck", reason, tail(log))
    for number in numbers:
        file = folder.last_words(number)
        draft = file.with_suffix(f".{os.getpid()}")  # the workers of a trial are often stuck together
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(asdict(ending)), encoding="utf-8")
        folder.root.keep(draft.replace(file))


def in_its_own_words(folder: SweepFolder, number: int, ending: Ending) -> Ending:
    """The ending of a trial whose process was lost, as that process put it, where it did; any other as it is."""
    if ending.cause != "worker-lost":
        return ending
    try:
        words = folder.root.read(folder.last_words(number))
    except FileNotFoundError:
        return ending
    return Ending(**json.loads(words))
