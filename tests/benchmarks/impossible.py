"""Trials wasted in a corner of the space that no worker has the memory for: plain OptunaSearch, and this service.

    python -m tests.benchmarks.impossible              # writes results/impossible.txt
    python -m tests.benchmarks.impossible --seeds 5    # the search alone with so many seeds; prints only

First the search alone, medians over seeds: trials train nothing and run out of memory where the estimate of what they
need says so. Plain Optuna is Ray Tune's OptunaSearch, told of a trial that ran out what Tune tells it: that it failed.
Then one real sweep each: tiny Llamas in processes that may allocate so much and no more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.workloads import TINY, Workload, make_model, spec_for, write_data
from tests.made_by_hand import make_report
from tuner.execution.impossible import Impossible
from tuner.spec.batch import halved
from tuner.spec.load import parse_spec
from tuner.spec.space import resolve
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Ending, TrialConfig

RESULTS = Path(__file__).parent / "results" / "impossible.txt"
WORK = Workload("i", TINY, trials=8, rows=2, length=64, steps=2, evals=1, eval_rows=8, peers=())
SEARCHED = 24
"""Trials of a search alone; a real one has those of WORK."""
MEMORY = 900_000_000
VALUES: dict[str, list[Any]] = {
    "train.per_device_train_batch_size": [2, 4, 8, 32, 64, 128],
    "train.learning_rate": [3e-4, 1e-3, 3e-3, 1e-2],
    "lora.r": [4, 16],
}
ROOM = {"size": MEMORY, "device": "cpu", "row_tokens": WORK.length, "holds_all": False}
PLAIN, LEARNING, ESTIMATING = "plain OptunaSearch", "tuner, from failures alone", "tuner, by estimate too"
Started = list[tuple[tuple[Any, ...], bool]]
"""Of each trial that was started its point, and whether it ran out of memory."""


def spec_of(folder: Path, seed: int, trials: int) -> SweepSpec:
    """The space with the corner; its model and data are in the folder."""
    asked = spec_for(WORK, make_model(WORK, folder), folder).model_dump(mode="json")
    del asked["train"]["per_device_train_batch_size"]
    space = {key: {"type": "choice", "values": values} for key, values in VALUES.items()}
    search = {"sampler": "tpe", "seed": seed, "startup_trials": 4}
    resources = {"memory_per_worker": MEMORY, "max_concurrent_trials": 1}
    asked |= {"name": f"i{seed}", "space": space, "search": search, "resources": resources}
    return parse_spec(asked | {"budget": asked["budget"] | {"trials": trials}}, folder)


# The search alone


def loss(point: dict[str, Any]) -> float:
    """Of a trial that trains: lower with more rows and a rate near 3e-3, so that the corner attracts."""
    return 2.0 - 0.01 * point["train.per_device_train_batch_size"] ** 0.5 + abs(point["train.learning_rate"] - 3e-3)


def runs_out(spec: SweepSpec, folder: Path) -> Callable[[TrialConfig], bool]:
    """The rule: what a trial needs by estimate is more than there is."""
    from tuner.training.memory import estimate

    return lambda config: estimate(config, spec.resources, folder, WORK.length, "cpu").total > MEMORY


def plain(spec: SweepSpec, folder: Path) -> Started:
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    rule, started = runs_out(spec, folder), []
    search = OptunaSearch(seed=spec.search.seed)
    search.set_search_properties("eval_loss", "min", {key: tune.choice(values) for key, values in VALUES.items()})
    for number in range(SEARCHED):
        point = search.suggest(str(number))
        failed = rule(resolve(spec, number, point))
        search.on_trial_complete(str(number), None if failed else {"eval_loss": loss(point)}, error=failed)
        started.append((tuple(point[key] for key in VALUES), failed))
    return started


def ours(spec: SweepSpec, folder: Path, estimating: bool) -> Started:
    import optuna

    from tuner.search.study import Search

    rule, started = runs_out(spec, folder), []
    judge = Impossible(spec, ROOM if estimating else ROOM | {"size": sys.maxsize})
    search = Search(spec, optuna.create_study(), 1, 4.0, judge.why)
    while config := search.ask():
        number, point = config["number"], config["point"]
        second = {**config, "train": config["train"] | (halved(config["train"], 1) or {})}
        failed = rule(config) and rule(second)
        if failed:
            search.tell(number, Ending("INFEASIBLE", "oom"))
            judge.ran_out(number, second)
        else:
            search.report(number, make_report(1, loss(point)))
            search.tell(number, search.ending(number))
        started.append((tuple(point[key] for key in VALUES), failed))
    return started


def alone(folder: Path, seed: int) -> dict[str, Started]:
    """What each way starts with this seed."""
    spec = spec_of(folder, seed, SEARCHED)
    return {
        PLAIN: plain(spec, folder),
        LEARNING: ours(spec, folder, estimating=False),
        ESTIMATING: ours(spec, folder, estimating=True),
    }


# Real sweeps, each in a process of its own


def real_plain(folder: Path, seed: int) -> Started:
    from ray import tune

    from tests.benchmarks import hand_glued
    from tests.benchmarks.peers import prepare

    prepared, started = prepare({"work": asdict(WORK), "folder": str(folder)}), []
    names = dict(zip(("rows", "learning_rate", "lora_r"), VALUES, strict=True))

    class Listen(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            started.append((tuple(trial.config[name] for name in names), False))

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            started.append((tuple(trial.config[name] for name in names), True))

    fixed = {
        **prepared["rows"],
        **{name: getattr(WORK, name) for name in ("dtype", "length", "steps", "evals", "trials")},
        "model": prepared["model"],
        "points": None,
        "space": {name: tune.choice(VALUES[key]) for name, key in names.items()},
        "memory": MEMORY,
        "seed": seed,
        "storage": str(folder / "tune"),
    }
    hand_glued.sweep(fixed, [Listen()])
    return started


def real_ours(folder: Path, seed: int) -> Started:
    import tuner

    sweep = tuner.run(spec_of(folder, seed, WORK.trials))
    return [
        (tuple(record.point[key] for key in VALUES), record.cause == "oom")
        for record in sweep.records()
        if record.started
    ]


REAL = {PLAIN: real_plain, ESTIMATING: real_ours}


def in_a_process(way: str, folder: Path, seed: int) -> Started:
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.impossible", "--real", way]
    command += ["--folder", str(folder), "--seed", str(seed)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    return [(tuple(point), failed) for point, failed in json.loads(said)]


def wasted(started: Started) -> int:
    """Trials that ended without a result because memory ran out."""
    return sum(failed for _, failed in started)


def again(started: Started) -> int:
    """Of these, those whose very point had run out of memory before."""
    return sum(count - 1 for count in Counter(point for point, failed in started if failed).values())


def line(way: str, runs: list[Started]) -> str:
    """Medians, and in brackets the worst."""
    figures = [[measure(run) for run in runs] for measure in (len, wasted, again)]
    cells = [f"{statistics.median(values):g}" + (f" ({max(values)})" if len(runs) > 1 else "") for values in figures]
    return f"{way:<28}" + "".join(f"{cell:>16}" for cell in cells)


def table(title: str, found: dict[str, list[Started]]) -> str:
    head = f"{title:<28}" + "".join(f"{name:>16}" for name in ("trials", "out of memory", "a point again"))
    return "\n".join([head, *(line(way, runs) for way, runs in found.items())]) + "\n"


def search_alone(folder: Path, seeds: int) -> str:
    write_data(WORK, folder)
    runs = [alone(folder, seed) for seed in range(seeds)]
    return table(f"the search, {seeds} seeds", {way: [run[way] for run in runs] for way in runs[0]})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--real", choices=REAL)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.real:
        print(json.dumps(REAL[arguments.real](arguments.folder, arguments.seed)))
        return
    with tempfile.TemporaryDirectory(prefix="impossible-", dir="/tmp") as scratch:
        text = search_alone(Path(scratch), arguments.seeds or 100)
        if not arguments.seeds:
            real = {way: [in_a_process(way, Path(scratch), seed=0)] for way in REAL}
            text += "\n" + table("real sweeps, one seed", real)
            RESULTS.write_text(text)
        print(text, end="")


if __name__ == "__main__":
    main()
