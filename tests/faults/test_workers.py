"""Processes that train are killed in the middle of a step, an evaluation, a save; and a trial that diverges ends."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import tuner
from tests.faults.deaths import Death, Deaths, of_trial, went_on_s
from tests.faults.matrix import Figures, difference_alone, measure, recovery_s
from tests.raylets import raylets
from tests.real_sweeps import Command, write_spec

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

BUDGET = {"epochs_per_trial": 4, "evals_per_trial": 8}
"""An evaluation every 4 of 32 steps."""
STEP = ("accelerate.accelerator:Accelerator.backward", 6)
SCORE = ("tuner.training.evaluation:_collate", 4)
"""The last batch of the second evaluation."""
CHECKPOINT = ("transformers.trainer:Trainer._save_rng_state", 2)
"""The second: weights, optimizer and schedule have been saved."""
ADAPTER = ("safetensors.torch:save_file", 4)
"""The second of those that are reported; its checkpoint is whole."""
WAYS = {
    "alone": [STEP, SCORE, CHECKPOINT, ADAPTER],
    "ddp": [STEP, (SCORE[0], 2)],  # each of two workers has one batch of two
    "zero2": [CHECKPOINT],
}
"""Where the trials of a sweep are killed, the first trial at the first place. Those with two workers are all the same,
and nobody kills the last."""


@dataclass
class Killed:
    """A sweep that is over, and how the trials in it died."""

    sweep: tuner.Sweep
    deaths: Deaths
    numbers: dict[str, int]
    """Which trial died at a place."""
    folder: Path

    def cost(self, *places: tuple[str, int]) -> Figures:
        """What the deaths at these places cost. Every trial was tried again, once, from its last evaluation."""
        numbers = [self.numbers[place] for place, _ in places]
        for number in numbers:
            (attempt,) = self.sweep.trial(number).tried
            assert (attempt.cause, attempt.tokens > 0) == ("worker-lost", True)
            assert attempt.log_tail is not None
            log = self.sweep.folder.trial_log(number).read_text()
            assert f"trial {number} goes on from its last evaluation" in log
        took = [went_on_s(self.sweep, number, self.deaths.time(str(number))) for number in numbers]
        figures = measure(self.sweep, len(numbers), took, difference=self._difference(numbers))
        return replace(figures, asked=len(numbers))

    def _difference(self, numbers: Collection[int]) -> float:
        if self.sweep.spec.resources.workers_per_trial == 1:
            return difference_alone(self.sweep, numbers, self.folder)
        *killed, undisturbed = self.sweep.records()
        assert not undisturbed.tried
        pairs = [pair for number in numbers for pair in zip(killed[number].reports, undisturbed.reports, strict=True)]
        return max(abs(one.eval_loss - other.eval_loss) for one, other in pairs)


@pytest.fixture(scope="module")
def killed(request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """A sweep of one of the WAYS, over."""
    way, folder = request.param, tmp_path_factory.mktemp(request.param)
    places = WAYS[way]
    deaths = Deaths(folder, *(Death(str(n), *place, of_trial(n)) for n, place in enumerate(places)))
    if way == "alone":
        sections = {"budget": {"trials": len(places), **BUDGET}, "resources": {"share_base": "off"}}
    else:
        same = [{"train.learning_rate": 2e-3}] * (len(places) + 1)
        sections = {
            "budget": {"trials": len(same), **BUDGET},
            "search": {"sampler": "random", "enqueue": same},
            "resources": {"workers_per_trial": 2, "strategy": way},
        }
    write_spec(folder, tiny_model_dir, way, promotion=None, **sections)
    several = raylets(4, **deaths.environment)  # room for two trials of two workers
    with nullcontext() if way == "alone" else several as cluster:
        there = cluster.environment if cluster else deaths.environment
        command = Command("run", f"{way}.yaml", "--root", "runs", cwd=folder, **there)
        try:
            assert command.end(220) == 0, command.lines
        finally:
            command.kill()
    numbers = {place: number for number, (place, _) in enumerate(places)}
    return Killed(tuner.open(way, folder / "runs"), deaths, numbers, folder)


def nothing_lost(figures: Figures) -> None:
    assert (figures.lost, figures.duplicated) == (0, 0), figures
    assert figures.difference is not None
    assert figures.difference <= 1e-5


@pytest.mark.parametrize("killed", ["alone", "ddp"], indirect=True)
def test_a_trial_whose_process_is_killed_in_a_step_goes_on(killed, note):
    nothing_lost(note("a worker killed mid-step", killed.cost(STEP)))


@pytest.mark.parametrize("killed", ["alone", "ddp"], indirect=True)
def test_a_trial_whose_process_is_killed_in_an_evaluation_goes_on(killed, note):
    nothing_lost(note("a worker killed mid-evaluation", killed.cost(SCORE)))


@pytest.mark.parametrize("killed", ["alone", "zero2"], indirect=True)
def test_a_trial_whose_process_is_killed_in_a_save_goes_on(killed, note):
    places = [place for place in (CHECKPOINT, ADAPTER) if place[0] in killed.numbers]
    nothing_lost(note("a worker killed mid-save", killed.cost(*places)))


def test_an_engine_that_is_killed_costs_none_of_its_four_trials(tiny_model_dir, tmp_path, start, note):
    """Once while one trial after the other takes a step, again while it starts, while it scores, while it saves."""
    names = ["mid-step", "mid-start", "mid-evaluation", "mid-save"]
    places = [
        ("tuner.training.shared.slot:Slot._take_step", 22),
        ("tuner.training.baseline:load_base", 1),
        ("tuner.training.shared.joint:JointModel.score", 5),
        ("safetensors.torch:save_file", 14),  # an adapter and a state each: all four have come further by then
    ]
    order = zip(names, places, ["", *names], strict=False)
    deaths = Deaths(tmp_path, *(Death(name, *at, "/sweep.log", after) for name, at, after in order))
    resources = {"share_base": 4}
    write_spec(tmp_path, tiny_model_dir, "engine", budget={"trials": 4, **BUDGET}, resources=resources, promotion=None)
    sweep = swept(start, tmp_path, "engine", deaths.environment)
    assert (sweep.state().sharing or {})["slots"] == 4
    took = [recovery_s(sweep, deaths.time(name)) for name in names]
    difference = difference_alone(sweep, range(4), tmp_path)
    figures = measure(sweep, len(names), took, difference=difference)
    nothing_lost(note("an engine killed with 4 slots in it", figures))
    log = sweep.folder.log.read_text(errors="replace")
    for record in sweep.records():
        assert f"trial {record.number} goes on from its last evaluation" in log
        assert {attempt.cause for attempt in record.tried} == {"worker-lost"}
        assert all(attempt.log_tail for attempt in record.tried)


def test_a_trial_that_diverges_ends_at_that_evaluation_and_no_other_does(tiny_model_dir, tmp_path, start, note):
    """The rate is 0 at the first step; the second makes weights of which the third loss is not a number."""
    rates = [2e-3, 1e30, 3e-3]
    write_spec(
        tmp_path,
        tiny_model_dir,
        "diverged",
        budget={"trials": 3, **BUDGET},
        train={"max_length": 64, "per_device_train_batch_size": 4, "gradient_checkpointing": False, "warmup_steps": 1},
        space={"train.learning_rate": {"type": "log_uniform", "low": 1e-3, "high": 1e31}},
        search={"sampler": "random", "enqueue": [{"train.learning_rate": rate} for rate in rates]},
        resources={"share_base": 4},
        promotion=None,
    )
    sweep = swept(start, tmp_path, "diverged", {})
    ended: dict[int, tuple[str, str | None]] = {1: ("INFEASIBLE", "diverged")}
    figures = measure(sweep, 1, ended=ended, difference=difference_alone(sweep, [0, 2], tmp_path))
    nothing_lost(note("NaN at step 3", figures))
    assert sweep.trial(1).reason == "eval_loss is nan after 343 tokens"  # of its first evaluation
    told = [sum(trial.constraints.values()) for trial in sweep.store.study.get_trials()]
    assert told == [0, 1, 0]


def swept(start, folder: Path, name: str, environment: dict[str, str]) -> tuner.Sweep:
    """The sweep of this name when it is over: well, and with none of its processes left."""
    command = start("run", f"{name}.yaml", "--root", "runs", cwd=folder, **environment)
    assert command.end() == 0, command.lines
    return tuner.open(name, folder / "runs")
