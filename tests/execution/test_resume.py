"""Sweeps that are cut off at every stage and go on each time, by the command a user types, on real Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from made_by_hand import TRIALS, make_sweep
from real_sweeps import Command, trained_alone, write_spec

import tuner
from tuner.results.record import SweepStatus, TrialRecord
from tuner.spec.layout import SweepFolder
from tuner.spec.sweep import SweepSpec

pytestmark = pytest.mark.timeout(600)

NAME = "cut-off"
BUDGET, FIRST = 12_000, 3_000


@dataclass
class Stop:
    """What one command left behind."""

    code: int
    lines: list[str]
    state: SweepStatus
    trials: list[TrialRecord]
    spec: SweepSpec
    log: str


@contextmanager
def told(stops: dict[str, Stop], folder: Path, moment: str, *arguments: object) -> Iterator[Command]:
    """A command that does something to one sweep, and how the sweep stands after it has ended."""
    running = Command(*arguments, cwd=folder)
    try:
        yield running
        code = running.end()
    finally:
        running.kill()
    sweep = tuner.open(NAME, folder / "runs")
    log = sweep.folder.log.read_text(errors="replace")
    stops[moment] = Stop(code, running.lines, sweep.state(), sweep.records(), sweep.spec, log)


@pytest.fixture(scope="module")
def stops(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stop]:
    """The whole story of one sweep of three trials, command by command."""
    folder = tmp_path_factory.mktemp("resume")
    budget = {"trials": 3, "tokens_per_trial": BUDGET, "evals_per_trial": 4}
    file = write_spec(folder, tiny_model_dir, NAME, budget=budget, storage={"root": "runs"})
    run = ("run", file, "--root", folder / "runs")
    resume = ("resume", NAME, "--root", folder / "runs")
    stops: dict[str, Stop] = {}
    command = partial(told, stops, folder)
    with command("preparing", *run) as running:
        running.wait_for("Loading the libraries")
        running.ctrl_c()
    with command("searching", *resume) as running:
        running.wait_for("trial 0 COMPLETED")
        running.wait_for(f"trial 1 at {FIRST:,} tokens")
        running.ctrl_c()
    with command("cancelled", *resume) as running:
        running.wait_for(f"trial 1 at {FIRST:,} tokens")
        cancel = Command("cancel", NAME, "--root", folder / "runs", cwd=folder)
        assert cancel.end() == 0, cancel.lines
    with command("promoting", *resume) as running:
        running.wait_for(f"trial 2 at {FIRST:,} tokens")
        running.kill_writer(folder / "runs" / "sweeps" / NAME / "trials" / "00002" / "trial.log")
        running.wait_for("measuring the merged model")
        running.ctrl_c()
    with command("done", *resume):
        pass
    return stops


@pytest.mark.parametrize("moment", ["preparing", "searching", "cancelled", "promoting"])
def test_it_ends_with_130_and_the_command_that_goes_on(stops, moment):
    stop = stops[moment]
    assert stop.code == 130, stop.lines
    assert stop.lines[-1].startswith(f"tuner resume {NAME} --root ")
    assert stop.state.status == ("cancelled" if moment == "cancelled" else "interrupted")
    assert not any("Traceback" in line for line in stop.lines)


def test_ctrl_c_before_the_sweep_has_begun_leaves_nothing_and_names_the_command_that_begins_it(
    tiny_model_dir, tmp_path
):
    file = write_spec(tmp_path, tiny_model_dir, NAME, budget={"trials": 1, "tokens_per_trial": BUDGET})
    running = Command("run", file, "--root", tmp_path / "runs", cwd=tmp_path)
    try:
        running.wait_for("Starting Ray")
        running.ctrl_c()
        assert running.end() == 130
    finally:
        running.kill()
    assert running.lines[-1] == f"tuner run {file} --root {tmp_path / 'runs'}"
    assert not (tmp_path / "runs").exists()


def test_before_its_first_trial_there_is_none(stops):
    assert stops["preparing"].trials == []
    assert stops["preparing"].state.tokens_per_trial is None


def test_a_trial_that_was_cut_off_is_left_unfinished_and_run_again_under_its_number(stops):
    for moment in ("searching", "cancelled"):
        assert [trial.outcome for trial in stops[moment].trials] == ["COMPLETED", "INTERRUPTED"]
    cut_off, again, done = (stops[moment].trials[1] for moment in ("searching", "cancelled", "done"))
    assert cut_off.reports
    assert cut_off.finished is None
    assert cut_off.started < again.started < done.started
    assert cut_off.point == again.point == done.point
    assert done.outcome == "COMPLETED"
    assert [report.tokens for report in done.reports] == [FIRST, 2 * FIRST, 3 * FIRST, BUDGET]
    assert done.reports[0].duration_s == cut_off.reports[0].duration_s  # it went on from there


@pytest.mark.parametrize(("story", "number"), [("stops", 1), ("workers_stops", 0)])
def test_a_trial_with_its_own_base_goes_on_and_scores_as_one_that_was_not_cut_off(story, number, request, tmp_path):
    stops = request.getfixturevalue(story)
    done = stops["done"]
    folder = SweepFolder.of(done.spec)
    went_on = f"trial {number} goes on from its last evaluation"
    assert went_on in folder.trial_log(number).read_text().splitlines()
    assert not folder.goes_on(number)
    assert not folder.trial_checkpoints(number).exists()
    facts = {field: getattr(done.state, field) for field in ("tokens_per_trial", "data", "baseline")}
    trial = done.trials[number]
    resources = done.spec.resources.model_copy(update={"workers_per_trial": 1, "strategy": "auto"})
    alone = trained_alone(done.spec.model_copy(update={"resources": resources}), trial.config, facts, tmp_path)
    assert [one.eval_loss for one in trial.reports] == pytest.approx([one.eval_loss for one in alone], abs=1e-4)
    assert [one.trained_tokens for one in trial.reports] == [one.trained_tokens for one in alone]
    assert sorted(one.duration_s for one in trial.reports) == [one.duration_s for one in trial.reports]


@pytest.fixture(scope="module")
def workers_stops(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stop]:
    """A trial of two workers, whose optimizer's state each has a part of: cut off, and gone on."""
    folder = tmp_path_factory.mktemp("resume-workers")
    budget = {"trials": 1, "tokens_per_trial": BUDGET, "evals_per_trial": 4}
    resources = {"workers_per_trial": 2, "strategy": "zero2", "share_base": "off"}
    sections = {"resources": resources, "promotion": None, "storage": {"root": "runs"}}
    file = write_spec(folder, tiny_model_dir, NAME, budget=budget, **sections)
    stops: dict[str, Stop] = {}
    with told(stops, folder, "searching", "run", file) as running:
        running.wait_for(f"trial 0 at {FIRST:,} tokens")
        running.ctrl_c()
    with told(stops, folder, "done", "resume", NAME, "--root", folder / "runs"):
        pass
    return stops


