"""What a trial costs beside its training: trials that do nothing, through our search, store, Optuna, Tune and Ray.

    python -m tests.benchmarks.orchestration             # slots on an engine that answers at once
    python -m tests.benchmarks.orchestration --profile   # where the driver's time goes, slowed by the profiler

Seconds start when Ray runs and end when the last trial is over; medians over the turns.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from tests.made_by_hand import make_report, make_spec
from tuner.execution.engine import Engines
from tuner.execution.events import Silent
from tuner.execution.machine import place, ray_cluster
from tuner.execution.search import search
from tuner.results.record import outcome_counts
from tuner.results.store import Store
from tuner.spec.trial import Report

WORKLOADS = ((16, 4), (64, 8))  # trials, evaluations of each
AT_ONCE = 8


class NoEngine:
    """Takes the calls of an engine's actor and trains nothing."""

    def plan(self, facts: Any) -> tuple[int, str]:
        return AT_ONCE, "nothing is trained"

    def advance(self, config: Any, facts: Any, until_tokens: int) -> Report:
        number = config["number"]
        loss = 2 + 1 / until_tokens + number / 1000
        return make_report(until_tokens, loss, adapter_path=f"/nowhere/{number}-{until_tokens}")

    def detach(self, number: int) -> None: ...


def run(trials: int, evals: int, nodes: Any) -> float:
    """Seconds of a sweep of so many trials, none of them stopped early."""
    with tempfile.TemporaryDirectory() as root:
        budget = {"trials": trials, "tokens_per_trial": 1000 * evals, "evals_per_trial": evals}
        spec = make_spec(Path(root), budget=budget, stopping={"type": "none"}, search={"sampler": "tpe"})
        store = Store.create(spec)
        store.set_status("running")
        facts = {"tokens_per_trial": 1000 * evals, "data": {}, "baseline": {}}
        started = time.perf_counter()
        engine: Any = ray.remote(NoEngine).options(num_cpus=0, max_concurrency=2 * AT_ONCE)
        search(store, facts, Engines([engine.remote()]), place(spec, nodes), Silent())
        seconds = time.perf_counter() - started
        assert outcome_counts(store.trials()) == {"COMPLETED": trials}
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    with ray_cluster() as nodes:
        run(2, 2, nodes)  # imports, and the first actors
        for trials, evals in WORKLOADS:
            if arguments.profile:
                with cProfile.Profile() as profile:
                    run(trials, evals, nodes)
                pstats.Stats(profile).sort_stats("cumulative").print_stats("tuner/|tune_controller|optuna/study", 60)
                continue
            seconds = statistics.median(run(trials, evals, nodes) for _ in range(arguments.turns))
            each, result = seconds / trials, 1000 * seconds / (trials * evals)
            print(f"{trials} trials x {evals} reports: {seconds:.2f} s, {each:.2f} s a trial, {result:.0f} ms a result")


if __name__ == "__main__":
    main()
