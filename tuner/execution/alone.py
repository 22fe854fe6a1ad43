"""A trial of one worker in a process of its own: a stock SFTTrainer, without Ray Train and without a process group.

The process is there, with everything imported, before its trial is. Without a GPU it is forked from one that imports
once for all; a GPU that was opened before a fork cannot be used after it, so there each process imports for itself,
while the trial before it trains.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil
import ray

from tuner.execution.endings import explain_failure, tail
from tuner.execution.last_words import leave_stuck
from tuner.execution.logs import log_process_to
from tuner.spec.layout import Save, SweepFolder
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Ending, Report, TrialConfig
from tuner.training.watchdog import Watch

LOOK_S = 1.0
"""Seconds between two looks whether a trial's process was stopped by a signal, which it cannot say itself."""
_IMPORTED_BEFORE_A_FORK = ["tuner.execution.alone", "tuner.training.trial", "deepspeed"]  # accelerate looks at the last


class TrialAlone:
    """A trial's process. It trains as far as it is asked to, and ends when it is closed or this process ends."""

    def __init__(self, spec: SweepSpec, threads: int):
        processes = multiprocessing.get_context("spawn" if ray.get_gpu_ids() else "forkserver")
        processes.set_forkserver_preload(_IMPORTED_BEFORE_A_FORK)
        self._folder = SweepFolder.of(spec)
        self._stuck_after = spec.resources.stuck_after
        self._pipe, theirs = processes.Pipe()
        arguments = (theirs, spec.model_dump(mode="json"), threads)
        self._process: Any = processes.Process(target=_train, args=arguments, daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()

    def begin(self, config: TrialConfig, facts: dict[str, Any]) -> None:
        """Say which trial it is. `facts` is the sweep's `Preparation` as a plain dict."""
        self._log = self._folder.trial_log(config["number"])
        with suppress(OSError):  # `advance` will say that nobody is there
            self._pipe.send((config, facts))

    def advance(self, until_tokens: int) -> Report | Ending:
        """The report at a milestone; or, when the trial cannot get there, how it ended."""
        while True:
            try:
                self._pipe.send(until_tokens)
                if not self._hears():
                    return Ending("FAILED", "stuck", "its process was stopped by a signal", tail(self._log))
                came_to: Report | Ending = self._pipe.recv()
            except (EOFError, OSError):
                self._process.join()
                reason = f"the trial's process ended with exit code {self._process.exitcode}"
                return Ending("FAILED", "worker-lost", reason, tail(self._log))
            if isinstance(came_to, Ending) or came_to.tokens >= until_tokens:
                return came_to

    def _hears(self) -> bool:
        """Wait for the trial to say something; whether it does before it has been stopped by a signal for too long."""
        stopped_s = 0.0
        while not self._pipe.poll(LOOK_S):
            stopped_s = stopped_s + LOOK_S if self._is_stopped() else 0.0
            if stopped_s > self._stuck_after:
                return False
        return True

    def _is_stopped(self) -> bool:
        try:
            return psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return False

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()


def _train(pipe: Connection, spec: dict[str, Any], threads: int) -> None:
    """The process: `run_trial`, which after each report waits until it is asked for the next."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch
    from tqdm import tqdm

    from tuner.training.baseline import Preparation
    from tuner.training.room import keep_to_room
    from tuner.training.trial import run_trial

    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which stays when this process is killed
    asked = SweepSpec.model_validate(spec)
    folder = SweepFolder.of(asked)
    config, facts = pipe.recv()
    log = folder.trial_log(config["number"])
    log_process_to(log)
    watch = Watch(asked.resources.stuck_after, partial(leave_stuck, folder, [config["number"]], log))

    def emit(report: Report, save: Save | None) -> None:
        adapter = folder.keep_adapter(config["number"], report.tokens, save)
        folder.root.keep(log, stays=True)
        pipe.send(replace(report, adapter_path=adapter))
        with watch.waiting():
            pipe.recv()

    try:
        pipe.recv()
        checkpoints = folder.trial_checkpoints(config["number"])
        keep_to_room(asked.resources)
        with watch.working():
            run_trial(asked, config, Preparation(**facts), checkpoints, emit, folder.root, watch.moved)
    except Exception as error:
        with suppress(OSError):  # where the disk is full, the ending still says so
            traceback.print_exc()  # into the trial's log, whose tail goes into the record
            folder.root.keep(log, stays=True)
        pipe.send(replace(explain_failure(error), log_tail=tail(log)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class Worker:
    """An actor that runs trials one after the other, each in a process of its own: none inherits what another left."""

    def __init__(self, spec: dict[str, Any], threads: int):
        self._spec = SweepSpec.model_validate(spec)
        self._threads = threads
        self._next = TrialAlone(self._spec, threads)
        self._trials: dict[int, TrialAlone] = {}
        """The one that is here, by its number."""

    def advance(self, config: TrialConfig, facts: dict[str, Any], until_tokens: int) -> Report | Ending:
        """As of an engine: the trial's report at a milestone, or how it ended; the first call begins it."""
        trial = self._trials.get(config["number"])
        if trial is None:
            trial, self._next = self._next, TrialAlone(self._spec, self._threads)
            trial.begin(config, facts)
            self._trials[config["number"]] = trial
        return trial.advance(until_tokens)

    def detach(self, number: int) -> None:
        """End the trial, whatever it is doing."""
        if trial := self._trials.get(number):
            trial.close()
            self._trials.pop(number, None)