def test_a_trial_whose_process_is_killed_is_tried_again_and_its_record_says_so(stops, tmp_path):
    killed = stops["promoting"].trials[2]
    assert (killed.outcome, killed.cause) == ("COMPLETED", None)
    (attempt,) = killed.tried
    assert (attempt.tokens, attempt.cause, attempt.changed) == (FIRST, "worker-lost", {})
    assert attempt.reason == "the trial's process ended with exit code -9"
    assert attempt.log_tail
    assert "trial 2 goes on from its last evaluation" in SweepFolder.of(stops["done"].spec).trial_log(2).read_text()
    assert stops["done"].trials[2] == killed
    told = [line.split("] ")[1] for line in stops["promoting"].lines if f"trial 2 at {FIRST:,} tokens" in line]
    assert len(told) == 1, "an evaluation was reported twice"


def test_a_finished_trial_is_not_run_again(stops):
    finished = stops["searching"].trials[0]
    assert all(stops[moment].trials[0] == finished for moment in ("cancelled", "promoting", "done"))


def test_a_base_that_was_measured_is_not_measured_again(stops):
    measured = [moment for moment, stop in stops.items() if any("Measuring the base" in line for line in stop.lines)]
    assert measured[-1] == "searching"
    assert stops["searching"].state.baseline == stops["done"].state.baseline


def test_when_only_the_promotion_was_cut_off_ray_does_not_start_again(stops):
    assert [trial.outcome for trial in stops["promoting"].trials] == ["COMPLETED"] * 3
    assert stops["promoting"].state.promoted is None
    assert not any("Starting Ray" in line for line in stops["done"].lines)


