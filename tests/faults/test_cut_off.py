"""One sweep that is killed where it hurts, step by step; and what is damaged meanwhile."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest

import tuner
from tests.faults.matrix import difference_alone, measure, recovery_s
from tests.real_sweeps import Command, write_spec
from tuner.errors import PromotionRefused
from tuner.promotion.registry import current, versions
from tuner.results.record import TrialRecord, utc_now
from tuner.spec.layout import Root

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

NAME, BUDGET = "cut-off", 12_000


@dataclass
class Story:
    """A sweep, and what was seen of it on the way."""

    folder: Path
    faults: dict[str, datetime] = field(default_factory=dict)
    before: list[list[TrialRecord]] = field(default_factory=list)
    lines: dict[str, list[str]] = field(default_factory=dict)
    seen: dict[str, list[str]] = field(default_factory=dict)

    @property
    def sweep(self) -> tuner.Sweep:
        return tuner.open(NAME, self.root)

    @property
    def root(self) -> Path:
        return self.folder / "runs"

    def models(self) -> list[str]:
        return sorted(path.name for path in (self.root / "models" / "production").glob("[v.]*"))

    def kill(self, fault: str, running: Command) -> None:
        self.faults[fault] = utc_now()
        running.kill_driver()
        self.before.append(self.sweep.records())


def until(condition: Callable[[], object], running: Command, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert running.process.poll() is None, running.lines
        assert time.monotonic() < end, running.lines
        time.sleep(0.02)


def all_at(sweep: tuner.Sweep, tokens: int) -> bool:
    """Whether the study knows what both trials scored there."""
    trials = sweep.store.study.get_trials(deepcopy=False)
    return len(trials) == 2 and all(tokens in trial.intermediate_values for trial in trials)


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Hold back every commit of others, as one that writes all the time would."""
    connection = sqlite3.connect(database, timeout=60, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


@pytest.fixture(scope="module")
def story(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Two trials on one base, killed when all is trained and nothing of that is written; one's state is cut short, two
    drivers go on at once; the one that does is killed while it measures the merged model."""
    story = Story(tmp_path_factory.mktemp("cut-off"))
    budget = {"trials": 2, "tokens_per_trial": BUDGET, "evals_per_trial": 4}
    file = write_spec(story.folder, tiny_model_dir, NAME, budget=budget, resources={"share_base": 2})
    started: list[Command] = []

    def start(*arguments: object) -> Command:
        started.append(Command(*arguments, "--root", story.root, cwd=story.folder))
        return started[-1]

    try:
        running = start("run", file)
        running.wait_for("Searching: 2 trials")
        sweep = story.sweep
        until(lambda: all_at(sweep, 3 * BUDGET // 4), running)  # all is written down: the last part is asked for
        last = [sweep.folder.adapter(number, BUDGET) for number in (0, 1)]
        with locked(sweep.folder.study):
            until(lambda: all(adapter.exists() for adapter in last), running)
            story.kill("commit", running)
        state = sweep.folder.trial_state(1)
        os.truncate(state, state.stat().st_size // 2)

        story.faults["rivals"] = utc_now()
        rivals = [start("resume", NAME), start("resume", NAME)]
        until(lambda: any(rival.process.poll() is not None for rival in rivals), rivals[0])
        refused, running = sorted(rivals, key=lambda rival: rival.process.poll() is None)
        assert refused.process.wait(60) == 1
        story.lines["refused"] = refused.lines
        running.wait_for("measuring the merged model")
        story.seen["promotion"] = story.models()
        story.kill("promotion", running)
        story.seen["killed"] = story.models()

        running = start("resume", NAME)
        assert running.end() == 0, running.lines
        story.lines["done"] = running.lines
        yield story
    finally:
        for one in started:
            one.kill()


def test_a_driver_killed_before_it_wrote_down_that_training_was_done(story, note, tmp_path):
    """Neither the last evaluations nor the ends of the trials were recorded."""
    assert [record.reached for record in story.before[0]] == [3 * BUDGET // 4] * 2
    assert [record.outcome for record in story.before[0]] == ["RUNNING"] * 2
    fault = story.faults["commit"]
    difference = difference_alone(story.sweep, [0], tmp_path)
    figures = measure(story.sweep, 1, [recovery_s(story.sweep, fault)], before=story.before, difference=difference)
    note("the driver killed between training's end and the store's commit", figures)
    assert (figures.lost, figures.duplicated) == (0, 0)
    assert difference <= 1e-5


def test_a_trial_whose_checkpoint_was_cut_short_begins_again_and_the_sweep_says_so(story, note, tmp_path):
    difference = difference_alone(story.sweep, [1], tmp_path)
    figures = measure(story.sweep, 1, before=story.before, difference=difference)
    note("a truncated checkpoint", figures)
    assert (figures.lost, figures.duplicated) == (0, 0)
    assert difference <= 1e-5
    said = story.sweep.folder.log.read_text(errors="replace")
    assert "00001/state.safetensors is damaged" in said
    assert "00000/state.safetensors is damaged" not in said


def test_of_two_drivers_that_go_on_with_a_sweep_one_does_and_the_other_says_so(story, note):
    assert story.lines["refused"][-1] == f"tuner: sweep {NAME!r} is running already", story.lines["refused"]
    figures = measure(story.sweep, 1, before=story.before)
    note("two drivers resuming one sweep", figures)
    assert (figures.lost, figures.duplicated) == (0, 0)


def test_a_promotion_that_was_killed_before_its_rename_leaves_no_half_version(story, note):
    incoming = [name for name in story.seen["promotion"] if name.startswith(".incoming-")]
    assert len(incoming) == 1, "it was not killed in the middle"
    assert not any(name.startswith("v") for name in story.seen["killed"])
    recover_s = [recovery_s(story.sweep, story.faults["promotion"])]
    figures = measure(story.sweep, 1, recover_s, before=story.before)
    note("a kill between promotion's write and rename", figures)
    assert (figures.lost, figures.duplicated) == (0, 0)
    assert [name for name in story.models() if not name.startswith(".lock")] == ["v1"]
    promoted = current(Root.at(str(story.root)), "production")
    assert promoted is not None
    assert promoted.manifest()["trial"] == story.sweep.best.number
    assert not any("Starting Ray" in line for line in story.lines["done"])


def test_an_adapter_that_was_cut_short_is_not_promoted_and_the_promoted_model_stays(story, note):
    best, root = story.sweep.best, Root.at(str(story.root))
    weights = Path(best.adapter_path) / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(PromotionRefused, match="is damaged or cut short"):
        story.sweep.promote(force=True)
    figures = measure(story.sweep, 1, before=story.before)
    note("a truncated adapter", figures)
    assert (figures.lost, figures.duplicated) == (0, 0)
    assert [version.name for version in versions(root, "production")] == ["v1"]
    assert current(root, "production").name == "v1"
