"""The peers: ways to run a workload's trials, each in a process of its own, `python -m tests.benchmarks.peers JOB`.

A job is a JSON file; its process writes what came out of it into the file that the job names.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.benchmarks.workloads import RANKS, Workload, make_model, spec_for, write_data
from tuner.execution.events import Silent
from tuner.spec.layout import SweepFolder
from tuner.spec.space import resolve
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report, TrialConfig, milestones

Job = dict[str, Any]
"""What a peer is told: its name, the workload's spec and facts, and more for some."""
Outcome = dict[str, Any]
"""What it found: its reports with the time of each (seconds since 1970), and more for some."""


class Notes(Silent):
    """Takes down reports as they come. At a loss of `target` it interrupts the process as Ctrl-C would."""

    def __init__(self, target: float | None = None):
        self.reports: list[dict[str, Any]] = []
        self._target = target

    def trial_reported(self, number: int, report: Report) -> None:
        self.note(number, time.time() - report.duration_s, **report.as_dict())

    def note(self, number: int, began: float, **figures: Any) -> None:
        """`began` is when the trial's training began."""
        self.reports.append({"trial": number, "at": time.time(), "began": began, **figures})
        if self._target is not None and figures["eval_loss"] <= self._target:
            self._target = None
            os.kill(os.getpid(), signal.SIGINT)


# What all peers find done: the model, the rows, and the facts that a sweep begins with


def prepare(job: Job) -> Outcome:
    """Make or convert the model, tokenise and pack the rows, and measure what the machine can do."""
    from transformers import AutoTokenizer

    from tests.benchmarks.machine import describe_machine, flops_per_token
    from tuner.training.baseline import load_base, prepare_rows, prepare_sweep, score_base

    work, folder = Workload(**job["work"]), Path(job["folder"])
    write_data(work, folder)
    spec = spec_for(work, make_model(work, folder), folder)
    base = load_base(spec)
    facts = prepare_sweep(spec, lambda *event: None, measure=lambda sweep: score_base(spec, base, sweep))
    rows = prepare_rows(spec, spec.train, AutoTokenizer.from_pretrained(base.config._name_or_path))
    return {
        "spec": spec.model_dump(mode="json"),
        "facts": facts.as_dict(),
        "model": base.config._name_or_path,
        "rows": {"train_rows": str(rows.train), "eval_rows": str(rows.eval)},
        "device": base.device.type,
        "machine": describe_machine(base),
        "flops_per_token": flops_per_token(base),
    }


# 1


def by_hand(job: Job) -> Outcome:
    """Ray Tune, Optuna, TorchTrainer and SFTTrainer, as hand_glued.py puts them together."""
    from ray import tune

    from tests.benchmarks import hand_glued

    work, notes = Workload(**job["work"]), Notes(job["target"])
    points = [
        {"learning_rate": point["train.learning_rate"], "lora_r": point["lora.r"]}
        for point in _spec(job).search.enqueue
    ]
    numbers: dict[str, int] = {}

    class Listen(tune.Callback):
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            numbers.setdefault(trial.trial_id, len(numbers))  # trials start in the order of the points

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            tokens = result["step"] * work.rows * work.length
            notes.note(numbers[trial.trial_id], result["began"], tokens=tokens, eval_loss=result["eval_loss"])

    with tempfile.TemporaryDirectory() as storage:
        fixed = {
            **job["rows"],
            **{name: getattr(work, name) for name in ("dtype", "rows", "length", "steps", "evals", "trials")},
            "model": job["model"],
            "learning_rates": work.learning_rates,
            "ranks": RANKS,
            "points": points,
            "seed": job["seed"],
            "storage": storage,
        }
        hand_glued.sweep(fixed, [Listen()])
    return {"reports": notes.reports}


# 2 and 3


def process(job: Job) -> Outcome:
    """A loop of SFTTrainers over one loaded base, on so many threads."""
    import torch

    torch.set_num_threads(job["threads"])
    from tuner.training.baseline import Preparation, load_base
    from tuner.training.shared.joint import share_weights
    from tuner.training.trial import ReportAtMilestones, plan_trial, sft_config

    spec, facts, notes = _spec(job), Preparation(**job["facts"]), Notes()
    base = load_base(spec)
    configs = _configs(spec)
    for number in job["numbers"]:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)

            def emit(report: Report, save: Any, number: int = number, place: Path = place) -> None:
                save(place / "adapter")  # as a sweep does at every evaluation
                notes.trial_reported(number, report)

            planned = plan_trial(spec, configs[number], facts, share_weights(base), sft_config(configs[number], place))
            planned.trainer.add_callback(ReportAtMilestones(planned, emit))
            planned.trainer.train()
    return {"reports": notes.reports}