@pytest.mark.parametrize(("trials", "status"), [(TRIALS[:3], "finished"), (TRIALS[1:2] + TRIALS[3:5], "failed")])
def test_a_sweep_whose_trials_are_all_over_is_concluded_by_whether_one_completed(tmp_path, trials, status):
    budget = {"trials": 3, "tokens_per_trial": 1000}
    store = make_sweep(tmp_path, trials, "interrupted", budget=budget, promotion=None)
    assert tuner.resume(store.spec.name, root=tmp_path).status == status


def test_in_the_end_there_are_as_many_trials_as_were_asked_for_and_a_promoted_model(stops):
    done = stops["done"]
    assert (done.code, done.state.status) == (0, "finished"), done.lines
    assert [trial.number for trial in done.trials] == [0, 1, 2]
    assert done.state.promoted["version"] == "v1"
    assert (Path(done.state.promoted["path"]) / "model.safetensors").is_file()
    elapsed = [stop.state.elapsed_s for stop in stops.values()]
    assert elapsed == sorted(elapsed)


@pytest.fixture(scope="module")
def shared_stops(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stop]:
    """A sweep whose trials share a base, two at a time: cut off, and its engine killed when it goes on."""
    folder = tmp_path_factory.mktemp("resume-shared")
    budget = {"trials": 4, "tokens_per_trial": BUDGET, "evals_per_trial": 4}
    file = write_spec(
        folder,
        tiny_model_dir,
        NAME,
        budget=budget,
        resources={"share_base": 2},
        promotion=None,
        storage={"root": "runs"},
    )
    stops: dict[str, Stop] = {}
    with told(stops, folder, "searching", "run", file) as running:
        running.wait_for("trial 0 at ")
        running.wait_for("trial 1 at ")
        running.ctrl_c()
    with told(stops, folder, "done", "resume", NAME, "--root", folder / "runs") as running:
        running.wait_for("trial 0 at ")
        running.wait_for("trial 1 at ")
        running.kill_actor("EngineActor")
    with told(stops, folder, "more", "resume", NAME, "--set", "budget.trials=5", "--root", folder / "runs"):
        pass
    return stops


def test_trials_on_a_shared_base_are_cut_off_and_go_on_from_their_last_evaluation(shared_stops):
    stop, done = shared_stops["searching"], shared_stops["done"]
    assert (stop.code, stop.state.status) == (130, "interrupted"), stop.lines
    assert all(trial.reports for trial in stop.trials[:2])
    assert [trial.point for trial in done.trials[:2]] == [trial.point for trial in stop.trials[:2]]
    said = done.log.splitlines()
    for trial in (trial for trial in stop.trials if trial.outcome == "INTERRUPTED" and trial.reports):
        assert f"trial {trial.number} goes on from its last evaluation" in said
        assert done.trials[trial.number].reports[: len(trial.reports) - 1] == trial.reports[:-1]


def test_an_engine_that_is_killed_costs_no_trial(shared_stops):
    done = shared_stops["done"]
    assert (done.code, done.state.status) == (0, "finished"), done.lines
    assert [trial.outcome for trial in done.trials] == ["COMPLETED"] * 4
    for trial in done.trials:
        assert [report.tokens for report in trial.reports] == [FIRST, 2 * FIRST, 3 * FIRST, BUDGET]
    told = [line.split(" tokens:")[0].split("] ")[1] for line in done.lines if " tokens: " in line]
    assert len(told) == len(set(told)), "an evaluation was reported twice"


def test_a_finished_sweep_takes_more_trials(shared_stops):
    done, more = shared_stops["done"], shared_stops["more"]
    assert (more.code, more.state.status, more.spec.budget.trials) == (0, "finished", 5), more.lines
    scores = [[(report.tokens, report.eval_loss) for report in trial.reports] for trial in done.trials]
    assert [[(report.tokens, report.eval_loss) for report in trial.reports] for trial in more.trials[:4]] == scores
    assert (more.trials[4].number, more.trials[4].outcome) == (4, "COMPLETED")


def test_a_trial_that_was_cut_off_twice_scores_as_one_that_was_not(shared_stops, tmp_path):
    done = shared_stops["done"]
    facts = {field: getattr(done.state, field) for field in ("tokens_per_trial", "data", "baseline")}
    for trial in done.trials[:2]:
        alone = trained_alone(done.spec, trial.config, facts, tmp_path)
        assert [one.eval_loss for one in trial.reports] == pytest.approx([one.eval_loss for one in alone], abs=1e-5)
