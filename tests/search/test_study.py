"""What the search proposes, stops and records, without Ray: the study is real, the trials are curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from tuner.search.study import Search
from tuner.spec.load import parse_spec
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Ending, Report, TrialConfig, milestones

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

BUDGET = 900
BASELINE = 4.0
SPACE: dict[str, Any] = {
    "lora.r": {"type": "choice", "values": [4, 8]},
    "train.learning_rate": {"type": "log_uniform", "low": 1e-4, "high": 1e-2},
}


def spec_with(tmp_path: Path, trials: int = 6, space: dict[str, Any] = SPACE, **sections: Any) -> SweepSpec:
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n')
    values: dict[str, Any] = {
        "name": "curves",
        "model": {"name": "org/model"},
        "data": {"path": "rows.jsonl"},
        "space": space,
        "budget": {"trials": trials, "tokens_per_trial": BUDGET, "evals_per_trial": 9},
        "stopping": {"type": "none"},
    }
    return parse_spec(values | sections, tmp_path)


def study_for(spec: SweepSpec) -> optuna.Study:
    return optuna.create_study(direction=spec.objective.goal)


def report(tokens: int, loss: float, accuracy: float = 0.5) -> Report:
    return Report(tokens, tokens, 1, 0.1, loss, loss, accuracy, 1e-3, 1.0, 100.0, 1, 1.0, f"tokens-{tokens}")


def run(search: Search, curve: Callable[[TrialConfig, int], float]) -> Iterable[tuple[TrialConfig, Ending]]:
    """Every trial to its end, one after the other."""
    while (config := search.ask()) is not None:
        for tokens in milestones(BUDGET, 9):
            if search.report(config["number"], report(tokens, curve(config, tokens))):
                break
        ending = search.ending(config["number"])
        search.tell(config["number"], ending)
        yield config, ending


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "gp", "qmc"])
@pytest.mark.filterwarnings("ignore:Constraints have been set")
def test_every_sampler_runs_the_number_of_trials_asked_for_and_leaves_none_running(sampler, tmp_path):
    spec = spec_with(tmp_path, search={"sampler": sampler, "startup_trials": 2})
    study = study_for(spec)
    endings = [ending.outcome for _, ending in run(Search(spec, study, BUDGET, BASELINE), lambda c, t: 3 - t / 1000)]
    assert endings == ["COMPLETED"] * 6
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 6


def test_a_grid_is_tried_once_each(tmp_path):
    space = {
        "lora.r": {"type": "choice", "values": [4, 8]},
        "lora.lora_dropout": {"type": "uniform", "low": 0.0, "high": 0.2, "step": 0.1},
    }
    spec = spec_with(tmp_path, trials=6, space=space, search={"sampler": "grid"})
    points = [
        tuple(c["point"].values()) for c, _ in run(Search(spec, study_for(spec), BUDGET, BASELINE), lambda c, t: 1.0)
    ]
    assert sorted((r, round(d, 6)) for r, d in points) == [(r, d) for r in (4, 8) for d in (0.0, 0.1, 0.2)]


def test_optuna_sees_every_evaluation_at_its_token_count_and_the_best_value(tmp_path):
    spec = spec_with(tmp_path, trials=1)
    study = study_for(spec)
    u_shaped = lambda config, tokens: 2 + abs(tokens - 400) / 1000  # noqa: E731
    list(run(Search(spec, study, BUDGET, BASELINE), u_shaped))
    (trial,) = study.trials
    assert list(trial.intermediate_values) == [100, 200, 300, 400, 500, 600, 700, 800, 900]
    assert trial.value == 2.0  # the bottom of the curve, not its end


def test_asha_prunes_the_worse_and_lets_the_better_finish(tmp_path):
    spec = spec_with(tmp_path, trials=9, stopping={"type": "asha", "grace_evals": 1, "reduction_factor": 3})
    study = study_for(spec)
    flat = lambda config, tokens: 2 + config["number"] / 10  # noqa: E731 (ever worse: only the first is worth finishing)
    endings = [ending for _, ending in run(Search(spec, study, BUDGET, BASELINE), flat)]
    assert [e.outcome for e in endings] == ["COMPLETED"] + ["STOPPED"] * 8
    assert endings[1].reason == "asha at 100 tokens"
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] + [TrialState.PRUNED] * 8


def test_nothing_is_stopped_during_its_grace(tmp_path):
    spec = spec_with(tmp_path, trials=4, stopping={"type": "asha", "grace_evals": 3, "reduction_factor": 2})
    study = study_for(spec)
    list(run(Search(spec, study, BUDGET, BASELINE), lambda config, tokens: 2 + config["number"] / 10))
    assert {max(t.intermediate_values) for t in study.trials if t.state == TrialState.PRUNED} == {300}


@pytest.mark.parametrize(
    ("objective", "min_delta", "ends_at"),
    [
        ({}, 0, 500),  # the best at 300, nothing better at 400 and 500
        ({}, 0.15, 500),  # 0.1 a time is too little, but 0.2 in two steps is not
        ({}, 0.3, 300),  # 0.2 by then
        ({"metric": "mean_token_accuracy", "goal": "maximize"}, 0, 500),
    ],
    ids=str,
)
def test_a_trial_that_improves_no_more_completes_early_with_its_best(objective, min_delta, ends_at, tmp_path):
    losses = [2.5, 2.4, 2.3, 2.35, 2.3, 2.0, 2.0, 2.0, 2.0]
    stopping = {"type": "none", "patience": 2, "min_delta": min_delta}
    spec = spec_with(tmp_path, trials=1, objective=objective, stopping=stopping)
    study = study_for(spec)
    search = Search(spec, study, BUDGET, BASELINE)
    number = search.ask()["number"]
    for tokens, loss in zip(milestones(BUDGET, 9), losses, strict=True):
        if search.report(number, report(tokens, loss, 3 - loss)):
            break
    ending = search.ending(number)
    assert (ending.outcome, ending.cause) == ("COMPLETED", "no improvement")
    metric = spec.objective.metric
    assert ending.reason == f"no better {metric} in 2 evaluations, at {ends_at} tokens"
    search.tell(number, ending)
    assert study.best_value == pytest.approx(2.3 if metric == "eval_loss" else 0.7)


def test_patience_goes_on_where_the_trial_was_cut_off(tmp_path):
    """What it reported before counts, and once: the last report comes again."""
    spec = spec_with(tmp_path, trials=1, stopping={"type": "none", "patience": 3})
    study = study_for(spec)
    before = [report(100, 2.0), report(200, 2.1)]
    first = Search(spec, study, BUDGET, BASELINE)
    number = first.ask()["number"]
    assert not any(first.report(number, one) for one in before)
    second = Search(spec, study, BUDGET, BASELINE)
    second.ask()
    second.recall(number, before)
    assert [second.report(number, one) for one in (before[-1], report(300, 2.1), report(400, 2.1))] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("rule", ["hyperband", "median"])
def test_other_rules_stop_bad_trials_too(rule, tmp_path):
    spec = spec_with(tmp_path, trials=16, stopping={"type": rule, "grace_evals": 1, "reduction_factor": 3})
    outcomes = [
        e.outcome for _, e in run(Search(spec, study_for(spec), BUDGET, BASELINE), lambda c, t: 2 + c["number"] / 10)
    ]
    assert {"COMPLETED", "STOPPED"} == set(outcomes)


@pytest.mark.parametrize("value", [math.nan, math.inf, 2.01 * BASELINE])
def test_a_trial_that_diverges_is_infeasible_and_the_samplers_know(value, tmp_path):
    spec = spec_with(tmp_path, trials=2)
    study = study_for(spec)
    search = Search(spec, study, BUDGET, BASELINE)
    diverging = lambda config, tokens: value if tokens == 300 and config["number"] == 0 else 2.0  # noqa: E731
    endings = [ending for _, ending in run(search, diverging)]
    assert [e.outcome for e in endings] == ["INFEASIBLE", "COMPLETED"]
    assert endings[0].cause == "diverged"
    assert endings[0].reason == f"eval_loss is {value:.4g} after 300 tokens"
    assert [sum(v for v in t.constraints.values()) for t in study.trials] == [1.0, 0.0]
    assert study.best_trial.number == 1


def test_a_failure_is_recorded_but_teaches_the_sampler_nothing(tmp_path):
    spec = spec_with(tmp_path, trials=1)
    study = study_for(spec)
    search = Search(spec, study, BUDGET, BASELINE)
    number = search.ask()["number"]
    search.report(number, report(100, 0.1))
    ending = search.ending(number, Ending("FAILED", "bug", "ValueError: no"))
    search.tell(number, ending)
    assert ending.outcome == "FAILED"
    assert study.trials[0].state == TrialState.FAIL


def test_a_trial_that_vanishes_is_a_failure_with_a_reason(tmp_path):
    search = Search(spec := spec_with(tmp_path), study_for(spec), BUDGET, BASELINE)
    number = search.ask()["number"]
    assert search.ending(number) == Ending("FAILED", "worker-lost", "the trial's process ended without a word")


def test_an_unfinished_trial_is_asked_again_under_its_number_with_its_values(tmp_path):
    spec = spec_with(tmp_path, trials=3)
    study = study_for(spec)
    first = Search(spec, study, BUDGET, BASELINE)
    finished = next(iter(run(first, lambda c, t: 2.0)))[0]
    cut_off = first.ask()
    first.report(cut_off["number"], report(100, 2.5))

    second = Search(spec, study, BUDGET, BASELINE)
    assert second.remaining == 2
    again = second.ask()
    assert (again["number"], again["point"]) == (cut_off["number"], cut_off["point"])
    for tokens in milestones(BUDGET, 9):
        assert not second.report(again["number"], report(tokens, 2.5))
    second.tell(again["number"], second.ending(again["number"]))
    new = second.ask()
    assert new["number"] == 2
    assert new["point"] not in (finished["point"], cut_off["point"])
    assert second.ask() is None


def test_known_points_are_tried_first(tmp_path):
    point = {"lora.r": 8, "train.learning_rate": 5e-4}
    spec = spec_with(tmp_path, search={"sampler": "random", "enqueue": [point, {"lora.r": 4}]})
    search = Search(spec, study_for(spec), BUDGET, BASELINE)
    assert search.ask()["point"] == point
    assert search.ask()["point"]["lora.r"] == 4


def test_a_condition_decides_which_keys_a_point_has(tmp_path):
    space = {
        "train.neftune_noise_alpha": {"type": "uniform", "low": 1, "high": 5, "when": {"train.packing": ["bfd"]}},
        "train.packing": {"type": "choice", "values": ["none", "bfd"]},
    }
    spec = spec_with(tmp_path, trials=12, space=space, train={"max_length": 64})
    points = [config["point"] for config, _ in run(Search(spec, study_for(spec), BUDGET, BASELINE), lambda c, t: 1.0)]
    assert {p["train.packing"] for p in points} == {"none", "bfd"}
    assert all(("train.neftune_noise_alpha" in p) == (p["train.packing"] == "bfd") for p in points)


def test_a_quantised_log_uniform_is_a_multiple_of_its_step(tmp_path):
    space = {"train.learning_rate": {"type": "log_uniform", "low": 1e-4, "high": 1e-2, "step": 1e-4}}
    spec = spec_with(tmp_path, trials=8, space=space, search={"sampler": "random"})
    for config, _ in run(Search(spec, study_for(spec), BUDGET, BASELINE), lambda c, t: 1.0):
        multiple = config["train"]["learning_rate"] / 1e-4
        assert multiple == pytest.approx(round(multiple))


def test_maximising_accuracy_keeps_the_highest(tmp_path):
    spec = spec_with(tmp_path, trials=1, objective={"metric": "mean_token_accuracy", "goal": "maximize"})
    study = study_for(spec)
    search = Search(spec, study, BUDGET, BASELINE)
    number = search.ask()["number"]
    for tokens, accuracy in zip(milestones(BUDGET, 9), [0.1, 0.3, 0.6, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4], strict=True):
        search.report(number, report(tokens, 2.0, accuracy))
    search.tell(number, search.ending(number))
    assert study.trials[0].value == 0.6


# What is known to be impossible

CHOICES: dict[str, Any] = {
    "lora.r": {"type": "int", "low": 4, "high": 16, "step": 4},
    "train.per_device_train_batch_size": {"type": "choice", "values": [1, 2, 4, 64]},
}


def too_large(config: TrialConfig) -> str | None:
    """The corner of CHOICES with the highest rank or the largest batch."""
    rank, rows = config["point"]["lora.r"], config["point"]["train.per_device_train_batch_size"]
    return "needs too much" if rank == 16 or rows == 64 else None


class Watched:
    """A search that judges points, and what it proposed: those that began, and those that were not tried."""

    def __init__(self, spec: SweepSpec, study: optuna.Study, why: Callable[[TrialConfig], str | None] = too_large):
        self.not_tried: list[tuple[dict[str, Any], Ending]] = []
        self.search = Search(spec, study, BUDGET, BASELINE, why, lambda *one: self.not_tried.append(one))

    def run(self, diverges: Callable[[TrialConfig], bool] = lambda config: False) -> list[dict[str, Any]]:
        curve = lambda config, tokens: math.nan if diverges(config) else 2.0 + config["point"]["lora.r"] / 100  # noqa: E731
        return [config["point"] for config, _ in run(self.search, curve)]


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "gp", "qmc", "grid"])
@pytest.mark.filterwarnings("ignore:Constraints have been set")
def test_no_impossible_point_is_tried_and_none_counts(sampler, tmp_path):
    large = {"lora.r": 16, "train.per_device_train_batch_size": 64}
    search = {"sampler": sampler, "startup_trials": 2, "enqueue": [large]}
    spec = spec_with(tmp_path, trials=6, space=CHOICES, search=search)
    study = study_for(spec)
    watched = Watched(spec, study)
    tried = watched.run()
    assert len(tried) == 6
    assert not any(too_large({"point": point}) for point in tried)
    assert watched.not_tried[0][0]["point"] == large
    for config, ending in watched.not_tried:
        assert (ending.outcome, ending.cause, ending.reason) == ("INFEASIBLE", "oom", "needs too much: not tried")
        trial = study.trials[config["number"]]
        assert (trial.state, trial.constraints) == (TrialState.PRUNED, {"infeasible": 2.0})
    assert len(study.trials) == 6 + len(watched.not_tried)


def test_a_resumed_search_knows_which_trials_were_none_and_which_points_diverged(tmp_path):
    study = study_for(spec_with(tmp_path, space=CHOICES))
    diverges = lambda config: config["point"]["lora.r"] == 8  # noqa: E731
    first = Watched(spec_with(tmp_path, trials=6, space=CHOICES, search={"sampler": "random"}), study)
    tried = first.run(diverges)
    assert len(tried) == 6
    assert first.not_tried
    second = Watched(spec_with(tmp_path, trials=16, space=CHOICES, search={"sampler": "random"}), study)
    assert second.search.remaining == 10
    diverged = [point for point in tried + second.run(diverges) if point["lora.r"] == 8]
    assert len(diverged) == len({tuple(point.items()) for point in diverged}) > 1
    again = [ending for _, ending in second.not_tried if ending.reason != "needs too much: not tried"]
    assert again
    assert all(ending.reason.endswith("had this point and was infeasible: not tried again") for ending in again)


def test_a_trial_that_began_goes_on_whatever_is_known_since(tmp_path):
    spec = spec_with(tmp_path, trials=2, space=CHOICES)
    study = study_for(spec)
    began = Search(spec, study, BUDGET, BASELINE).ask()
    asked = Search(spec, study, BUDGET, BASELINE)
    asked.ask()
    never_began = asked.ask()
    optuna.Trial(study, study.trials[0]._trial_id).set_user_attr("started", "now")  # as the store notes it
    watched = Watched(spec, study, lambda config: "needs too much" if config["number"] < 2 else None)
    assert watched.search.ask()["point"] == began["point"]
    assert watched.search.ask()["number"] == 2
    assert [config["number"] for config, _ in watched.not_tried] == [never_began["number"]]


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp", "qmc"])
def test_a_search_that_only_finds_what_is_impossible_is_over(sampler, tmp_path):
    spec = spec_with(tmp_path, space=CHOICES, search={"sampler": sampler, "startup_trials": 2})
    watched = Watched(spec, study_for(spec), lambda config: "no")
    assert watched.run() == []
    assert len(watched.not_tried) == 100
    assert watched.search.over == "the last 100 points proposed are all known to be impossible"
    assert watched.search.remaining == 0


def test_a_grid_is_over_when_all_of_it_has_been_proposed(tmp_path):
    spec = spec_with(tmp_path, trials=16, space=CHOICES, search={"sampler": "grid"})
    watched = Watched(spec, study_for(spec))
    running = [watched.search.ask(), watched.search.ask()]  # which is no reason to propose them again
    tried = [config["point"] for config in running] + watched.run()
    assert len(tried) == len({tuple(point.items()) for point in tried}) == 9
    assert watched.search.over == "every point of the grid has been proposed"


def test_known_points_and_added_ones_that_are_impossible_are_not_tried_either(tmp_path):
    large = {"lora.r": 16, "train.per_device_train_batch_size": 1}
    spec = spec_with(tmp_path, trials=2, space=CHOICES, search={"sampler": "random", "enqueue": [large]})
    watched = Watched(spec, study_for(spec))
    watched.search.add(large | {"lora.r": 4, "train.per_device_train_batch_size": 64})
    assert len(watched.run()) == 2
    assert [config["number"] for config, _ in watched.not_tried][:2] == [0, 1]
