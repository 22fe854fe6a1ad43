"""A trial that cannot be a slot, beside those that can: a stock SFTTrainer in a process of its own on their device."""

from __future__ import annotations

import os
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tuner.execution.logs import log_process_to
from tuner.spec.layout import Root, SweepFolder
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report, TrialConfig


class TrialApart:
    """What the engine's process holds of such a trial. It ends with that process, or when it is closed."""

    def __init__(self, spec: SweepSpec, config: TrialConfig, facts: dict[str, Any]):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        devices = {name: value for name, value in os.environ.items() if name == "CUDA_VISIBLE_DEVICES"}
        actor: Any = ray.remote(_Actor).options(
            num_cpus=0,  # it shares the engine's
            scheduling_strategy=here,
            runtime_env={"env_vars": devices},
        )
        self._actor = actor.remote(spec.model_dump(mode="json"), config, facts)

    def advance(self, until_tokens: int) -> Report:
        """As of `Engine.advance`: the report at a milestone; raises what ended the trial before."""
        try:
            return ray.get(self._actor.advance.remote(until_tokens))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def close(self) -> None:
        ray.kill(self._actor)


class _Actor:
    """The process: `run_trial` in a thread, which after each report waits until it is asked for the next."""

    def __init__(self, spec: dict[str, Any], config: TrialConfig, facts: dict[str, Any]):
        self._spec = SweepSpec.model_validate(spec)
        self._folder = _folder(self._spec)
        self._number = config["number"]
        self._asked: SimpleQueue[None] = SimpleQueue()
        self._answers: SimpleQueue[Report | Exception] = SimpleQueue()
        log_process_to(self._folder.trial_log(self._number))
        threading.Thread(target=self._train, args=(config, facts), daemon=True).start()

    def advance(self, until_tokens: int) -> Report:
        while True:
            self._asked.put(None)
            answer = self._answers.get()
            if isinstance(answer, Exception):
                raise answer
            if answer.tokens >= until_tokens:
                return answer

    def _train(self, config: TrialConfig, facts: dict[str, Any]) -> None:
        try:
            import torch

            from tuner.training.baseline import Preparation
            from tuner.training.trial import run_trial

            torch.set_num_threads(self._spec.resources.cpus_per_worker)
            self._asked.get()
            with tempfile.TemporaryDirectory() as output_dir:
                run_trial(self._spec, config, Preparation(**facts), Path(output_dir), self._emit)
        except Exception as error:
            traceback.print_exc()  # into the trial's log, whose tail goes into the record
            self._answers.put(error)

    def _emit(self, report: Report, save: Callable[[Path], None]) -> None:
        path = self._folder.adapter(self._number, report.tokens)
        save(path)
        self._answers.put(replace(report, adapter_path=str(path)))
        self._asked.get()


def _folder(spec: SweepSpec) -> SweepFolder:
    return Root(Path(spec.storage.root)).sweep(spec.name)
