"""Trials as slots on a shared base: an engine per device, in an actor, and a light coordinator per trial for Tune."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.result import RESULT_DUPLICATE

from tuner.execution.endings import explain_failure
from tuner.execution.logs import log_process_to
from tuner.execution.machine import Placement
from tuner.execution.trial import FAILURE
from tuner.spec.layout import Root
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import TrialConfig, milestones

MOST_WAITING = 256
"""Calls an engine may have open: every slot waits in one of its own."""


@dataclass(frozen=True)
class SharedBase:
    """Running engines, and how many slots each was found to serve best."""

    engines: list[Any]
    slots: int
    reason: str

    @property
    def concurrent(self) -> int:
        return self.slots * len(self.engines)


@contextmanager
def shared_base(spec: SweepSpec, facts: dict[str, Any], placement: Placement, log: Path) -> Iterator[SharedBase]:
    """Engines for the time of a search: one per GPU that trials may use, or one on all the cores they may use."""
    gpus = placement.resources.get("GPU", 0)
    count = placement.concurrent if gpus else 1
    threads = placement.threads if gpus else _cores(placement)
    actor: Any = ray.remote(_EngineActor).options(
        num_cpus=threads,
        num_gpus=gpus,
        max_concurrency=MOST_WAITING,
        max_restarts=-1,  # an engine that dies takes its slots along, not the rest of the sweep
        # Threads that wait for the next joint step must not spin meanwhile: others need the cores.
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}},
    )
    engines = [actor.remote(spec.model_dump(mode="json"), facts, threads, str(log)) for _ in range(count)]
    try:
        plan = ray.get(engines[0].plan.remote())
        yield SharedBase(engines, **plan)
    finally:
        for engine in engines:
            ray.kill(engine)


def _cores(placement: Placement) -> int:
    """Of a machine without GPUs, the cores that all trials may use at once, as far as one node has them."""
    largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    return max(placement.threads, min(largest, placement.concurrent * placement.threads))


class _EngineActor:
    """The process that holds the base. Nothing else of a shared sweep imports torch."""

    def __init__(self, spec: dict[str, Any], facts: dict[str, Any], threads: int, log: str):
        log_process_to(Path(log))
        import torch

        from tuner.training.baseline import Preparation
        from tuner.training.dataset import eval_max_length
        from tuner.training.model import load_model
        from tuner.training.shared.engine import Engine
        from tuner.training.shared.joint import why_not_joint

        torch.set_num_threads(threads)
        self._spec = SweepSpec.model_validate(spec)
        root = Root(Path(self._spec.storage.root))
        base = load_model(self._spec.model.model_dump(), root.cache, "cuda" if torch.cuda.is_available() else "cpu")
        self._sweep = Preparation(**facts)
        self._refusal = why_not_joint(base, eval_max_length(self._spec))
        if self._refusal:
            return
        self._engine = Engine(self._spec, base, self._sweep, root.sweep(self._spec.name).eval_rows)

    def plan(self) -> dict[str, Any]:
        """How many slots, and why; none for a model that the engine cannot compute."""
        if self._refusal:
            return {"slots": 0, "reason": self._refusal}
        from tuner.training.shared.planner import plan_slots

        return asdict(plan_slots(self._spec, self._engine, self._sweep))

    def attach(self, config: TrialConfig) -> None:
        self._engine.attach(config)

    def advance(self, number: int, until_tokens: int) -> dict[str, Any]:
        """The trial's report at a milestone; or, when it cannot get there, how it ended."""
        try:
            return self._engine.advance(number, until_tokens).as_dict()
        except Exception as error:
            ending = replace(explain_failure(error), log_tail="".join(traceback.format_exception(error)))
            return {FAILURE: json.dumps(asdict(ending))}

    def detach(self, number: int) -> None:
        self._engine.detach(number)


class SlotTrial(tune.Trainable):
    """Tune's side of a slot: each step is one evaluation. The actors are reused, and import no torch."""

    def setup(self, config: TrialConfig, engines: list[Any], milestones: list[int]) -> None:  # type: ignore[override]
        self._engines = engines
        self._milestones = milestones
        self._begin(config)

    def _begin(self, config: TrialConfig) -> None:
        self._number = config["number"]
        self._engine = self._engines[self._number % len(self._engines)]
        self._ahead = list(self._milestones)
        ray.get(self._engine.attach.remote(config))

    def step(self) -> dict[str, Any]:
        if not self._ahead:  # Tune shows the scheduler no result that says done: that is a step of its own
            return {RESULT_DUPLICATE: True, "done": True}
        result = ray.get(self._engine.advance.remote(self._number, self._ahead.pop(0)))
        if FAILURE in result:
            self._ahead = []
            return result
        return {**result, "checkpoint_path": result["adapter_path"]}

    def reset_config(self, new_config: TrialConfig) -> bool:  # type: ignore[override]
        self.cleanup()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        ray.get(self._engine.detach.remote(self._number))


def slot_trial(base: SharedBase, spec: SweepSpec, tokens_per_trial: int) -> Any:
    """The trainable of a sweep on a shared base, for `tune.Tuner`."""
    ahead = milestones(tokens_per_trial, spec.budget.evals_per_trial)
    return tune.with_parameters(SlotTrial, engines=base.engines, milestones=ahead)
