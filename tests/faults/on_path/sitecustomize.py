"""Kills the process that it is loaded into, when it comes to a certain place. Python loads this before anything else.

`tests.faults.deaths` says which places. No function is replaced by another: it is only preceded by the end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import reduce, wraps
from pathlib import Path

PLAN = Path(os.environ["TUNER_TEST_DEATHS"])


def due(death: dict) -> bool:
    """Whether this process is to die that death now; of several that come to it, the first."""
    marks = PLAN.parent
    if not os.readlink("/proc/self/fd/1").endswith(death["log"]):
        return False
    if death["after"] and not (marks / death["after"]).exists():
        return False
    try:
        os.close(os.open(marks / death["name"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def before(function, death: dict):
    calls = 0

    @wraps(function)
    def preceded(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls >= death["call"] and due(death):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return preceded


class Finder:
    """Finds what the others find, and precedes the functions in it."""

    def __init__(self, deaths: list[dict]):
        self._deaths = deaths

    def find_spec(self, module, path=None, target=None):
        here = [death for death in self._deaths if death["place"].startswith(f"{module}:")]
        others = (finder for finder in sys.meta_path if here and finder is not self)
        spec = next(filter(None, (finder.find_spec(module, path, target) for finder in others)), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(made):
                execute(made)
                for death in here:
                    *path, name = death["place"].partition(":")[2].split(".")
                    owner = reduce(getattr, path, made)
                    setattr(owner, name, before(getattr(owner, name), death))

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder(json.loads(PLAN.read_text())))
