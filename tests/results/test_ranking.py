"""Who wins: equal budgets only, the best report and not the last, nothing that is not finite."""

from __future__ import annotations

import pytest
from made_by_hand import BUDGET, NAN, make_report

from tuner.results.ranking import best_report, best_trial, leaderboard
from tuner.results.record import TrialRecord
from tuner.spec.sweep import ObjectiveSpec
from tuner.spec.trial import NO_IMPROVEMENT

LOSS = ObjectiveSpec()
ACCURACY = ObjectiveSpec(metric="mean_token_accuracy", goal="maximize")


def trial(number, losses, outcome="COMPLETED", objective=LOSS, accuracies=None, cause=None):
    values = zip(losses, accuracies or [0.5] * len(losses), strict=True)
    reports = tuple(make_report(BUDGET * (k + 1) // 4, loss, accuracy) for k, (loss, accuracy) in enumerate(values))
    return TrialRecord(number, outcome, {}, {}, reports, best_report(reports, objective), cause)


FULL = [2.9, 2.8, 2.7, 2.6]

CASES = {
    "the lower loss": ([trial(0, FULL), trial(1, [2.9, 2.8, 2.7, 2.5])], (1, 1000)),
    "the bottom of a U, not its end": ([trial(0, [2.9, 2.4, 2.6, 3.1]), trial(1, FULL)], (0, 500)),
    "a NaN on the way does not hide the rest": ([trial(0, [2.9, NAN, 2.5, 2.55])], (0, 750)),
    "a NaN never wins": ([trial(0, [NAN] * 4), trial(1, FULL)], (1, 1000)),
    "infinity never wins": ([trial(0, [float("-inf")] * 4), trial(1, FULL)], (1, 1000)),
    "nobody, when all are NaN": ([trial(0, [NAN] * 4)], None),
    "not one that failed after a good score": ([trial(0, [1.0], "FAILED"), trial(1, FULL)], (1, 1000)),
    "not one that ran out of memory later": ([trial(0, [1.0], "INFEASIBLE"), trial(1, FULL)], (1, 1000)),
    "not one that was stopped, whatever its score": ([trial(0, [1.0, 1.0], "STOPPED"), trial(1, FULL)], (1, 1000)),
    "not one that still runs": ([trial(0, [1.0], "RUNNING"), trial(1, FULL)], (1, 1000)),
    "nobody, when none completed": ([trial(0, [1.0], "STOPPED"), trial(1, [2.0], "RUNNING")], None),
    "not one short of the budget": ([trial(0, [1.0, 1.0]), trial(1, FULL)], (1, 1000)),
    "one whose patience was over: it left budget unused": (
        [trial(0, [2.9, 2.4, 2.5], cause=NO_IMPROVEMENT), trial(1, FULL)],
        (0, 500),
    ),
    "the lower number of equals": ([trial(1, FULL), trial(0, FULL)], (0, 1000)),
    "the earlier report of equals": ([trial(0, [2.9, 2.5, 2.5, 2.6])], (0, 500)),
    "nobody in an empty sweep": ([], None),
}


@pytest.mark.parametrize(("records", "winner"), CASES.values(), ids=CASES)
def test_the_winner_is(records, winner):
    best = best_trial(records, LOSS, BUDGET)
    assert (best and (best[0].number, best[1].tokens)) == winner


def test_a_maximized_objective_ranks_by_the_higher_value():
    low = trial(0, FULL, objective=ACCURACY, accuracies=[0.1, 0.2, 0.3, 0.4])
    high = trial(1, FULL, objective=ACCURACY, accuracies=[0.1, 0.6, 0.3, 0.4])
    best = best_trial([low, high], ACCURACY, BUDGET)
    assert best is not None
    assert (best[0].number, best[1].tokens) == (1, 500)
    assert [record.number for record in leaderboard([low, high], ACCURACY)] == [1, 0]


def test_a_report_with_a_broken_accuracy_is_not_finite_either():
    broken = make_report(1000, 1.0, NAN)
    assert best_report([broken], LOSS) is None


def test_the_leaderboard_has_completed_then_stopped_by_how_far_then_the_others():
    records = [
        trial(0, [1.0], "FAILED"),
        trial(1, [2.5], "STOPPED"),
        trial(2, [2.9, 2.8], "STOPPED"),
        trial(3, [3.0, 2.7], "STOPPED"),
        trial(4, FULL),
        trial(5, [1.0], "RUNNING"),
        trial(6, [2.9, 2.2, 2.3, 2.4]),
        trial(7, [], "INFEASIBLE"),
        trial(8, [NAN] * 4),
    ]
    assert [record.number for record in leaderboard(records, LOSS)] == [6, 4, 8, 3, 2, 1, 5, 7, 0]
