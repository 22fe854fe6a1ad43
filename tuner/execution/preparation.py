"""Follows the preparation of a sweep in its engine's process, and passes its progress on to the display."""

from __future__ import annotations

from typing import Any

import ray

from tuner.execution.engine import Engines
from tuner.execution.events import Display
from tuner.execution.waiting import Waiting


def prepare_on_ray(
    engines: Engines, known: dict[str, Any] | None, display: Display, waiting: Waiting | None = None
) -> dict[str, Any]:
    """`prepare_sweep` in the first engine's process; takes and returns its facts as a plain dict."""
    display.stage("Loading the libraries")
    (engine, *_) = engines.actors
    up, pending = engine.__ray_ready__.remote(), engine.prepare.remote(known)
    try:
        while not ray.wait([up], timeout=0.2)[0]:
            if waiting:
                waiting.note(placed=False)
        if waiting:
            waiting.note(placed=True)
        ready: list[Any] = []
        while not ready:
            ready, _ = ray.wait([pending], timeout=0.2)
            for stage, done, total in ray.get(engine.events.remote()):
                _show(display, stage, done, total)
        return ray.get(pending)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _show(display: Display, stage: str, done: int, total: int) -> None:
    if total:
        display.progress(stage, done, total)
    else:
        display.stage(stage)