# 4 and 5


def sweep(job: Job) -> Outcome:
    """`tuner.run`: dedicated trials, or a shared base with as many slots as the planner finds or the job says."""
    import tuner

    share = "off" if job["peer"] == "dedicated" else job["slots"] or "auto"
    asked, notes = _sharing(_spec(job), share), Notes(job["target"])
    search = asked.search.model_copy(update={"seed": job["seed"]})
    spec = asked.model_copy(update={"name": Path(job["folder"]).name, "search": search})
    with suppress(KeyboardInterrupt):  # that is how Notes ends it at the target
        tuner.run(spec, display=notes, log_output=True)
    sharing = tuner.open(spec.name, spec.storage.root).state().sharing
    return {"reports": notes.reports, "slots": sharing["slots"], "plan": sharing["reason"]}


# 5 without Ray


def engine(job: Job) -> Outcome:
    """The trials as slots on one engine: what `tuner.run` shares, without its search, its store and its processes."""
    import torch

    torch.set_num_threads(job["threads"])
    from tuner.training.baseline import Preparation, load_base
    from tuner.training.shared.engine import Engine
    from tuner.training.shared.planner import plan_slots

    spec, facts, notes = _sharing(_spec(job), job["slots"] or "auto"), Preparation(**job["facts"]), Notes()
    engine = Engine(spec, load_base(spec), facts, SweepFolder.of(spec).eval_rows)
    plan = plan_slots(spec, engine, facts)
    waiting = iter(_configs(spec))
    waste: list[float] = []
    taking = threading.Lock()
    errors: list[Exception] = []

    def coordinate() -> None:
        try:
            while config := _next(waiting, taking):
                engine.attach(config)
                for milestone in milestones(facts.tokens_per_trial, spec.budget.evals_per_trial):
                    notes.trial_reported(config["number"], engine.advance(config["number"], milestone))
                    waste.extend(lane.joint.padding_waste for lane in engine.lanes)
                engine.detach(config["number"])
        except Exception as error:
            errors.append(error)

    coordinators = [threading.Thread(target=coordinate) for _ in range(plan.slots)]
    for thread in coordinators:
        thread.start()
    for thread in coordinators:
        thread.join()
    engine.close()
    if errors:
        raise errors[0]
    return {"reports": notes.reports, "slots": plan.slots, "plan": plan.reason, "padding": statistics.mean(waste)}


def _next(waiting: Iterator[TrialConfig], taking: threading.Lock) -> TrialConfig | None:
    with taking:
        return next(waiting, None)


def no_engine(job: Job) -> Outcome:
    """A sweep of trials that an engine answers at once: the price of orchestration alone."""
    from tests.benchmarks.orchestration import run
    from tuner.execution.machine import ray_cluster

    work = Workload(**job["work"])
    with ray_cluster() as nodes:
        run(2, 1, nodes)  # imports, and the first actors
        return {"reports": [], "work_s": run(work.trials, work.evals, nodes)}


PEERS = {
    "prepare": prepare,
    "by hand": by_hand,
    "process": process,
    "dedicated": sweep,
    "shared": sweep,
    "engine": engine,
    "no engine": no_engine,
}


def _spec(job: Job) -> SweepSpec:
    return SweepSpec.model_validate(job["spec"])


def _sharing(spec: SweepSpec, share: int | str) -> SweepSpec:
    return spec.model_copy(update={"resources": spec.resources.model_copy(update={"share_base": share})})


def _configs(spec: SweepSpec) -> list[TrialConfig]:
    return [resolve(spec, number, point) for number, point in enumerate(spec.search.enqueue)]


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    asked = json.loads(Path(sys.argv[1]).read_text())
    outcome = PEERS[asked["peer"]](asked)
    Path(asked["outcome"]).write_text(json.dumps(outcome))
