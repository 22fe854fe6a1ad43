"""The engine's process: it holds the base, prepares the sweep, then serves its trials. Nothing else imports torch."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tuner.errors import NotShareable
from tuner.execution.alone import TrialAlone
from tuner.execution.endings import explain_failure
from tuner.execution.last_words import leave_stuck
from tuner.execution.logs import log_process_to
from tuner.execution.machine import Placement, cores_of_nodes, live_nodes
from tuner.spec.layout import SweepFolder
from tuner.spec.sharing import why_apart, why_not_shared
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Ending, Report, TrialConfig

if TYPE_CHECKING:
    from tuner.training.baseline import Preparation
    from tuner.training.evaluation import Score
    from tuner.training.memory import Chosen
    from tuner.training.shared.engine import Engine

MOST_WAITING = 256
"""Calls an engine may have open: every slot waits in one of its own."""
CALL_AGAIN = 2
"""So often Ray repeats the call whether an engine is up, whose process it starts again when it ends."""


class Engines:
    """The engine processes of a sweep, for as long as it needs them."""

    def __init__(self, actors: list[Any], more: Callable[[], list[Any]] = list):
        self.actors = actors
        self._more = more

    def plan(self, facts: dict[str, Any], most: int) -> tuple[int, int, str]:
        """How many slots each serves best, none where the base cannot be shared; on how many lanes; and why.

        Engines that `most` trials at once leave nothing to do are ended.
        """
        for actor in self.actors[most:]:
            ray.kill(actor)
        del self.actors[most:]
        return ray.get(self.actors[0].plan.remote(facts, len(self.actors)))

    def more(self, there: list[Any]) -> list[Any]:
        """Engines started now, for GPUs or nodes that have none; `there` are those that have not ended."""
        self.actors = [*there]
        started = self._more()
        self.actors += started
        return started

    def strategy(self) -> dict[str, Any]:
        """How the workers of a trial share it, why, and what memory that takes: `Chosen` as a plain dict."""
        return ray.get(self.actors[0].strategy.remote())

    def room(self, facts: dict[str, Any], beside: int) -> dict[str, Any]:
        """The memory of a worker, where a node has so many `beside` each other: `Room` as a plain dict."""
        return ray.get(self.actors[0].room.remote(facts, beside))

    def close(self) -> None:
        """End the processes and free what they hold of the cluster."""
        while self.actors:
            ray.kill(self.actors.pop())


@contextmanager
def start_engines(spec: SweepSpec, placement: Placement, prepared: bool = False) -> Iterator[Engines]:
    """Start an engine per GPU that trials may use, or per node on the cores they may use; it does not wait for them.

    Trials that cannot share leave nothing to serve: then it is one process with a worker's resources, to prepare the
    sweep, and it loads no base if that was done before.
    """
    shares = not why_not_shared(spec)
    gpus = placement.resources.get("GPU", 0)
    nodes: dict[str, Any] = {}

    def start(threads: int, node: str | None = None) -> Any:
        actor: Any = ray.remote(EngineActor).options(
            num_cpus=threads,
            num_gpus=gpus,
            max_concurrency=MOST_WAITING,
            max_restarts=-1,  # an engine that dies does not take the sweep along
            max_task_retries=CALL_AGAIN,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True) if node else "DEFAULT",
        )
        return actor.remote(spec.model_dump(mode="json"), threads, shares or not prepared)

    def more() -> list[Any]:
        if gpus:
            return [start(placement.threads) for _ in range(len(engines.actors), placement.wanted(live_nodes()))]
        served = {node for node, actor in nodes.items() if actor in engines.actors}
        found = {node: cores for node, cores in cores_of_nodes(placement).items() if node not in served}
        started = {node: start(cores, node) for node, cores in found.items()}
        nodes.update(started)
        return list(started.values())

    engines = Engines([], more) if shares else Engines([start(placement.threads)])
    if shares and not engines.more([]):
        engines.actors.append(start(placement.threads))  # no node has room yet, so any will do
    try:
        yield engines
    finally:
        engines.close()


class EngineActor:
    """One process, one base. Ray starts it again with the same arguments when it dies."""

    def __init__(self, spec: dict[str, Any], threads: int, load: bool):
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._spec = SweepSpec.model_validate(spec)
        self._folder = SweepFolder.of(self._spec)
        if self._folder.path.exists():  # at its first start it may be here before the sweep's folder is
            log_process_to(self._folder.log)
        import torch

        import tuner.training.shared.planner  # noqa: F401  # all there is to import, before threads do it piecemeal
        from tuner.training.baseline import load_base
        from tuner.training.room import keep_to_room

        torch.set_num_threads(threads)
        if not why_not_shared(self._spec):  # else it only prepares
            keep_to_room(self._spec.resources)
        load = load and not self._is_sharded()
        self._base: Future[Any] | None = ThreadPoolExecutor(1).submit(load_base, self._spec) if load else None
        self._events: SimpleQueue[tuple[str, int, int]] = SimpleQueue()
        self._making, self._ending = threading.Lock(), threading.Lock()
        self._engine: Engine | None = None
        self._attached: set[int] = set()
        self._apart: dict[int, TrialAlone] = {}

    # Before the search

    @ray.method(max_task_retries=0)
    def prepare(self, known: dict[str, Any] | None) -> dict[str, Any]:
        """`prepare_sweep`, its facts as a plain dict; rows are tokenised while the base loads."""
        from tuner.training.baseline import Preparation, prepare_sweep

        log_process_to(self._folder.log)
        facts = Preparation(**known) if known else None
        return prepare_sweep(self._spec, lambda *event: self._events.put(event), facts, self._measure).as_dict()

    def events(self) -> list[tuple[str, int, int]]:
        """What the preparation has reported since it was last asked: stage, done, total."""
        return [self._events.get() for _ in range(self._events.qsize())]

    def _measure(self, sweep: Preparation) -> Score | None:
        """None of a base that no process is to hold alone: a trial's workers score it."""
        from tuner.training.baseline import eval_set, score_base
        from tuner.training.evaluation import refuse_other_head

        if self._base is None:
            return None
        base = self._base.result()
        self._events.put(("Measuring the base", 0, 0))
        if why_not_shared(self._spec) or self._why_not_joint:
            return score_base(self._spec, base, sweep)
        refuse_other_head(base, eval_set(self._spec, sweep))  # for trials that train apart
        return self._serving(sweep.as_dict()).score_base()

    @ray.method(max_task_retries=0)
    def plan(self, facts: dict[str, Any], engines: int) -> tuple[int, int, str]:
        """How many slots on each of so many engines, on how many lanes, and why; none for a model it cannot compute."""
        from tuner.training.baseline import Preparation
        from tuner.training.shared.planner import plan_slots

        if self._why_not_joint:
            return 0, 0, self._why_not_joint
        plan = plan_slots(self._spec, self._serving(facts), Preparation(**facts), engines)
        return plan.slots, plan.lanes, plan.reason

    @ray.method(max_task_retries=0)
    def strategy(self) -> dict[str, Any]:
        """How the workers of a trial are to share it, judged by this process's device."""
        return self._chosen.as_dict()

    def room(self, facts: dict[str, Any], beside: int) -> dict[str, Any]:
        """What memory a worker has, and whether the largest trial of the space fits into it."""
        from tuner.training.memory import find_room

        if self._base is not None:
            self._base.result()  # transformers makes one model at a time
        resources = self._spec.resources
        if resources.on_ray_train:
            resources = resources.model_copy(update={"strategy": self._chosen.name})
        spec = self._spec.model_copy(update={"resources": resources})
        processes = beside if why_not_shared(spec) else 1
        return find_room(spec, self._folder.root.cache, facts["data"], processes).as_dict()

    @cached_property
    def _chosen(self) -> Chosen:
        from tuner.training.memory import choose_strategy

        return choose_strategy(self._spec, self._folder.root.cache)

    def _is_sharded(self) -> bool:
        """Whether each worker of a trial is to hold but a part of the base."""
        from tuner.training.strategy import loads_in_parts

        resources = self._spec.resources
        if not resources.on_ray_train:
            return False
        chosen = resources.model_copy(update={"strategy": self._chosen.name})
        return loads_in_parts(chosen, self._spec.model.quantization)

    @cached_property
    def _why_not_joint(self) -> str | None:
        from tuner.training.dataset import eval_max_length
        from tuner.training.shared.joint import why_not_joint
        from tuner.training.shared.proof import why_not_equal

        assert self._base is not None
        base = self._base.result()
        return why_not_joint(base, eval_max_length(self._spec)) or why_not_equal(base)

    # During the search

    @ray.method(max_task_retries=0)
    def advance(self, config: TrialConfig, facts: dict[str, Any], until_tokens: int) -> Report | Ending:
        """The trial's report at a milestone; or, when it cannot get there, how it ended.

        Whatever is needed for that is made by the first call that needs it: the engine, the trial's slot, or for a
        trial that cannot be one a process apart.
        """
        number = config["number"]
        try:
            if number not in self._apart and not why_apart(config):
                try:
                    return self._attached_to(config, facts).advance(number, until_tokens)
                except NotShareable as refusal:
                    print(f"trial {number} trains apart: {refusal}", flush=True)
            return self._beside(config, facts).advance(until_tokens)
        except Exception as error:
            return replace(explain_failure(error), log_tail="".join(traceback.format_exception(error)))

    @ray.method(max_task_retries=0)
    def detach(self, number: int) -> None:
        """End the trial, whatever it is doing. Afterwards nothing of it is left, by whatever call it was ended."""
        with self._ending:
            if number in self._attached:
                assert self._engine is not None
                self._attached.remove(number)
                self._engine.detach(number)
            if number in self._apart:
                self._apart.pop(number).close()

    def _attached_to(self, config: TrialConfig, facts: dict[str, Any]) -> Engine:
        engine, number = self._serving(facts), config["number"]
        with self._making:
            if number not in self._attached:
                engine.attach(config)
                self._attached.add(number)
        return engine

    def _beside(self, config: TrialConfig, facts: dict[str, Any]) -> TrialAlone:
        number = config["number"]
        if number not in self._apart:
            self._apart[number] = TrialAlone(self._spec, self._spec.resources.cpus_per_worker)
            self._apart[number].begin(config, facts)
        return self._apart[number]

    def _serving(self, facts: dict[str, Any]) -> Engine:
        from tuner.training.baseline import Preparation, whole_eval_set
        from tuner.training.shared.engine import Engine

        assert self._base is not None
        with self._making:
            if self._engine is None:
                sweep = Preparation(**facts)
                log_process_to(self._folder.log)  # where others find what it says last
                rows = whole_eval_set(self._spec, sweep.data["fingerprints"]["eval"])
                self._engine = Engine(self._spec, self._base.result(), sweep, rows, sweep.lanes, self._stuck)
            return self._engine

    def _stuck(self, numbers: list[int], reason: str) -> None:
        leave_stuck(self._folder, numbers, self._folder.log, reason)
