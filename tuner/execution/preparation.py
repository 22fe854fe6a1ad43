"""Runs the preparation of a sweep where its trials will run, and passes its progress on to the display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.util.queue import Queue

from tuner.execution.events import Display
from tuner.execution.logs import log_process_to
from tuner.execution.machine import Placement
from tuner.spec.sweep import SweepSpec


def prepare_on_ray(
    spec: SweepSpec, known: dict[str, Any] | None, placement: Placement, log: Path, display: Display
) -> dict[str, Any]:
    """`prepare_sweep` in a process with one worker's resources; takes and returns its facts as a plain dict."""
    display.stage("Loading the libraries")
    events = Queue(actor_options={"num_cpus": 0})
    task = ray.remote(_prepare).options(
        num_cpus=placement.resources["CPU"], num_gpus=placement.resources.get("GPU", 0), max_retries=0
    )
    pending = task.remote(spec.model_dump(mode="json"), known, placement.threads, str(log), events)
    try:
        ready: list[Any] = []
        while not ready:
            ready, _ = ray.wait([pending], timeout=0.2)
            for stage, done, total in events.get_nowait_batch(events.qsize()):
                _show(display, stage, done, total)
        return ray.get(pending)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        events.shutdown(force=True)


def _show(display: Display, stage: str, done: int, total: int) -> None:
    if total:
        display.progress(stage, done, total)
    else:
        display.stage(stage)


def _prepare(
    spec: dict[str, Any], known: dict[str, Any] | None, threads: int, log: str, events: Queue
) -> dict[str, Any]:
    log_process_to(Path(log))
    import torch

    from tuner.training.baseline import Preparation, prepare_sweep

    torch.set_num_threads(threads)
    facts = Preparation(**known) if known else None
    return prepare_sweep(SweepSpec.model_validate(spec), lambda *event: events.put(event), facts).as_dict()
