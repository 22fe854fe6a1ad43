"""What the driver of a sweep costs, and how that grows with the number of trials: trials that train nothing.

    python -m tests.benchmarks.scale                     # 10, 100 and 1,000 trials; writes results/scale.json and .txt
    python -m tests.benchmarks.scale --trials 3000       # that many, printed only
    python -m tests.benchmarks.scale --profile 300       # where the driver's time goes, slowed by the profiler

Up to 100 trials at once, one for each node of a simulated cluster: the calls that a node's actor would take an
evaluation for are answered at once, from the point alone. All else is real: Ray's calls, the loop, the Optuna study
with TPE and ASHA, the store, the live table. So the driver is never idle, and the wall time is what it costs.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import io
import json
import math
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from rich.console import Console

from tests.benchmarks.table import RESULTS
from tests.made_by_hand import make_report, make_spec
from tuner.cli.live import LiveTable
from tuner.execution import trials as trials_module
from tuner.execution.machine import place, ray_cluster
from tuner.execution.places import Places, run_in_places
from tuner.execution.trials import Trials
from tuner.execution.waiting import Waiting
from tuner.results.held import HeldStorage
from tuner.results.record import outcome_counts
from tuner.results.store import Store
from tuner.spec.trial import Report, milestones

SIZES = (10, 100, 1000)
NODES = 100
PROCESSES = 4  # that play the nodes
EVALS, BUDGET = 8, 8000


class Nodes:
    """Takes the calls of the actors on many nodes and trains nothing."""

    def advance(self, config: Any, facts: Any, until_tokens: int) -> Report:
        point, number = config["point"], config["number"]
        distance = abs(math.log10(point["train.learning_rate"]) + 3.5) + 1 / point["lora.r"]
        loss = 2 + distance / 10 + 1000 / until_tokens + number / 1e6
        return make_report(until_tokens, loss, adapter_path=f"/nowhere/{number}-{until_tokens}")

    def detach(self, number: int) -> None: ...


class Clock:
    """Seconds spent in functions, those in other clocked functions that they call left out."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._running: list[str] = []
        self._since = time.perf_counter()

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def watch(self, owner: Any, part: str, *names: str) -> None:
        for name in names:
            setattr(owner, name, self._clocked(getattr(owner, name), part))

    def _clocked(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._running.pop()

        return clocked


def measure(count: int, profile: bool = False) -> dict[str, Any]:
    """Run so many trials in this process, which nothing else may have been done in."""
    clock = Clock()
    writes = [name for name in vars(HeldStorage) if name.startswith(("set_", "create_"))]
    clock.watch(HeldStorage, "study", *writes)
    clock.watch(TPESampler, "TPE", "infer_relative_search_space", "sample_relative", "sample_independent")
    clock.watch(SuccessiveHalvingPruner, "ASHA", "prune")
    clock.watch(Store, "store", "start_trial", "finish_trial", "add_report", "forget_adapter", "reports", "trials")
    clock.watch(trials_module, "adapters", "drop_worse_adapters", "keep_best_adapters")
    with tempfile.TemporaryDirectory() as root, ray_cluster(dashboard=False):
        budget = {"trials": count, "tokens_per_trial": BUDGET, "evals_per_trial": EVALS}
        spec = make_spec(Path(root), budget=budget, search={"sampler": "tpe"}, stopping={"type": "asha"})
        store = Store.create(spec)
        store.set_status("running")
        facts = {"tokens_per_trial": BUDGET, "data": {}, "baseline": {"eval_loss": 4.0}}
        table = LiveTable(spec, (), Console(file=io.StringIO(), width=120))
        placement = place(spec, [{"CPU": 1}] * NODES)
        actor: Any = ray.remote(Nodes).options(num_cpus=0, max_concurrency=NODES)
        nodes = [actor.remote() for _ in range(PROCESSES)]
        ray.get([node.__ray_ready__.remote() for node in nodes])
        trials, places = Trials(store, facts, table), Places(nodes, NODES // PROCESSES)
        waiting, ahead = Waiting(store, placement, table), milestones(BUDGET, EVALS)
        before, cpu, started = _resident(), time.process_time(), time.perf_counter()
        with cProfile.Profile() if profile else tempfile.TemporaryDirectory() as profiled:
            run_in_places(trials, places, facts, ahead, waiting)
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        if profile:
            pstats.Stats(profiled).sort_stats("cumulative").print_stats("tuner/|optuna|places", 70)
        records = store.trials()
        started = time.perf_counter()
        Console(file=io.StringIO(), width=120).print(table.render())
        return {
            "trials": count,
            "at_once": min(count, NODES),
            "results": sum(len(record.reports) for record in records),
            "outcomes": outcome_counts(records),
            "wall_s": wall,
            "cpu_s": cpu,
            "parts_s": dict(clock.seconds),
            "frame_s": time.perf_counter() - started,
            "memory_bytes": _resident(),
            "grown_bytes": _resident() - before,
        }


def _resident() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def text(results: list[dict[str, Any]]) -> str:
    """The measurements as a table, a row for each size."""
    header = [
        "trials",
        "at once",
        "results",
        "s",
        "a trial",
        "a result",
        "database",
        "TPE",
        "ASHA",
        "rest",
        "frame",
        "grown",
    ]
    rows = [header]
    for one in results:
        parts, trials = one["parts_s"], one["trials"]
        database, known = parts["store"] + parts["adapters"] + parts["study"], ("TPE", "ASHA")
        rest = one["wall_s"] - database - sum(parts.get(name, 0) for name in known)
        each = [database, *(parts.get(name, 0) for name in known), rest]
        rows.append(
            [
                f"{trials:,}",
                f"{one['at_once']}",
                f"{one['results']:,}",
                f"{one['wall_s']:.1f}",
                f"{1000 * one['wall_s'] / trials:.1f}",
                f"{1000 * one['wall_s'] / one['results']:.1f}",
                *(f"{1000 * seconds / trials:.1f}" for seconds in each),
                f"{1000 * one['frame_s']:.1f}",
                f"{one['grown_bytes'] / 2**20:.0f}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, "", LEGEND])


LEGEND = """\
s         from the first trial to the end of the last, in the driver, which never waits for training here
a trial   milliseconds of that for each trial; a result: for each evaluation; database ... rest: parts of a trial's
database  writing what was asked, reported and ended, Optuna's tables and ours; TPE proposes, ASHA decides who goes on
rest      Ray's calls and the loop
frame     milliseconds to draw the live table once, four times a second; grown: MiB of memory that the sweep added
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int)
    parser.add_argument("--profile", type=int)
    arguments = parser.parse_args()
    if arguments.profile:
        measure(arguments.profile, profile=True)
    elif arguments.trials:
        print(json.dumps(measure(arguments.trials)))
    else:
        results = [_apart(size) for size in SIZES]
        (RESULTS / "scale.json").write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "scale.txt").write_text(text(results))
        print(text(results), end="")


def _apart(size: int) -> dict[str, Any]:
    """The measurement of one size, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.scale", "--trials", str(size)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
